"""Every rule against the arithmetic it stands for, with axes of size 1 wherever they can be.

A function's own derivative rule applies one operation to a cotangent made by scatters into zeros;
``jax.grad`` evaluates it densely. All numbers are small integers, so that sums are exact in any
order and the two must be equal bit by bit.
"""

import contextlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import RULES, SparseSum
from jax import lax
from trees import densified

from jaxaccum import IndexedSlices, value_and_sparse_grad

# Each shape with a partner of other sizes: what can break is a size of 1 beside one that is not.
SHAPES = [(3, 1), (1, 3, 1), (1, 1)]
MORE_SHAPES = [
    (3, 2),
    (1,),
    (3,),
    (1, 4),
    (4, 3),
    (3, 1, 2),
    (1, 1, 1),
    (1, 1, 2),
    (2, 1, 1),
    (2, 3, 4),
    (1, 2, 1, 3),
    (2, 1, 3, 1),
]
ZERO = np.zeros((), np.float32)
POOL = jnp.asarray(np.random.default_rng(0).integers(1, 9, 512), jnp.float32)


def numbers(shape, first=0):
    """Small integers of a shape, traced inside the derivative rule."""
    return POOL[first : first + math.prod(shape)].reshape(shape)


def rows(shape):
    """Rows at repeated ids, and one that is dropped."""
    ids = jnp.array([shape[0] - 1, 0, shape[0] - 1, shape[0]])
    return jnp.zeros(shape, jnp.float32).at[ids].add(numbers((4, *shape[1:])), mode="drop")


def entries(shape):
    """Entries of the first two axes, dropped where either is outside."""
    ids = jnp.array([0, shape[0] - 1, 0, shape[0], 0]), jnp.array([shape[1] - 1, 0, 0, 0, shape[1]])
    return jnp.zeros(shape, jnp.float32).at[ids].add(numbers((5, *shape[2:]), 100), mode="drop")


def last_axis(shape):
    """Slices of the last axis."""
    ids = jnp.array([0, shape[-1] - 1, 0])
    return (
        jnp.zeros(shape, jnp.float32).at[..., ids].add(numbers((*shape[:-1], 3), 200), mode="drop")
    )


def cotangents(shape):
    makers = [rows, entries, last_axis] if len(shape) > 1 else [rows]
    return [lambda maker=maker: maker(shape) for maker in makers]


def each(operation):
    """Cases that apply ``operation`` to every kind of cotangent of every shape."""

    def cases(shapes):
        return [lambda ct=ct: operation(ct()) for shape in shapes for ct in cotangents(shape)]

    return cases


def each_of(operations):
    """The same for several operations: ``operations(shape)`` lists them."""

    def cases(shapes):
        return [
            lambda ct=ct, operation=operation: operation(ct())
            for shape in shapes
            for operation in operations(shape)
            for ct in cotangents(shape)
        ]

    return cases


def factors(shape):
    """All shapes that broadcast to ``shape``."""
    sizes = itertools.product(*({1, size} for size in shape))
    return [(), *sorted(sizes)]


def products(shape):
    within = [lambda ct, s=s: ct * numbers(s, 300) for s in factors(shape)]
    wider = [lambda ct: lax.mul(ct, numbers((2, *shape[1:]), 300))] if shape[0] == 1 else []
    return [*within, *wider, lambda ct: lax.mul(numbers((1,) * ct.ndim, 300), ct)]


def quotients(shape):
    return [lambda ct, s=s: ct / 2 ** (numbers(s, 300) % 4) for s in factors(shape)]


def pads(shape):
    first = [(1, 0, 0), (0, 2, 0), (-1, 1, 0), (1, -1, 1), (2, 1, 2)]
    others = [(0, 0, 0), (1, 1, 0), (0, 0, 1), (0, 2, 0), (2, -1, 1)]
    return [
        lambda ct, a=a, b=b: lax.pad(ct, ZERO, [a, *[b] * (len(shape) - 1)])
        for a, b in zip(first, others, strict=True)
    ]


def slices(shape):
    return [
        lambda ct, axis=axis, first=first: lax.slice_in_dim(ct, first, shape[axis], axis=axis)
        for axis in range(len(shape))
        for first in range(min(2, shape[axis]))
    ]


def splits(shape):
    def operation(ct, axis):
        parts = lax.split(ct, [1, shape[axis] - 1], axis)
        return lax.concatenate([parts[1], parts[0] * 2], axis)

    return [
        lambda ct, axis=axis: operation(ct, axis) for axis in range(len(shape)) if shape[axis] > 1
    ]


def concatenations(shape):
    return [
        lambda ct, axis=axis: lax.concatenate([ct, ct * 2, jnp.zeros(shape, jnp.float32)], axis)
        for axis in range(len(shape))
    ]


