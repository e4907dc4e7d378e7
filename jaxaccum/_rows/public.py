"""What users import is called ``jaxaccum.X``; what they pass to `jit`, `jax.export` can write."""

from __future__ import annotations

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


def _dtype_name(dtype: np.dtype[Any]) -> dict[str, str]:
    return {"dtype": dtype.name}


def _static(value: Any) -> Any:
    if isinstance(value, dict):
        return jax.numpy.dtype(value["dtype"])
    return tuple(value) if isinstance(value, list) else value
