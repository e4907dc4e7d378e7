"""Small gradients wait in host memory for others: nobody may be able to tell."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import takers

import jaxaccum
from jaxaccum._coordinator.staging import Stage

FUTURE = 1 << 40


def state_of(acc):
    return acc.accumulator_ref._accumulated


def num_staged(acc):
    stage = state_of(acc)._stage
    return 0 if stage is None else stage.num_staged


def patched(acc, monkeypatch, wrap):
    """Puts ``wrap(program)`` in place of the program that adds what is staged."""
    state = state_of(acc)
    wrapped = wrap(state._programs.apply_staged)
    monkeypatch.setattr(state, "_programs", state._programs._replace(apply_staged=wrapped))


def assert_same(acc, expected):
    """What is accumulated, bit for bit."""
    saved = acc.state_dict()
    rows, order = sorted(expected.sums), np.argsort(saved["indices"])
    assert saved["indices"][order].tolist() == rows
    assert saved["counts"][order].tolist() == [expected.touched[row] for row in rows]
    assert saved["values"][order].tobytes() == b"".join(expected.sums[r].tobytes() for r in rows)
    assert saved["num_accumulated"] == acc.num_accumulated() == expected.num_accumulated


# Adding many is adding one by one.

SIZES = [0, 1, 5, 31, 32, 33, 64]


@pytest.mark.parametrize("rows", [100, pytest.param(None, marks=pytest.mark.full)])
def test_any_mixture_adds_up_bit_for_bit(rows):
    """Sizes that alternate, gradients on the device, invalid ones, growth, saving and taking."""
    rng = np.random.default_rng(0)
    acc = takers.accumulator(dtype="float32", shape=(rows, 3), capacity=64)
    expected = oracle.Oracle(rows, 10**9, "sum")

    def gradient():
        n = int(rng.choice(SIZES))
        return rng.integers(0, 100, n), rng.standard_normal((n, 3), np.float32)

    def host(ids, values):
        acc.apply_grad(ids, values, local_step=FUTURE)
        expected.apply(ids, values)

    def device(ids, values):
        host(jnp.asarray(ids, jnp.int32), jnp.asarray(values))

    def invalid(ids, values):
        ids, values = np.append(ids, -1), np.append(values, np.zeros((1, 3), np.float32), 0)
        with pytest.raises(jaxaccum.InvalidArgumentError, match="negative"):
            acc.apply_grad(ids, values, local_step=FUTURE)

    def take(*_):
        host(*gradient())
        grad, (indices, sums) = acc.take_grad(1), expected.take()
        assert np.asarray(grad.indices).tolist() == indices
        assert np.asarray(grad.values).tobytes() == b"".join(v.tobytes() for v in sums)

    def compare(*_):
        assert_same(acc, expected)

    def reload(*_):
        acc.load_state_dict(acc.state_dict())

    seen = set()
    for _ in range(400):
        play = rng.choice(
            [host, device, invalid, take, compare, reload], p=[0.8, 0.06, 0.06, 0.02, 0.03, 0.03]
        )
        seen.add((play, num_staged(acc) > 1))
        play(*gradient())
    compare()
    assert len(seen) == 12  # each of these with much and with little staged


def test_all_there_is_to_ask_sees_what_is_staged():
    acc = takers.accumulator()
    for k in range(3):
        acc.apply_grad([k, 7], [1, 1])
    assert num_staged(acc) == acc.num_accumulated() == 3
    assert acc.statistics()["rows"] == 4
    assert num_staged(acc) == 0
    acc.apply_grad([9], [5])
    assert acc.state_dict()["indices"].tolist() == [0, 7, 1, 2, 9]
    acc.apply_grad([10], [5])
    assert acc.take_grad(5).values.tolist() == [1, 1, 1, 3, 5, 5]


def test_loading_replaces_what_is_staged():
    acc = takers.accumulator()
    acc.apply_grad([1], [1])
    saved = acc.state_dict()
    acc.apply_grad([2], [2])
    acc.load_state_dict(saved)
    acc.apply_grad([3], [3])
    assert acc.take_grad(2).indices.tolist() == [1, 3]


def test_rows_of_another_shape_after_a_take_get_a_stage_of_their_own():
    acc = takers.accumulator(shape=(16, None))
    for step, columns in enumerate((3, 2, 3)):
        acc.apply_grad([step], np.full((1, columns), step, np.int32), local_step=step)
        assert acc.take_grad(1).values.tolist() == [[step] * columns]


# One dispatch for many; what has been dispatched is not touched again.


def test_many_small_gradients_are_few_dispatches(monkeypatch):
    acc = takers.accumulator()
    acc.apply_grad([0], [1])
    counts = []
    patched(acc, monkeypatch, lambda apply: lambda *a: counts.append(int(a[2])) or apply(*a))
    for _ in range(99):
        acc.apply_grad([0], [1])
    assert acc.take_grad(1).values.tolist() == [100]
    assert counts == [32, 32, 32, 4]


def test_what_was_dispatched_is_never_written_again(monkeypatch):
    """On a CPU XLA reads it in place, whenever it gets round to it."""
    acc = takers.accumulator(dtype="float32", shape=(16, 8))
    acc.apply_grad([0], np.ones((1, 8), np.float32))
    given = []

    def watched(apply):
        def record(leaves, staged, count):
            (indices,), (values,), _, _ = staged
            given.append((indices, values, indices.copy(), values.copy()))
            return apply(leaves, staged, count)

        return record

    patched(acc, monkeypatch, watched)
    rng = np.random.default_rng(0)
    for k in range(200):
        values = rng.standard_normal((32, 8), np.float32)
        acc.apply_grad(rng.integers(0, 16, 32), values, local_step=FUTURE)
        if k % 40 == 39:  # sends a stage that is not full
            acc.take_grad(1)
    assert len(given) == 10
    for indices, values, old_indices, old_values in given:
        assert indices.tobytes() == old_indices.tobytes()
        assert values.tobytes() == old_values.tobytes()


def test_a_caller_may_overwrite_a_small_gradient_at_once():
    acc = takers.accumulator(dtype="float32", shape=(16, 8))
    indices, values = np.arange(16), np.ones((16, 8), np.float32)
    for _ in range(40):
        indices[:], values[:] = np.arange(16), 1
        acc.apply_grad(indices, values)
        indices[:], values[:] = 3, 7
    np.testing.assert_array_equal(acc.take_grad(40).values, np.full((16, 8), 40, np.float32))


def test_memory_is_bounded_by_the_gradient():
    """Deep for small gradients, shallow for larger ones, none for large ones."""
    acc = takers.accumulator(dtype="float32", shape=None)
    read = state_of(acc).read
    for n, columns, depth in ((32, 16, 32), (32, 256, 7), (64, 250, 4)):
        gradient = read(np.arange(n), np.ones((n, columns), np.float32), None)
        stage = Stage(gradient, acc.accumulator_ref.spec)
        (indices,), (values,) = stage.indices, stage.values
        assert stage.depth == depth
        assert values.nbytes <= 1 << 18
        assert values.ctypes.data % 64 == indices.ctypes.data % 64 == 0
    for n, columns, is_small in ((64, 250, True), (64, 256, False), (65, 100, True)):
        gradient = read(np.arange(n), np.ones((n, columns), np.float32), None)
        assert gradient.is_small is is_small


# What fails.


def test_a_dispatch_that_fails_keeps_what_is_staged(monkeypatch):
    acc = takers.accumulator()
    acc.apply_grad([0], [1])
    depth, broken = state_of(acc)._stage.depth, [True]

    def flaky(apply):
        def call(*arguments):
            if broken:
                raise MemoryError
            return apply(*arguments)

        return call

    patched(acc, monkeypatch, flaky)
    for _ in range(depth - 1):
        acc.apply_grad([0], [1])
    with pytest.raises(MemoryError):
        acc.apply_grad([1], [1])  # one too many for the stage: refused
    assert acc.num_accumulated() == num_staged(acc) == depth
    for call in (acc.statistics, acc.state_dict, lambda: acc.take_grad(1)):
        with pytest.raises(MemoryError):
            call()
        assert acc.num_accumulated() == num_staged(acc) == depth
    with pytest.raises(MemoryError):
        acc.apply_grad(np.arange(32) % 16, jnp.ones(32, jnp.int32))  # not to be staged
    assert acc.num_accumulated() == num_staged(acc) == depth
    broken.clear()
    acc.apply_grad([1], [2])
    stats = acc.statistics()
    assert (stats["accepted"], stats["taken"], stats["global_step"]) == (depth + 1, 0, 0)
    grad = acc.take_grad(depth + 1)
    assert (grad.indices.tolist(), grad.values.tolist()) == ([0, 1], [depth, 2])


def test_a_copy_cut_short_leaves_no_trace(monkeypatch):
    """Ctrl-C between the copy and the count: the next gradient takes its place."""
    acc = takers.accumulator(capacity=16)
    acc.apply_grad([0], [1])
    write = Stage.write

    def cut(stage, indices, values):
        write(stage, indices, values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            acc.apply_grad([3, 4, 5], [9, 9, 9])
    acc.apply_grad([6], [2])
    assert acc.num_accumulated() == 2
    grad = acc.take_grad(2)
    assert (grad.indices.tolist(), grad.values.tolist()) == ([0, 6], [1, 2])


def test_tracing_is_noticed_before_anything_is_staged():
    acc = takers.accumulator()
    acc.apply_grad([1], [1])
    seen = []

    @jax.jit
    def step(x):
        for call in (lambda: acc.apply_grad([2], [2]), lambda: acc.take_grad(1), acc.state_dict):
            with pytest.raises(RuntimeError, match="outside jit"):
                call()
            seen.append(num_staged(acc))
        return x

    step(1.0)
    assert seen == [1, 1, 1]
    assert acc.take_grad(1).values.tolist() == [1]
    # Transforms without a trace of their own around it do not matter.
    jax.vmap(lambda x: acc.apply_grad([2], [2], local_step=1) and x)(jnp.ones(2))
    assert acc.take_grad(1).values.tolist() == [2]
