"""What public classes share: their name, a structure for `jax.export`, a line of text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.export
import numpy as np

_Class = TypeVar("_Class", bound=type)


def public(cls: _Class) -> _Class:
    """Names a class after the package, so that pickles and tracebacks survive moves within it."""
    cls.__module__ = "jaxaccum"
    return cls


def pytree(*, data_fields: list[str], meta_fields: list[str]) -> Callable[[_Class], _Class]:
    """Registers a dataclass as a pytree whose structure can be written to a file.

    `jax.export` serializes functions with the structure of their arguments and results, and must be
    told how to write what is static: here shapes, dtypes and words, as JSON.
    """

    def register(cls: _Class) -> _Class:
        if hasattr(cls, "tree_flatten"):  # it has reasons to take itself apart
            jax.tree_util.register_pytree_with_keys_class(cls)
        else:
            jax.tree_util.register_dataclass(cls, data_fields, meta_fields)
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"jaxaccum.{cls.__name__}",
            serialize_auxdata=lambda meta: json.dumps(meta, default=_dtype_name).encode(),
            deserialize_auxdata=lambda text: tuple(map(_static, json.loads(text))),
            from_children=lambda meta, children: cls(
                **dict(zip(data_fields, children, strict=True)),
                **dict(zip(meta_fields, meta, strict=True)),
            ),
        )
        return cls

    return register


def named_tuple(cls: _Class) -> _Class:
    """The same for a ``NamedTuple``, which is a pytree already."""
    jax.export.register_namedtuple_serialization(cls, serialized_name=f"jaxaccum.{cls.__name__}")
    return cls


def one_line(state: Any, **words: Callable[[Any], str]) -> str:
    """The ``repr`` of a dataclass or named tuple: small arrays as they are, others by their shape.

    Works on whatever stands where arrays do: tracers, specs, placeholders.

    Args:
      state: its fields are shown that are not ``None``, nor ``field(repr=False)`` of a dataclass.
      **words: by the name of a field, what is to be written for a host array of it.
    """
    if dataclasses.is_dataclass(state):
        names = [field.name for field in dataclasses.fields(state) if field.repr]
    else:
        names = state._fields
    known = ((name, getattr(state, name)) for name in names)
    shown = (f"{name}={_show(it, words.get(name))}" for name, it in known if it is not None)
    return f"{type(state).__name__}({', '.join(shown)})"


class _Words(str):
    """Stands for a leaf in the ``repr`` of a tree."""

    __slots__ = ()
    __repr__ = str.__str__


_AS_IT_IS = 8  # numbers at most


def _show(tree: Any, words: Callable[[Any], str] | None) -> str:
    def show(leaf: Any) -> _Words:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return _Words(leaf.name if isinstance(leaf, np.dtype) else repr(leaf))
        is_known = not isinstance(leaf, jax.core.Tracer) and getattr(
            leaf, "is_fully_addressable", True
        )
        if is_known and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
            if words is not None:
                return _Words(words(np.asarray(leaf)))
            if leaf.size <= _AS_IT_IS:
                return _Words(np.asarray(leaf).tolist())
        return _Words(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    def has_words_of_its_own(node: Any) -> bool:
        return type(node).__module__ == "jaxaccum"

    return repr(jax.tree.map(show, tree, is_leaf=has_words_of_its_own))


def _dtype_name(dtype: np.dtype[Any]) -> dict[str, str]:
    return {"dtype": dtype.name}


def _static(value: object) -> object:
    if isinstance(value, dict):
        return jax.numpy.dtype(value["dtype"])
    return tuple(value) if isinstance(value, list) else value
