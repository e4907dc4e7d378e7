"""Sparse add and slice against dictionary twins, dense arithmetic and derivatives."""

import functools
import math
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import MESHES
from hypothesis import strategies as st
from jax.experimental import sparse
from jax.test_util import check_grads
from sparse_harness import (
    DTYPES,
    FLAGGED,
    add_and_pull,
    assert_entries,
    bcoo,
    dense_of,
    entries,
    ramp,
    random_bcoo,
    random_pair,
    slice_values,
    stored,
    twin_add,
    twin_slice,
    vector,
    with_data,
)

import jaxaccum

KINDS = ["flagged", "sorted", "unique", "wild"]
SHAPES = [
    (),
    (5,),
    (3, 4),
    (0, 3),
    (2, 3, 2),
    (2, 1, 3, 2),
    (2, 2, 1, 2, 2),
    (1, 2, 2, 1, 2, 2),
    (70_000, 70_000),  # more cells than 32 bits count: two words
    (2**31 - 1, 2, 2**31 - 1),
]


def add_cases(shape, dtype, kinds, nses, seed, repeats=6):
    """Pairs of operands of one layout: one compilation serves all of them."""
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        a, b = (random_bcoo(rng, shape, n, dtype, k) for n, k in zip(nses, kinds, strict=True))
        if math.prod(shape) > 10**6 and a.nse and b.nse:  # so many cells never meet by chance
            shared = a.indices[: min(a.nse, b.nse)]
            b = sparse.BCOO((b.data[: len(shared)], shared), shape=shape)
        yield a, b


@hypothesis.given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "int8", "complex64"]),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    nses=st.sampled_from([(6, 5), (0, 5), (6, 0), (0, 0)]),
    thresh=st.sampled_from([0, -1.5, 1, 2.5, 3.0, np.float32(4), np.int8(2), float("inf")]),
    seed=st.integers(0, 2**20),
)
def test_add_equals_its_twin(shape, dtype, kinds, nses, thresh, seed):
    for a, b in add_cases(shape, dtype, kinds, nses, seed):
        total = jaxaccum.sparse_add(a, b, thresh)
        assert (total.shape, total.nse, total.dtype) == (a.shape, a.nse + b.nse, a.dtype)
        assert_entries(total, twin_add(a, b, thresh))


@hypothesis.given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "int8", "bool"]),
    kind=st.sampled_from(KINDS),
    nse=st.sampled_from([7, 0]),
    traced=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_slice_equals_its_twin(shape, dtype, kind, nse, traced, seed):
    rng = np.random.default_rng(seed)
    size = [int(rng.integers(0, min(d, 9) + 3)) for d in shape]
    if traced:
        size = [min(e, d) for e, d in zip(size, shape, strict=True)]
    cut = jax.jit(lambda x, start: jaxaccum.sparse_slice(x, start, size))
    for _ in range(6):
        x = random_bcoo(rng, shape, nse, dtype, kind)
        start = [int(rng.integers(-3, min(d, 9) + 2)) for d in shape]
        want, out_shape = twin_slice(x, start, size)
        if traced:
            part = cut(x, jnp.array(start, jnp.int32))
            assert part.shape == tuple(size)
        else:
            part = jaxaccum.sparse_slice(x, start, size)
            assert part.shape == out_shape
        assert part.dtype == x.dtype
        assert_entries(part, want)


@pytest.mark.parametrize(
    "dtype",
    [
        # The others stand in the golden vectors.
        pytest.param(d, marks=[] if d in ("complex64", "int8") else pytest.mark.full)
        for d in DTYPES
    ],
)
def test_every_dtype(dtype):
    for a, b in add_cases((3, 4), dtype, ("wild", "flagged"), (6, 5), seed=1):
        for thresh in (0, 3):
            assert_entries(jaxaccum.sparse_add(a, b, thresh), twin_add(a, b, thresh))
        part = jaxaccum.sparse_slice(a, [1, -1], [2, 4])
        assert_entries(part, twin_slice(a, [1, -1], [2, 4])[0])


