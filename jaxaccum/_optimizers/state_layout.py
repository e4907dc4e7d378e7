"""How the state of an optax transform follows the rows of the tables, read off its shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef
from jax.typing import DTypeLike

from jaxaccum._optimizers.optax_import import Transform
from jaxaccum._rows.tables import KeyPath
from jaxaccum._rows.tree import Leaf, PyTree


@dataclasses.dataclass(frozen=True)
class Trainee:
    """A transform, and the shapes of what it is to train.

    Attributes:
      tx: the transform.
      params: one ``ShapeDtypeStruct`` a leaf.
      treedef: the structure of the params.
      tables: the positions among ``params`` that are tables.
      extra_args: what goes to ``update`` beside them, arrays among it as ones of their shapes.
    """

    tx: Transform
    params: list[Leaf]
    treedef: PyTreeDef
    tables: tuple[int, ...]
    extra_args: Mapping[str, object]

    def unflatten(self, leaves: list[Leaf]) -> PyTree:
        """Returns a tree like the params."""
        return jax.tree.unflatten(self.treedef, leaves)


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How a transform's state follows the rows of the tables.

    Attributes:
      owners: for every leaf of the state the position of the table it follows, or ``None``.
      names: for every leaf of the state the path to it.
      shapes: for every leaf of the state the shape it must have.
      treedef: the structure of the state.
    """

    owners: tuple[int | None, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    treedef: PyTreeDef

    def map_rows(
        self,
        fun: Callable[..., Leaf],
        state: PyTree,
        *rest: PyTree,
        shared: Callable[..., Leaf] | None = None,
    ) -> PyTree:
        """Applies ``fun(owner, leaf, *rest)`` to leaves held by row, ``shared`` to all others."""
        others = [self.flatten(tree) for tree in rest]
        leaves = [
            (shared(*args) if shared else args[0]) if owner is None else fun(owner, *args)
            for owner, *args in zip(self.owners, self.flatten(state), *others, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def rows_of(self, leaves: list[Leaf], owner: int) -> list[Leaf]:
        """Returns the ``leaves`` that follow table ``owner``."""
        return [leaf for o, leaf in zip(self.owners, leaves, strict=True) if o == owner]

    def with_rows(self, leaves: list[Leaf], owner: int, rows: list[Leaf]) -> list[Leaf]:
        """Returns ``leaves`` with ``rows`` in place of those that follow table ``owner``."""
        held = iter(rows)
        pairs = zip(self.owners, leaves, strict=True)
        return [next(held) if o == owner else leaf for o, leaf in pairs]

    def flatten(self, state: PyTree) -> list[Leaf]:
        """Returns the leaves of ``state``, which must be one that this transform made."""
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self.treedef:
            raise ValueError(
                "state must be what init returned for these params, got the structure "
                f"{treedef}, expected {self.treedef}"
            )
        return leaves

    def check(self, state: PyTree) -> None:
        """Raises ``ValueError`` if a leaf held by row has not the rows of its table."""
        for owner, name, shape, leaf in zip(
            self.owners, self.names, self.shapes, self.flatten(state), strict=True
        ):
            if owner is not None and jnp.shape(leaf) != shape:
                raise ValueError(
                    f"state must be what init returned for these params, got state{name} of shape "
                    f"{jnp.shape(leaf)}, expected {shape}"
                )


def lay_out_rows(trainee: Trainee) -> RowLayout:
    """Lays out the state of a transform for params of these shapes, without computing anything.

    It is laid out for tables of two sizes: a leaf whose leading axis follows the row count of a
    table is held by row, one that stays is shared by all rows, anything else cannot be cut up.

    Raises:
      ValueError: the state cannot be cut into rows.
    """
    tx, params, tables = trainee.tx, trainee.params, trainee.tables
    small, rows_of = list(params), {}
    for position, table in enumerate(tables):
        rows, *row = params[table].shape
        few = 1 + position  # tells the tables apart, and from the true row count
        few += len(tables) if few == rows else 0
        rows_of[few] = (position, rows)
        small[table] = struct((few, *row), params[table].dtype)
    state = jax.eval_shape(tx.init, trainee.unflatten(params))
    if any(map(_is_multi_steps, jax.tree.leaves(state, is_leaf=_is_multi_steps))):
        raise refusal(
            "optax.MultiSteps keeps its sums as rows that only emit when they are touched again; "
            "use jaxaccum.accumulate"
        )
    state_treedef: PyTreeDef
    whole, state_treedef = jax.tree_util.tree_flatten_with_path(state)
    part, part_treedef = jax.tree.flatten(jax.eval_shape(tx.init, trainee.unflatten(small)))
    if part_treedef != state_treedef:
        raise refusal("the structure of its state depends on the number of rows")
    owners = tuple(
        _owner(path, leaf.shape, other.shape, rows_of)
        for (path, leaf), other in zip(whole, part, strict=True)
    )
    names = tuple(jax.tree_util.keystr(path) for path, _ in whole)
    return RowLayout(owners, names, tuple(leaf.shape for _, leaf in whole), state_treedef)


def _is_multi_steps(node: object) -> bool:
    return type(node).__name__ == "MultiStepsState"


def _owner(
    path: KeyPath,
    whole: tuple[int, ...],
    part: tuple[int, ...],
    rows_of: Mapping[int, tuple[int, int]],
) -> int | None:
    if whole == part:
        return None
    position, rows = rows_of.get(part[0], (-1, -1)) if part else (-1, -1)
    if position >= 0 and whole == (rows, *part[1:]):
        return position
    raise refusal(
        f"its state{jax.tree_util.keystr(path)} of shape {whole} does not hold one entry a row "
        "(as in adafactor's factored moments)"
    )


def refusal(reason: str) -> ValueError:
    """Returns the error for a transform that cannot be run on a few rows of a table."""
    return ValueError(
        f"tx must be row-separable, but {reason}. Give the tables a transform of their own by "
        "optax.partition, or keep their gradients dense"
    )


def struct(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array that need not exist."""
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def struct_of(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of ``leaf``, an array or a number."""
    return struct(jnp.shape(leaf), jnp.result_type(leaf))
