"""Every public path as a program to compile: a function, its arguments, and what it owns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import sparse
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxaccum

AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Size:
    """``ids`` a step of a table ``[rows, columns]``, accumulated in ``capacity`` slots."""

    rows: int = 1_000_000
    columns: int = 64
    ids: int = 512
    capacity: int = 8192
    dtype: Any = jnp.float32
    known: bool = True

    @property
    def shape(self) -> tuple[int | None, int]:
        return (self.rows if self.known else None, self.columns)

    @property
    def gradient(self) -> jaxaccum.IndexedSlices:
        indices = jax.ShapeDtypeStruct((self.ids,), jnp.int32)
        values = jax.ShapeDtypeStruct((self.ids, self.columns), self.dtype)
        return jaxaccum.IndexedSlices(indices, values, self.shape)

    @property
    def state(self) -> jaxaccum.AccumulatorState:
        return jax.eval_shape(lambda: jaxaccum.init(self.shape, self.dtype, capacity=self.capacity))

    @property
    def table(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.rows, self.columns), self.dtype)

    @property
    def row_bytes(self) -> int:
        return self.columns * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, the shapes of its arguments, and those of them that are donated.

    Attributes:
      must_move: bytes of rows, ids and counters that no implementation could do without.
    """

    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    must_move: int = 0


def apply(size: Size) -> Program:
    # The gradient in; sums, counts and ids of its rows in and out.
    moved = size.ids * (size.row_bytes * 3 + 4 * 6)
    return Program(jaxaccum.apply, (size.state, size.gradient), (0,), moved)


def take(size: Size) -> Program:
    def two(state: Any) -> Any:
        state, grad, ready = jaxaccum.take(state)
        return state, (grad, ready)

    return Program(two, (size.state,), (0,), size.capacity * (size.row_bytes * 2 + 4 * 4))


def merge(size: Size) -> Program:
    moved = size.capacity * (size.row_bytes * 3 + 4 * 6)
    return Program(jaxaccum.merge, (size.state, size.state), (0,), moved)


def sum_duplicates(size: Size) -> Program:
    return Program(
        jaxaccum.sum_duplicates, (size.gradient,), (), size.ids * (size.row_bytes * 2 + 8)
    )


def _loss(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(table[ids].astype(jnp.float32)))


_grad = jaxaccum.value_and_sparse_grad(_loss, tables=True)


def value_and_sparse_grad(size: Size) -> Program:
    ids = jax.ShapeDtypeStruct((size.ids,), jnp.int32)
    return Program(_grad, (size.table, ids), (), size.ids * (size.row_bytes * 2 + 8))


def training_step(tx: Any, size: Size, floats_of_state: int) -> Program:
    def step(table: jax.Array, state: Any, ids: jax.Array) -> Any:
        value, grads = _grad(table, ids)
        updates, state = tx.update(grads, state, table)
        return jaxaccum.apply_updates(table, updates), state, value

    ids = jax.ShapeDtypeStruct((size.ids,), jnp.int32)
    state = jax.eval_shape(tx.init, size.table)
    moved = size.ids * (2 * size.row_bytes + 2 * 4 * floats_of_state + 4)
    return Program(step, (size.table, state, ids), (0, 1), moved)


def bags_by_hand(size: Size) -> Program:
    """A step of SGD on bags of 20 ids, whose slices are alike: nobody need write them down."""

    def loss(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jaxaccum.embedding_bag(table, ids).astype(jnp.float32)))

    def step(table: jax.Array, ids: jax.Array) -> Any:
        value, rows = jaxaccum.value_and_sparse_grad(loss, tables=True)(table, ids)
        return table + (-0.1) * rows, value

    ids = jax.ShapeDtypeStruct((size.ids, 20), jnp.int32)
    return Program(step, (size.table, ids), (0,), size.ids * 20 * (2 * size.row_bytes + 4))


def _accumulated(tx: Any, size: Size) -> Any:
    return jaxaccum.accumulate(tx, 4, tables=True, capacity=size.capacity)


def lazy_adam(size: Size) -> Program:
    return training_step(jaxaccum.lazy_rows(optax.adam(1e-3)), size, 2 * size.columns)


def accumulated_adam(size: Size) -> Program:
    tx = _accumulated(jaxaccum.lazy_rows(optax.adam(1e-3)), size)
    program = training_step(tx, size, 2 * size.columns)
    # Of each row taken: its sums in; the table's and both moments' rows in and out.
    moved = size.capacity * 7 * size.row_bytes + apply(size).must_move
    return dataclasses.replace(program, must_move=moved)