def broadcasts(shape):
    ndim = len(shape)
    wide = tuple(3 if size == 1 else size for size in shape)
    return [
        lambda ct: lax.broadcast_in_dim(ct, shape, range(ndim)),
        lambda ct: lax.broadcast_in_dim(ct, wide, range(ndim)),
        lambda ct: lax.broadcast_in_dim(ct, (1, *shape), range(1, ndim + 1)),
        lambda ct: lax.broadcast_in_dim(ct, (*shape, 2), range(ndim)),
        lambda ct: lax.broadcast_in_dim(ct, (shape[0], 1, *shape[1:]), (0, *range(2, ndim + 1))),
    ]


def reshapes(shape):
    size = math.prod(shape)
    targets = {(size,), (1, size), (size, 1), (*shape, 1), (1, *shape), (1, 1, *shape, 1)}
    targets |= {(shape[0], size // shape[0]), (size // shape[-1], 1, shape[-1])}
    order = tuple(reversed(range(len(shape))))
    turned = [lambda ct: lax.reshape(ct, shape, dimensions=order)] if len(shape) > 1 else []
    # The rest of an axis cut off: coordinates in axes of size 1, and several that look alike.
    short = (1,) * min(2, len(shape)) + shape[2:]
    cut = [
        lambda ct, t=t: ct[tuple(slice(size) for size in short)].reshape(t)
        for t in ((1, *short), (1, *short, 1), short[:1] + short[2:] or (1,))
    ]
    return [*(lambda ct, t=t: ct.reshape(t) for t in sorted(targets - {shape})), *turned, *cut]


def squeezes(shape):
    ones = [axis for axis, size in enumerate(shape) if size == 1 and len(shape) > 1]
    all_but_one = ones[: len(shape) - 1]
    gone = {(axis,) for axis in ones} | ({tuple(all_but_one)} - {()})
    return [lambda ct, axes=axes: lax.squeeze(ct, axes) for axes in sorted(gone)]


def transpositions(shape):
    orders = itertools.islice(itertools.permutations(range(len(shape))), 6)
    return [lambda ct, order=order: lax.transpose(ct, order) for order in orders]


def sums(shape):
    axes = range(len(shape))
    gone = [g for k in range(1, len(shape)) for g in itertools.combinations(axes, k)]
    return [lambda ct, g=g: jnp.sum(ct, g) for g in gone]


def updates(shapes):
    def update(shape, start, size):
        window = numbers(size, 50)
        return lax.dynamic_update_slice(
            jnp.zeros(shape, jnp.float32), window, [jnp.int32(s) for s in start]
        )

    return [
        lambda shape=shape, start=start, size=size: update(shape, start, size)
        for shape in shapes
        for start in [(0,) * len(shape), (2,) * len(shape), (-1,) * len(shape)]
        for size in [(1, *shape[1:]), (min(2, shape[0]), *(1 for _ in shape[1:])), shape]
    ]


def scatters(shapes):
    modes = ["drop", "clip", "promise_in_bounds"]
    return [
        *each(lambda ct: ct)(shapes),
        *(
            lambda shape=shape, mode=mode: (
                jnp.zeros(shape, jnp.float32).at[jnp.array([0, shape[0] - 1])].add(
                    numbers((2, *shape[1:])), mode=mode
                )
            )
            for shape in shapes
            for mode in modes
        ),
    ]  # fmt: skip


def pieces(shape):
    """Rows that come of a dense array: what a slice of the table leaves behind."""
    return [lambda ct: lax.pad(ct * 1, ZERO, [(2, 1, 1), *[(0, 0, 0)] * (len(shape) - 1)])]


def over_devices(ct):
    return lax.psum(lax.pcast(ct, "d", to="varying"), "d")


def multiply_varying_zeros():
    """Sums of no slices that are needed as arrays, which then must be typed as varying too."""
    zeros = lax.pcast(jnp.zeros((3, 2), jnp.float32), "d", to="varying")
    return lax.psum(zeros * zeros, "d")


def constrained(ct):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return lax.with_sharding_constraint(ct, device)


def resharded(ct):
    """There and back, on an Explicit axis of one device: the rows of any size divide among it."""
    spec = jax.sharding.PartitionSpec("e")
    return jax.sharding.reshard(jax.sharding.reshard(ct, spec) * 2, jax.sharding.PartitionSpec())


CASES = {
    "scatter-add": scatters,
    "dynamic_update_slice": updates,
    "pad": lambda shapes: [*each_of(pads)(shapes), *each_of(pieces)(shapes)],
    "slice": each_of(slices),
    "split": each_of(splits),
    "concatenate": each_of(concatenations),
    "broadcast_in_dim": each_of(broadcasts),
    "add_any": each(lambda ct: jax.vjp(lambda x: (x, x), ct)[1]((ct, ct * 2))[0]),
    "mul": each_of(products),
    "div": each_of(quotients),
    "reshape": each_of(reshapes),
    "squeeze": each_of(squeezes),
    "transpose": each_of(transpositions),
    "reduce_sum": each_of(sums),
    "neg": each(lambda ct: -ct),
    "convert_element_type": each(lambda ct: (ct.astype(jnp.bfloat16) * 2).astype(jnp.float32)),
    "reduce_precision": each(lambda ct: lax.reduce_precision(ct, 8, 20)),
    "copy": each(lambda ct: jnp.array(ct, copy=True)),
    "sharding_constraint": each(constrained),
    "reshard": each(resharded),
    "optimization_barrier": each(lambda ct: lax.optimization_barrier((ct, POOL))[0]),
    "pvary": each(over_devices),
    "psum_invariant": lambda shapes: [*each(over_devices)(shapes), multiply_varying_zeros],
}
MAPPED = ("pvary", "psum_invariant")


def ruled(cotangent):
    """A function of a table whose gradient ``cotangent()`` makes, and a table for it."""
    shape = jax.eval_shape(cotangent)

    @jax.custom_vjp
    def function(table):
        return jnp.sum(table)

    function.defvjp(lambda table: (jnp.sum(table), None), lambda _, g: (cotangent(),))
    return function, jnp.zeros(shape.shape, shape.dtype)


def on_two_devices(run):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("d",), axis_types=auto, devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(run, mesh=mesh, in_specs=(), out_specs=spec)


def explicit_mesh():
    explicit = (jax.sharding.AxisType.Explicit,)
    return jax.set_mesh(jax.make_mesh((1,), ("e",), axis_types=explicit, devices=jax.devices()[:1]))


def differing(name, shapes):
    """The numbers of the cases in which the gradient is not that of ``jax.grad``."""
    cases = CASES[name](shapes)

    def run():
        pairs = []
        for case in cases:
            function, table = ruled(case)
            grad_fn = value_and_sparse_grad(function, tables=True, allow_dense=True)
            pairs.append((densified(grad_fn(table)[1]), jax.grad(function)(table)))
        return pairs

    wrapped = on_two_devices(run) if name in MAPPED else run
    fast = {"xla_backend_optimization_level": 0}
    with explicit_mesh() if name == "reshard" else contextlib.nullcontext():
        pairs = jax.jit(wrapped, compiler_options=fast)()
    return [i for i, pair in enumerate(pairs) if not np.array_equal(*map(np.asarray, pair))]


def test_there_are_cases_for_every_rule():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("name", CASES)
def test_rules_are_the_arithmetic_they_replace(name, monkeypatch):
    kept = []

    def recorded(*args):
        results = rule(*args)
        kept.extend(result for result in results if isinstance(result, SparseSum) and result.terms)
        return results

    rule = RULES[name]
    monkeypatch.setitem(RULES, name, recorded)
    assert differing(name, SHAPES) == []
    assert kept  # the rule was used, and kept slices


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_rules_of_more_shapes(name):
    assert differing(name, MORE_SHAPES) == []


def check_rule(cotangent, table, is_sparse):
    """The gradient that a rule makes, of which jax.grad knows what it is."""

    @jax.custom_vjp
    def function(table):
        return jnp.sum(table)

    function.defvjp(lambda table: (jnp.sum(table), None), lambda _, g: (cotangent(),))
    grad_fn = value_and_sparse_grad(function, tables=True, allow_dense=True)
    grad, expected = jax.jit(lambda t: (grad_fn(t)[1], jax.grad(function)(t)))(table)
    assert isinstance(grad, IndexedSlices) == is_sparse
    np.testing.assert_array_equal(densified(grad), expected)


HALVES = jnp.zeros((3, 2), jnp.float32).at[jnp.array([1, 1, 0])].add


@pytest.mark.parametrize(
    "cotangent",
    [
        lambda: HALVES(0.5).astype(jnp.int32).astype(jnp.float32),
        lambda: (HALVES(0.5) != 0).astype(jnp.float32),
        lambda: lax.div(jnp.zeros((3, 2), int).at[jnp.array([1, 1])].add(1), 2).astype("float32"),
    ],
    ids=["to integers", "to bools", "of integers"],
)
def test_integers_are_no_cotangents(cotangent):
    check_rule(cotangent, jnp.zeros((3, 2), jnp.float32), is_sparse=False)


def test_slices_may_also_be_what_is_written():
    def cotangent():
        part = jnp.zeros((1, 2), jnp.float32).at[jnp.array([0, 0])].add(1.5)
        written = lax.dynamic_update_slice(
            jnp.zeros((3, 2), jnp.float32), part, (jnp.int32(1), jnp.int32(0))
        )
        padded = lax.pad(part, ZERO, [(2, 0, 0), (0, 0, 0)])
        return jax.vjp(lambda x: (x, x), padded)[1]((padded, written))[0]

    check_rule(cotangent, jnp.zeros((3, 2), jnp.float32), is_sparse=True)
