"""Whether a transform picks rows of a table by their numbers, read off its traced update."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.extend import core

from jaxaccum._optimizers.state_layout import Trainee, struct
from jaxaccum._rows.tree import PyTree

# Tables are traced with so many rows and a few more: sizes that nothing else has.
_MARK = 100_003


def is_row_named(trainee: Trainee) -> bool:
    """Whether a transform reads, writes or numbers rows of a table one by one.

    Nothing is computed.
    """
    tx = trainee.tx
    marked = {table: _MARK + k for k, table in enumerate(trainee.tables)}
    leaves = [
        struct((marked[i], *leaf.shape[1:]), leaf.dtype) if i in marked else leaf
        for i, leaf in enumerate(trainee.params)
    ]
    tree = trainee.unflatten(leaves)

    def update(grads: PyTree, state: PyTree, params: PyTree) -> PyTree:
        return tx.update(grads, state, params, **trainee.extra_args)

    traced = jax.make_jaxpr(update)(tree, jax.eval_shape(tx.init, tree), tree)
    return _names_rows(traced.jaxpr, frozenset(marked.values()))


def _names_rows(jaxpr: core.Jaxpr, rows: frozenset[int]) -> bool:
    return any(_picks_rows(eqn, rows) for eqn in jaxpr.eqns) or any(
        _names_rows(inner, rows) for inner in core.subjaxprs(jaxpr)
    )


def _picks_rows(eqn: core.JaxprEqn, rows: frozenset[int]) -> bool:
    """Whether an equation numbers rows, or takes some of them by number."""
    name, params = eqn.primitive.name, eqn.params
    if name == "iota":
        return bool(params["shape"]) and params["shape"][params["dimension"]] in rows
    taken, given = (_count_rows(atoms) for atoms in (eqn.invars[:2], eqn.outvars[:1]))
    if not taken or taken[0] not in rows:
        return False
    if name == "gather":
        return 0 in params["dimension_numbers"].start_index_map
    if name.startswith("scatter"):
        return 0 in params["dimension_numbers"].scatter_dims_to_operand_dims
    if name in ("slice", "dynamic_slice"):
        return given[0] != taken[0]
    return name == "dynamic_update_slice" and taken[1] != taken[0]


def _count_rows(atoms: Sequence[object]) -> list[int]:
    """The first size of each operand or result, 0 for scalars."""
    shapes = [getattr(getattr(atom, "aval", None), "shape", ()) for atom in atoms]
    return [shape[0] if shape else 0 for shape in shapes]