@pytest.mark.parametrize(
    "kinds", [("wild", "sorted"), pytest.param(("flagged", "flagged"), marks=pytest.mark.full)]
)
def test_many_rows_use_directory_and_bit_counts(kinds):
    rng = np.random.default_rng(0)
    a, b = (random_bcoo(rng, (300, 300), 6000, "int32", kind) for kind in kinds)
    assert_entries(jaxaccum.sparse_add(a, b, 2), twin_add(a, b, 2))
    assert_entries(
        jaxaccum.sparse_slice(a, [50, -20], [200, 200]), twin_slice(a, [50, -20], [200, 200])[0]
    )
    # The raw gradients see a few thousand rows too.
    total = jaxaccum.sparse_add(a, b, 2)
    raw = jaxaccum.sparse_add_grad(jnp.arange(total.nse) + 1, a.indices, b.indices, total.indices)
    place = {tuple(row): i + 1 for i, row in reversed(list(enumerate(total.indices.tolist())))}
    for grad, mat in zip(raw, (a, b), strict=True):
        assert grad.tolist() == [place.get(tuple(row), 0) for row in mat.indices.tolist()]


def add_dense(a, b, thresh, x, y):
    return jaxaccum.sparse_add(with_data(a, x), with_data(b, y), thresh).todense()


def slice_dense(a, x, *, start=(1, -1), size=(2, 4)):
    return jaxaccum.sparse_slice(with_data(a, x), start, size).todense()


def dense_slice(a, x):
    """The same by padding and cutting a dense array: one column before, none wrapped."""
    return jnp.pad(dense_of(x, a), ((0, 0), (1, 0)))[1:3, :4]


def cubes(fn):
    return lambda *args: jnp.sum(ramp(1.0, fn(*args).size + 1) * fn(*args).ravel() ** 3)


def jacrev_twice(fn, argnums=0):
    return jax.jacrev(jax.jacrev(fn, argnums), argnums)


@pytest.mark.parametrize("order", [jax.hessian, pytest.param(jacrev_twice, marks=pytest.mark.full)])
def test_gradients_equal_those_of_the_dense_twins(order):
    a, b = random_pair("wild", "sorted")
    args = a.data, b.data
    ours = cubes(functools.partial(add_dense, a, b, 0))
    dense = cubes(lambda x, y: dense_of(x, a) + dense_of(y, b))
    both = [
        jax.jit(lambda *args, f=f: (jax.grad(f, (0, 1))(*args), order(f, argnums=(0, 1))(*args)))
        for f in (ours, dense)
    ]
    chex.assert_trees_all_equal(*(f(*args) for f in both))
    ours, dense = cubes(functools.partial(slice_dense, a)), cubes(functools.partial(dense_slice, a))
    both = [jax.jit(jax.vmap(lambda x, f=f: (jax.grad(f)(x), order(f)(x)))) for f in (ours, dense)]
    chex.assert_trees_all_equal(*(f(jnp.stack([a.data, 2 * a.data])) for f in both))