def rowwise_adagrad(size: Size) -> Program:
    tx = jaxaccum.lazy_rows(jaxaccum.rowwise_adagrad(0.1, stochastic_rounding=True))
    return training_step(tx, size, 1)


def accumulated_adagrad(size: Size) -> Program:
    tx = jaxaccum.rowwise_adagrad(0.1, stochastic_rounding=True)
    program = training_step(_accumulated(jaxaccum.lazy_rows(tx), size), size, 1)
    moved = size.capacity * 3 * size.row_bytes + apply(size).must_move
    return dataclasses.replace(program, must_move=moved)


def _matrix(size: Size) -> sparse.BCOO:
    indices = jax.ShapeDtypeStruct((size.ids, 2), jnp.int32)
    return jax.eval_shape(
        lambda v, i: sparse.BCOO((v, i), shape=(10_000, 10_000)),
        jax.ShapeDtypeStruct((size.ids,), size.dtype),
        indices,
    )


def sparse_add(size: Size) -> Program:
    matrix = _matrix(size)
    return Program(jaxaccum.sparse_add, (matrix, matrix), (), size.ids * 4 * 12)


def sparse_slice(size: Size) -> Program:
    cut = functools.partial(jaxaccum.sparse_slice, start=(2500, 2500), size=(5000, 5000))
    return Program(cut, (_matrix(size),), (), size.ids * 2 * 12)


def sparse_add_grad(size: Size) -> Program:
    def ints(n: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, 2), jnp.int32)

    grad = jax.ShapeDtypeStruct((2 * size.ids,), size.dtype)
    shapes = (grad, ints(size.ids), ints(size.ids), ints(2 * size.ids))
    return Program(jaxaccum.sparse_add_grad, shapes, (), size.ids * 2 * 24)


ONE_DEVICE: dict[str, Callable[[Size], Program]] = {
    "apply": apply,
    "take": take,
    "merge": merge,
    "sum_duplicates": sum_duplicates,
    "value_and_sparse_grad": value_and_sparse_grad,
    "bags_by_hand": bags_by_hand,
    "lazy_adam": lazy_adam,
    "accumulated_adam": accumulated_adam,
    "rowwise_adagrad": rowwise_adagrad,
    "accumulated_adagrad": accumulated_adagrad,
    "sparse_add": sparse_add,
    "sparse_slice": sparse_slice,
    "sparse_add_grad": sparse_add_grad,
}


@dataclasses.dataclass(frozen=True)
class Spread:
    """A program of several devices: each argument has a leading axis of them."""

    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    donate: tuple[int, ...] = ()

    def on(self, mesh: Mesh) -> tuple[Callable[..., Any], Any, Any]:
        """The function over a mesh, its arguments' shapes, and where they lie."""
        spec = PartitionSpec(AXIS)

        def one_device(*args: Any) -> Any:
            results = self.function(*jax.tree.map(lambda leaf: leaf[0], args))
            return jax.tree.map(lambda leaf: leaf[None], results)

        function = jax.shard_map(one_device, mesh=mesh, in_specs=spec, out_specs=spec)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype), self.shapes
        )
        return function, shapes, jax.tree.map(lambda _: NamedSharding(mesh, spec), shapes)


def all_merge(size: Size, exchange: str) -> Spread:
    function = functools.partial(jaxaccum.all_merge, axis_name=AXIS, exchange=exchange)
    return Spread(function, (size.state,), (0,))


def all_take(size: Size) -> Spread:
    return Spread(functools.partial(jaxaccum.all_take, axis_name=AXIS), (size.state,), (0,))


def all_apply(size: Size) -> Spread:
    whole = dataclasses.replace(size, rows=4 * size.rows).gradient
    function = functools.partial(jaxaccum.all_apply, axis_name=AXIS)
    return Spread(function, (size.state, whole), (0,))


def all_lookup(size: Size) -> Spread:
    ids = jax.ShapeDtypeStruct((size.ids,), jnp.int32)
    return Spread(functools.partial(jaxaccum.all_lookup, axis_name=AXIS), (size.table, ids))


FOUR_DEVICES: dict[str, Callable[[Size], Spread]] = {
    "all_merge_rows": functools.partial(all_merge, exchange="rows"),
    "all_merge_dense": functools.partial(all_merge, exchange="dense"),
    "all_take": all_take,
    "all_apply": all_apply,
    "all_lookup": all_lookup,
}
