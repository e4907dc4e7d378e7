"""Who takes a gradient apart: some read its row numbers as if they were numbers to train."""

from __future__ import annotations

import types

# Functions of jax.tree that are asked for the sake of the leaves. optax.masked and others that may
# well stand outside of lazy_rows ask for the structure.
_READERS = frozenset({"map", "leaves", "reduce", "map_with_path"})
# What jax.lax, in its module ``parallel``, calls the sums over devices.
_SUMS = frozenset({"psum", "pmean", "pmax", "pmin", "psum_scatter"})
# Operators of numbers, by the names that Python, NumPy and JAX give them.
_OPERATORS = frozenset(
    {"add", "iadd", "sub", "subtract", "mul", "multiply", "neg", "negative", "square", "abs"}
)
_MATHEMATICS = ("_operator", "operator", "jax", "numpy")


def refuse_strangers(dense_shape: object, frame: types.FrameType | None) -> None:
    """Raises if optax, or a sum over devices, takes a gradient of ``dense_shape`` apart.

    Such a caller would do arithmetic on the row numbers, and other rows would be updated. Nothing
    else could tell: a sum of row numbers is a row number. So this looks at who asked ``jax.tree``
    for the leaves (1 us where it is a jitted call that asks); what else a user maps over them is
    not seen. If the modules looked for had other names, nothing would be refused.

    A checksum among the leaves would see more, but has no one to tell inside ``jit``; typed keys
    (`jax.random.wrap_key_data`) refuse arithmetic, but are no indices and take twice the room.

    Args:
      dense_shape: for the message.
      frame: of the function that flattens.

    Raises:
      TypeError: naming the function that called, and what to use instead.
    """
    # jax.tree.map calls tree_map calls us: a few steps up is whoever called that.
    reads_leaves = False
    while frame is not None and _is_jax(frame, ".tree", ".tree_util"):
        _refuse_arithmetic(dense_shape, frame.f_locals.get("f"))
        reads_leaves |= frame.f_code.co_name.removeprefix("tree_") in _READERS
        frame = frame.f_back
    if frame is None:
        return
    is_optax = _module(frame).startswith("optax.")
    # An update of zeros (of apply_if_finite) may name any row.
    if reads_leaves and is_optax and "zeros_like" not in frame.f_code.co_qualname:
        raise TypeError(
            f"optax.{_transform(frame)} takes the row numbers of a gradient of shape {dense_shape} "
            "for parameters: wrap the optax transform in jaxaccum.lazy_rows, the whole chain if it "
            "is one, and use jaxaccum.global_norm and jaxaccum.map_values outside of it"
        )
    while frame is not None and _is_jax(frame, ".parallel"):
        if frame.f_code.co_name in _SUMS:
            raise TypeError(
                f"{frame.f_code.co_name} would add up the row numbers of gradients of shape "
                f"{dense_shape}: use jaxaccum.all_sum, which gathers their rows"
            )
        frame = frame.f_back


def _refuse_arithmetic(dense_shape: object, fun: object) -> None:
    """Raises if ``fun``, mapped over the leaves of a gradient, is an operator of numbers."""
    name = getattr(fun, "__name__", None)
    if name in _OPERATORS and str(getattr(fun, "__module__", "")).startswith(_MATHEMATICS):
        raise TypeError(
            f"{name} is mapped over the leaves of a gradient of shape {dense_shape}, row numbers "
            "included: gradients are added and scaled as a whole (a + b, 0.5 * a), in trees by "
            "jax.tree.map with is_leaf=lambda x: isinstance(x, jaxaccum.IndexedSlices)"
        )


def _transform(frame: types.FrameType) -> str:
    """What optax calls the transform, or else the function, that ``frame`` is part of."""
    name, step = frame.f_code.co_qualname, frame
    while _module(step).startswith("optax.") and step.f_back is not None:
        maker, is_step, _ = step.f_code.co_qualname.partition(".<locals>.update")
        if is_step:
            return maker
        name, step = step.f_code.co_qualname, step.f_back
    return name.split(".<locals>")[0]


def _is_jax(frame: types.FrameType, *ends: str) -> bool:
    return _module(frame).startswith("jax.") and _module(frame).endswith(ends)


def _module(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