# Linear maps: differences over a whole unit are exact up to rounding.
EXACT = {"eps": 1.0, "atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.full)])
def test_raw_gradients_are_linear_in_either_mode(order):
    a, b = random_pair("sorted", "sorted")
    total = jaxaccum.sparse_add(a, b)
    ct = ramp(1.0, total.nse + 1)
    add_grad = lambda g: jaxaccum.sparse_add_grad(g, a.indices, b.indices, total.indices)  # noqa: E731
    slice_grad = lambda g: jaxaccum.sparse_slice_grad(g, [[4], [2], [7]], [1], [[1], [6]])  # noqa: E731
    for fn, g in ((add_grad, ct), (slice_grad, ct[:2])):
        check_grads(jax.jit(fn), (g,), modes=["fwd", "rev"], order=order, **EXACT)


@pytest.mark.full
def test_check_grads_to_second_order():
    a, b = random_pair("sorted", "sorted")
    add = jax.jit(functools.partial(add_dense, a, b, 0))
    check_grads(add, (a.data, b.data), modes=["rev"], order=2, **EXACT)
    cut = jax.jit(functools.partial(slice_dense, a))
    check_grads(cut, (a.data,), modes=["rev"], order=2, **EXACT)


@pytest.mark.full
def test_rules_give_what_the_raw_ops_give():
    rng = np.random.default_rng(14)
    a, b = (random_bcoo(rng, (3, 4), 9, "float32", "flagged") for _ in range(2))
    real = [m.indices[: len(entries(m))] for m in (a, b)]
    for thresh in (0, 4):
        total, (a_grad, b_grad) = add_and_pull(a, b, thresh, ramp(1.0, 19.0))
        kept = len(stored(total))
        raw = jaxaccum.sparse_add_grad(ramp(1.0, kept + 1), *real, total.indices[:kept])
        for grad, want in zip((a_grad, b_grad), raw, strict=True):
            np.testing.assert_array_equal(grad[: len(want)], want)
            assert not np.asarray(grad)[len(want) :].any(), "padding has no gradient"
    assert kept < len(entries(a).keys() | entries(b).keys()), "thresh has dropped something"
    cut = functools.partial(slice_values, a, [1, -1], [2, 3])
    (grad,) = jax.vjp(cut, a.data)[1](ramp(1.0, 10.0))
    part = jaxaccum.sparse_slice(a, [1, -1], [2, 3])
    kept = len(stored(part))
    # Padding (3, 4) moved by the start (1, -1) is the real row (2, 5) of a larger slice: the
    # rule must not take it for one.
    raw = jaxaccum.sparse_slice_grad(ramp(1.0, kept + 1), real[0], [1, -1], part.indices[:kept])
    np.testing.assert_array_equal(grad[: len(raw)], raw)
    assert not np.asarray(grad)[len(raw) :].any()


def test_padding_that_a_start_moves_onto_a_real_row_gets_no_gradient():
    # Padding (6) of the operand, counted from start 3, is the row 3 of the result's dense twin;
    # and the padding row (3) of the result, counted back, is the operand's padding.
    x = bcoo([[3], [5]], np.ones(2, np.float32), (6,), FLAGGED, 4)
    pull = jax.vjp(functools.partial(slice_values, x, [3], [9]), x.data)[1]
    np.testing.assert_array_equal(pull(ramp(1.0, 5.0))[0], [1, 2, 0, 0])


def test_forward_mode():
    a, b = random_pair("sorted", "sorted")
    dots = ramp(1.0, 8.0), ramp(2.0, 8.0)

    def add(x, y, x_dot, y_dot):
        ends = with_data(a, x), with_data(b, y)
        total, dot = jaxaccum.sparse_add_jvp(*ends, x_dot, y_dot, 2)
        return total.todense(), with_data(total, dot).todense()

    total, dot = jax.jit(add)(a.data, b.data, *dots)
    np.testing.assert_array_equal(total, add_dense(a, b, 2, a.data, b.data))
    _, pull = jax.vjp(functools.partial(add_dense, a, b, 2), a.data, b.data)
    weights = ramp(1.0, 13.0).reshape(3, 4)
    back = sum(jnp.vdot(g, d) for g, d in zip(pull(weights), dots, strict=True))
    assert jnp.vdot(weights, dot) == back, "forward and reverse are transposes"

    part, dot = jaxaccum.sparse_slice_jvp(a, dots[0], (1, -1), (2, 4))
    np.testing.assert_array_equal(part.todense(), dense_slice(a, a.data))
    _, want = jax.jvp(functools.partial(dense_slice, a), (a.data,), (dots[0],))
    np.testing.assert_array_equal(with_data(part, dot).todense(), want)
    check_grads(jax.jit(lambda d: add(a.data, b.data, d, dots[1])[1]), (dots[0],), order=1, **EXACT)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(functools.partial(slice_dense, a), (a.data,), (a.data,))
    with pytest.raises(ValueError, match=r"a_dot must have the shape \(7,\), got \(6,\)"):
        jaxaccum.sparse_add_jvp(a, b, dots[1], dots[1])
    with pytest.raises(TypeError, match="x_dot must have the dtype float32, got int32"):
        jaxaccum.sparse_slice_jvp(a, jnp.zeros(7, jnp.int32), (1, -1), (2, 4))


def test_values_of_other_dtypes_beside_a_differentiated_one():
    a, b = random_pair("sorted", "sorted", dtype="int32")

    def loss(x):
        total = jaxaccum.sparse_add(a, b).todense().sum()
        return x * total.astype(jnp.float32)

    assert jax.grad(loss)(1.0) == float(np.sum([*entries(a).values(), *entries(b).values()]))


@pytest.mark.full
def test_modes_agree():
    rng = np.random.default_rng(8)
    pairs = [[random_bcoo(rng, (3, 4), n, "float32", "wild") for n in (7, 6)] for _ in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)

    def step(a, b):
        return jaxaccum.sparse_slice(jaxaccum.sparse_add(a, b, 1.5), [1, 0], [2, 4])

    want = [step(*pair) for pair in pairs]
    jitted = jax.jit(chex.assert_max_traces(step, n=1))  # the second call compiles nothing
    chex.assert_trees_all_equal([jitted(*pair) for pair in pairs], want)
    # To vmap, a batch of BCOOs is one BCOO with a batch dimension.
    stacked = [sparse.BCOO((m.data, m.indices), shape=(3, *m.shape)) for m in batch]
    vmapped = jax.jit(jax.vmap(step))(*stacked)
    assert (vmapped.n_batch, vmapped.shape) == (1, (3, 2, 4))
    _, scanned = jax.lax.scan(lambda carry, pair: (carry, step(*pair)), 0, batch)
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.tree.leaves, want))
    chex.assert_trees_all_equal(jax.tree.leaves(vmapped), jax.tree.leaves(scanned), stack)


def test_raw_gradients_under_vmap():
    rng = np.random.default_rng(8)
    mats = [random_bcoo(rng, (3, 4), 7, "float32", "wild") for _ in range(6)]
    rows = np.stack([m.indices for m in mats]).reshape(2, 3, 7, 2)
    raw = jax.jit(functools.partial(jaxaccum.sparse_add_grad, ramp(7.0)))
    got = jax.jit(jax.vmap(raw))(rows[0], rows[1], rows[0])
    for i in range(3):
        want = raw(rows[0][i], rows[1][i], rows[0][i])
        chex.assert_trees_all_equal(tuple(g[i] for g in got), want)


def test_sums_accumulate_under_scan():
    parts = [vector([i, 5], [1, 2], 6, (False, False)) for i in range(4)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    zero = vector([6] * 6, [0] * 6)

    def add(total, part):
        return jaxaccum.sparse_add(total, part, nse=6), None

    total, _ = jax.lax.scan(add, zero, batch)
    assert stored(total) == {(0,): 1, (1,): 1, (2,): 1, (3,): 1, (5,): 8}


def test_sorted_operands_are_not_sorted_again():
    a = b = vector([0, 3], [1, 2])
    text = jax.jit(jaxaccum.sparse_add).lower(a, b).compile().as_text()
    assert not re.search(r"\bsort\(", text)
    text = jax.jit(jaxaccum.sparse_add).lower(a, vector([3, 0], [1, 2], 6, (False, False)))
    assert re.search(r"\bsort\(", text.compile().as_text()), "so the search finds sorts"
    cut = jax.jit(lambda x: jaxaccum.sparse_slice(x, [1], [3]))
    assert not re.search(r"\bsort\(", cut.lower(a).compile().as_text())


@pytest.mark.parametrize(
    ("is_sorted", "nse"),  # searched whole, and through a directory
    [
        (False, 5000),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [(True, 6), (False, 6), (True, 5000)]
        ),
    ],
)
@pytest.mark.full
def test_every_device_may_have_matrices_of_its_own(is_sorted, nse):
    """Under jax.shard_map with its check on, which tells what differs by device."""
    rng, num_devices, side = np.random.default_rng(nse), 8, 200
    cells = np.stack([rng.permutation(side * side)[:nse] for _ in range(num_devices)])
    cells = np.sort(cells) if is_sorted else cells
    rows = np.stack(np.divmod(cells, side), axis=-1).astype(np.int32)
    data = np.arange(1, num_devices * nse + 1, dtype=np.float32).reshape(num_devices, nse)

    def each(data, rows):
        x = sparse.BCOO((data[0], rows[0]), shape=(side, side))
        total, part = jaxaccum.sparse_add(x, x), jaxaccum.sparse_slice(x, [0, 50], [side, 100])
        grads = jaxaccum.sparse_add_grad(total.data, rows[0], rows[0], total.indices)
        cut = jaxaccum.sparse_slice_grad(part.data, rows[0], [0, 50], part.indices)
        return jax.tree.map(lambda leaf: leaf[None], (total.todense(), *grads, cut))

    spec = jax.sharding.PartitionSpec(("data",))
    program = jax.shard_map(each, mesh=MESHES["data"], in_specs=(spec, spec), out_specs=spec)
    total, of_a, of_b, cut = jax.jit(program)(data, rows)
    want = np.zeros((num_devices, side * side), np.float32)
    np.put_along_axis(want, cells, 2 * data, axis=1)
    np.testing.assert_array_equal(np.reshape(total, want.shape), want)
    for grad in (of_a, of_b):
        np.testing.assert_array_equal(grad, 2 * data)
    inside = (rows[..., 1] >= 50) & (rows[..., 1] < 150)
    np.testing.assert_array_equal(cut, np.where(inside, data, 0))
