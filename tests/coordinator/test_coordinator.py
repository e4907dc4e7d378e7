"""`SparseConditionalAccumulator`: inputs, errors, capacity, sharing, saving."""

import asyncio
import copy
import gc
import logging
import pickle
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import takers

import jaxaccum
from jaxaccum._coordinator import host_gradient, placement, registry


def snapshot(acc):
    """Everything a failed call must leave alone."""
    stats = acc.statistics()
    stats.pop("invalid")
    return stats, {name: array.tolist() for name, array in acc.state_dict().items()}


def rows_of(grad):
    return dict(
        zip(np.asarray(grad.indices).tolist(), np.asarray(grad.values).tolist(), strict=True)
    )


# What gradients may be given as.


def slices(**fields):
    return types.SimpleNamespace(**fields)


IDS, ROWS = [3, 1, 3], [[1, 2], [3, 4], [5, 6]]
FORMS = {
    "lists": (IDS, ROWS),
    "tuples": (tuple(IDS), tuple(map(tuple, ROWS))),
    "numpy": (np.array(IDS), np.array(ROWS, np.int32)),
    "int8 ids": (np.array(IDS, np.int8), np.array(ROWS, np.int32)),
    "uint64 ids": (np.array(IDS, np.uint64), np.array(ROWS, np.int32)),
    "whole floats": (np.array(IDS, np.float64), np.array(ROWS, np.int32)),
    "strided": (np.repeat(IDS, 2)[::2], np.array(ROWS, np.int32).T.copy().T),
    "jax": (jnp.array(IDS), jnp.array(ROWS, jnp.int32)),
    "jax elsewhere": tuple(
        jax.device_put(np.array(x, np.int32), jax.devices()[-1]) for x in (IDS, ROWS)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_every_form_mean_the_same(form):
    indices, values = FORMS[form]
    acc = takers.accumulator(shape=(16, 2))
    assert acc.apply_grad(indices, values, [16, 2]) is True
    assert acc.apply_indexed_slices_grad(slices(indices=indices, values=values, dense_shape=None))
    grad = acc.take_grad(2)
    assert rows_of(grad) == {1: [6, 8], 3: [12, 16]}
    assert grad.indices.dtype == jnp.int32
    assert grad.shape.tolist() == [16, 2]
    assert grad.shape.dtype == np.int64


def test_caller_may_overwrite_what_it_gave():
    """XLA reads aligned NumPy arguments in place, long after the call."""
    acc = jaxaccum.SparseConditionalAccumulator("float32", (4096, 64), capacity=4096)
    memory = np.empty(4096 * 64 * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    values = memory[start : start + 4096 * 64 * 4].view(np.float32).reshape(4096, 64)
    indices = np.arange(4096, dtype=np.int32)
    for _ in range(8):
        values[:], indices[:] = 1, np.arange(4096)
        acc.apply_grad(indices, values)
        values[:], indices[:] = 7, 0
    grad = acc.take_grad(8)
    np.testing.assert_array_equal(grad.values, np.ones((4096, 64), np.float32))


@pytest.mark.parametrize(
    ("acc_rows", "grad_rows"), [(16, 16), (16, None), (None, 16), (None, None)]
)
def test_padding_of_our_slices_is_their_own(acc_rows, grad_rows):
    padding = 2**31 - 1 if grad_rows is None else grad_rows
    grad = jaxaccum.IndexedSlices(
        np.array([padding, 5, padding]), np.array([[7], [1], [9]], np.int32), (grad_rows, 1)
    )
    acc = takers.accumulator(shape=(acc_rows, 1))
    acc.apply_indexed_slices_grad(grad)
    taken = acc.take_indexed_slices_grad(1)
    assert rows_of(taken) == {5: [1]}
    assert taken.dense_shape == (acc_rows, 1)
    with pytest.raises(jaxaccum.InvalidArgumentError, match=r"exceeded|below"):
        acc.apply_grad([2**31 - 1 if acc_rows is None else acc_rows], [[1]], local_step=1)


def test_slices_of_another_shape_are_refused():
    acc = takers.accumulator(shape=(None, 2))
    grad = jaxaccum.IndexedSlices(np.array([17]), np.ones((1, 2), np.int32), (16, 2))
    with pytest.raises(jaxaccum.InvalidArgumentError, match="index is 17 exceeded 16"):
        acc.apply_indexed_slices_grad(grad)
    grad = jaxaccum.IndexedSlices(np.array([1]), np.ones((1, 3), np.int32), (None, 3))
    with pytest.raises(jaxaccum.InvalidArgumentError, match="expected shape dim 1 to be 2, got 3"):
        acc.apply_indexed_slices_grad(grad)
    with pytest.raises(AttributeError, match="indices"):
        acc.apply_indexed_slices_grad(np.ones(3))


# Bad input: nothing changes, nobody is woken.

ONE = np.ones((1, 2), np.int32)
BAD = {
    "negative": ({"grad_indices": [-1], "grad_values": ONE}, "index of slice 0 is negative.* -1$"),
    "negative int8": ({"grad_indices": np.array([-1], np.int8), "grad_values": ONE}, "negative"),
    "row count": ({"grad_indices": [16], "grad_values": ONE}, "index is 16 exceeded 16"),
    "no int32": ({"grad_indices": [2**32], "grad_values": ONE}, "index is 4294967296 exceeded 16"),
    "fraction": ({"grad_indices": [1.5], "grad_values": ONE}, "whole numbers, got 1.5"),
    "nan": ({"grad_indices": [float("nan")], "grad_values": ONE}, "whole numbers, got nan"),
    "text": ({"grad_indices": ["a"], "grad_values": ONE}, "integers"),
    "float64": ({"grad_indices": [1], "grad_values": np.ones((1, 2))}, "int32 .*got float64"),
    "jax dtype": ({"grad_indices": [1], "grad_values": jnp.ones((1, 2))}, "int32 .*got float"),
    "list of floats": ({"grad_indices": [1], "grad_values": [[1.5, 2.0]]}, "int32 .*got float64"),
    "list too large": ({"grad_indices": [1], "grad_values": [[2**31, 0]]}, "must fit int32"),
    "masked values": (
        {"grad_indices": [1], "grad_values": np.ma.masked_array(ONE, [[True, False]])},
        "grad_values must not be a masked array",
    ),
    "masked indices": (
        {"grad_indices": np.ma.masked_array([1], [True]), "grad_values": ONE},
        "grad_indices must not be a masked array",
    ),
    "scalar values": ({"grad_indices": [1], "grad_values": 1}, "Values cannot be 0-dimensional."),
    "indices rank": ({"grad_indices": [[1]], "grad_values": ONE}, r"received shape: \[1,1\]$"),
    "number": ({"grad_indices": [1, 2], "grad_values": ONE}, "Expected 2 .* got 1"),
    "shape rank": (
        {"grad_indices": [1], "grad_values": ONE, "grad_shape": [16]},
        "least 2, got 1",
    ),
    "shape": (
        {"grad_indices": [1], "grad_values": ONE, "grad_shape": [16, 3]},
        "dim 1 to be 2, got 3",
    ),
    "values rank": (
        {"grad_indices": [1], "grad_values": ONE[0, :1]},
        "values rank 2, got 1",
    ),
    "values": ({"grad_indices": [1], "grad_values": ONE[:, :1]}, "values dim 1 to be 2, got 1"),
    "step": ({"grad_indices": [1], "grad_values": ONE, "local_step": [0]}, r"scalar.*shape \[1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_gradients_change_nothing(case, monkeypatch):
    arguments, message = BAD[case]
    acc = takers.accumulator(shape=(16, 2))
    acc.apply_grad([1, 2], [[1, 2], [3, 4]])
    taker = takers.Watch(monkeypatch).take(acc, 3)
    before = snapshot(acc)
    with pytest.raises(jaxaccum.InvalidArgumentError, match=message):
        acc.apply_grad(**arguments)
    assert snapshot(acc) == before
    assert takers.waiting(acc) == [taker.waiter]
    assert acc.apply_grad(**(arguments | {"local_step": -1})) is False  # stale: not looked at
    acc.apply_grad([1], [[1, 1]])
    acc.apply_grad([1], [[1, 1]])
    assert rows_of(taker.result()) == {1: [3, 4], 2: [3, 4]}


@pytest.mark.parametrize(
    ("num_required", "error", "message"),
    [
        (0, jaxaccum.InvalidArgumentError, "must be positive, but was 0"),
        (2**31, jaxaccum.InvalidArgumentError, "fit int32"),
        ([1, 1], jaxaccum.InvalidArgumentError, r"must be scalar, but had bad shape \[2\]"),
        (1.5, TypeError, "integer"),
        (None, ValueError, "None values not supported"),
    ],
)
def test_bad_num_required_is_refused_at_once(num_required, error, message):
    acc = takers.accumulator()
    acc.apply_grad([1], [1])
    with pytest.raises(error, match=message):
        acc.take_grad(num_required)
    assert acc.statistics()["waiting"] == 0
    assert acc.num_accumulated() == 1


def test_ids_of_64_bits_are_refused_where_the_vocabulary_is_unknown():
    acc = takers.accumulator(shape=None)
    acc.apply_grad([2**31 - 2], [[1]])
    for index in (2**31 - 1, 2**40):
        with pytest.raises(jaxaccum.InvalidArgumentError, match=f"got {index} at position 1"):
            acc.apply_grad([0, index], [[1], [1]])
    assert rows_of(acc.take_grad(1)) == {2**31 - 2: [1]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": None}, TypeError, "Expected DataType for argument 'dtype' not None"),
        ({"dtype": bool}, TypeError, "numeric"),
        ({"dtype": "qint8"}, TypeError, "quantized"),
        ({"shape": (-1, 2)}, ValueError, "Dimension -1 must be >= 0"),
        ({"reduction_type": "mean"}, ValueError, '\'mean\' not in: "MEAN", "SUM"'),
        ({"capacity": 0}, ValueError, "capacity"),
        ({"device": "cpu"}, TypeError, "device must be a device"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        takers.accumulator(**arguments)


def test_64_bit_dtypes_need_x64():
    with jax.enable_x64(False), pytest.raises(TypeError, match="jax_enable_x64"):
        takers.accumulator(dtype="float64")


# Reductions, dtypes, steps.


@pytest.mark.parametrize(
    ("reduction_type", "expected"),
    [("MEAN", {0: 2.0, 1: 4.0}), (None, {0: 2.0, 1: 4.0}), ("SUM", {0: 4.0, 1: 4.0}),
     ("MEAN_PER_GRADIENT", {0: 2.0, 1: 2.0})],
)  # fmt: skip
def test_reductions(reduction_type, expected):
    acc = takers.accumulator(dtype="float32", reduction_type=reduction_type)
    acc.apply_grad([0, 1], [1.0, 4.0])
    acc.apply_grad([0], [3.0])
    assert rows_of(acc.take_grad(2)) == expected


def test_sums_of_16_bit_floats_are_wider_unless_told_otherwise():
    for accumulator_dtype, expected in ((None, 2050), (jnp.float16, 2048)):
        acc = takers.accumulator(dtype=jnp.float16, accumulator_dtype=accumulator_dtype)
        for value in (2048, 1, 1):
            acc.apply_grad([0], [value])
        assert rows_of(acc.take_grad(3)) == {0: expected}


def test_open_dimensions_are_fixed_until_the_take():
    acc = takers.accumulator(shape=(16, None))
    acc.apply_grad([1], np.ones((1, 3), np.int32))
    with pytest.raises(jaxaccum.InvalidArgumentError, match="dim 1 to be 3, got 2"):
        acc.apply_grad([1], np.ones((1, 2), np.int32))
    assert acc.take_grad(1).shape.tolist() == [16, 3]
    acc.apply_grad([1], np.ones((1, 2), np.int32), local_step=1)
    assert acc.take_grad(1).shape.tolist() == [16, 2]


def test_empty_gradients_count_and_fix_the_row():
    acc = takers.accumulator(shape=(16, None))
    acc.apply_grad([], np.zeros((0, 3), np.int32))
    with pytest.raises(jaxaccum.InvalidArgumentError, match="dim 1 to be 3, got 2"):
        acc.apply_grad([1], np.ones((1, 2), np.int32))
    grad = acc.take_grad(1)
    assert grad.indices.shape == (0,)
    assert grad.values.shape == (0, 3)


def test_a_lower_step_is_logged_and_set(caplog):
    acc = takers.accumulator()
    acc.set_global_step(5)
    acc.set_global_step(5)
    assert not caplog.records
    acc.set_global_step(np.int64(2))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "Attempt to set current_global_step_ to smaller value: "
        "current_global_step_ = 5 >= 2 = new_global_step."
    )
    assert acc.apply_grad([0], [1], local_step=2)
    assert not acc.apply_grad([0], [1], local_step=1)
    assert acc.statistics()["stale"] == 1


# Capacity.


@pytest.mark.parametrize("rows", [100, pytest.param(None, marks=pytest.mark.full)])
def test_capacity_grows_and_loses_nothing(rows):
    rng = np.random.default_rng(0)
    acc = takers.accumulator(shape=(rows,), capacity=1)
    expected, seen = np.zeros(100, np.int64), []
    for _ in range(40):
        ids = rng.integers(1, 100, 32)
        seen.extend(ids.tolist())
        acc.apply_grad(ids, ids.astype(np.int32))
        np.add.at(expected, ids, ids)
    stats = acc.statistics()
    assert stats["rows"] == len(set(seen)) <= stats["capacity"]
    assert stats["grown"] >= 3
    grad = acc.take_grad(40)
    np.testing.assert_array_equal(grad.indices, np.flatnonzero(expected))
    np.testing.assert_array_equal(grad.values, expected[expected > 0])


def test_capacity_stays_where_the_same_rows_come_again():
    acc = takers.accumulator(shape=(1000,), capacity=64)
    for _ in range(50):
        acc.apply_grad(np.arange(32), np.ones(32, np.int32))
    assert acc.statistics()["capacity"] == 64
    assert acc.take_grad(50).values.tolist() == [50] * 32


def test_capacity_never_exceeds_the_table():
    acc = takers.accumulator(shape=(10,), capacity=4)
    for start in range(10):
        acc.apply_grad(np.arange(start, 10), np.ones(10 - start, np.int32))
    assert acc.statistics()["capacity"] == 10
    assert acc.take_grad(1).values.tolist() == list(range(1, 11))


@pytest.mark.parametrize("rows", [30_000, pytest.param(None, marks=pytest.mark.full)])
def test_capacity_shrinks_when_takes_have_long_needed_little(rows):
    """One large gradient must not make every later take slow; and nothing is lost on the way."""
    acc = takers.accumulator(shape=(rows,), capacity=None)
    acc.apply_grad(np.arange(18_000), np.ones(18_000, np.int32))
    assert acc.take_grad(1).values.sum() == 18_000
    capacities = []
    for step in range(1, 13):
        for _ in range(3):  # thrice as many slices as rows
            acc.apply_grad([step, 29_999], [step, 1], local_step=step)
        capacities.append(acc.statistics()["capacity"])
        assert rows_of(acc.take_grad(3)) == {step: 3 * step, 29_999: 3}
    assert capacities[0] >= 18_000
    assert capacities[-1] <= 4096
    assert len(set(capacities)) == 2  # at once, for each capacity has programs of its own
    acc.apply_grad(np.arange(5000), np.full(5000, 2, np.int32), local_step=13)
    assert acc.take_grad(1).values.sum() == 10_000


@pytest.mark.full
def test_capacity_shrinks_no_further_than_it_was_asked_for():
    acc = takers.accumulator(shape=(4096,), capacity=256)
    acc.apply_grad(np.arange(1024), np.ones(1024, np.int32))
    acc.take_grad(1)
    for step in range(1, 13):
        acc.apply_grad([step], [step], local_step=step)
        assert rows_of(acc.take_grad(1)) == {step: step}
    assert acc.statistics()["capacity"] == 256


def test_counts_do_not_end_at_31_bits():
    """The device's own count is of 32 bits; whoever waits for many must not wait for ever."""
    acc = takers.accumulator()
    acc.apply_grad([1], [5])
    acc.load_state_dict(acc.state_dict() | {"num_accumulated": np.asarray(2**31 - 1)})
    for value in (6, 7):
        acc.apply_grad([1], [value])
    assert acc.num_accumulated() == acc.state_dict()["num_accumulated"] == 2**31 + 1
    acc.load_state_dict(acc.state_dict())
    assert acc.num_accumulated() == 2**31 + 1
    assert rows_of(acc.take_grad(2**31 - 1, timeout=0)) == {1: 18}


def test_many_sizes_compile_a_handful_of_programs():
    acc = takers.accumulator(shape=(5000,), capacity=4096)  # like no other, to count programs
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for n in range(1, 120):
        acc.apply_grad(np.arange(n), np.ones(n, np.int32), local_step=n)
        assert acc.take_grad(1).indices.shape == (n,)
    jax.monitoring.clear_event_listeners()
    assert len(compiled) <= 3 + 3 + 4  # applies and takes of three sizes, and the first state
    programs = acc.accumulator_ref._accumulated._programs
    assert programs.apply_staged._cache_size() == programs.take._cache_size() == 3
    assert programs.apply._cache_size() == 0
    for n in range(1, 120):  # staged together, where two in a row are of one size
        acc.apply_grad(np.arange(n), np.ones(n, np.int32), local_step=n + 120)
    assert acc.statistics()["compiled_sizes"] == [32, 64, 128]
    assert programs.apply_staged._cache_size() == 3
    assert acc.take_grad(1).values.tolist() == list(range(119, 0, -1))


# Names and sharing.


def test_names_are_unique_among_the_living():
    first, second = takers.accumulator(name="rows"), takers.accumulator(name="rows")
    assert (first.name, second.name) == ("rows", "rows_1")
    assert takers.accumulator(name="scope/Q").name == "Q"
    del first
    gc.collect()
    assert takers.accumulator(name="rows").name == "rows"


def test_making_one_costs_the_same_however_many_live(monkeypatch):
    looks = []

    class Names(dict):
        def __contains__(self, name):
            looks.append(name)
            return super().__contains__(name)

    monkeypatch.setattr(registry, "_named", Names())
    monkeypatch.setattr(registry, "_last_number", {})
    names = {registry.claim_name("rows", object()) for _ in range(500)}
    assert len(names) == 500
    assert len(looks) <= 2 * 500


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("handle", [lambda acc: acc, lambda acc: acc.accumulator_ref])
def test_handles_say_what_to_do_instead_of_copying(use, handle):
    with pytest.raises(TypeError, match=r"shared_name.*state_dict"):
        use(handle(takers.accumulator()))


def test_shared_name_is_one_accumulator():
    first = takers.accumulator(shared_name="embedding")
    second = takers.accumulator(shared_name="embedding")
    private = takers.accumulator(shared_name="")
    first.apply_grad([1], [2])
    second.apply_grad([1], [3])
    assert first.accumulator_ref is second.accumulator_ref
    assert private.num_accumulated() == 0
    assert rows_of(first.take_grad(2)) == {1: 5}
    for other in ({"dtype": "int16"}, {"shape": (15,)}, {"reduction_type": "MEAN"}):
        with pytest.raises(ValueError, match="shared_name 'embedding'"):
            takers.accumulator(shared_name="embedding", **other)


def test_the_last_reference_frees_it():
    acc = takers.accumulator(shared_name="short-lived")
    acc.apply_grad([1], [2])
    ref = weakref.ref(acc.accumulator_ref)
    del acc
    gc.collect()
    assert ref() is None
    assert takers.accumulator(shared_name="short-lived", dtype="int8").num_accumulated() == 0


def test_a_closed_shared_accumulator_is_replaced():
    first = takers.accumulator(shared_name="reopened")
    first.close()
    assert takers.accumulator(shared_name="reopened").num_accumulated() == 0


# Saving.


@pytest.mark.parametrize("shape", [(16, 2), pytest.param(None, marks=pytest.mark.full)])
def test_a_run_can_stop_with_half_a_batch(shape, tmp_path):
    acc = takers.accumulator(dtype="float32", shape=shape, reduction_type="MEAN", capacity=2)
    acc.set_global_step(3)
    acc.apply_grad([7, 3, 7], [[1.0, 0.1], [2.0, -0.0], [3.0, 1.0]], local_step=3)
    np.savez(tmp_path / "half.npz", **acc.state_dict())
    resumed = takers.accumulator(dtype="float32", shape=shape, reduction_type="MEAN")
    with np.load(tmp_path / "half.npz") as saved:
        resumed.load_state_dict(saved)
    for each in (acc, resumed):
        assert not each.apply_grad([3], [[1.0, 1.0]], local_step=2)
        each.apply_grad([3], [[4.0, 1e-3]], local_step=3)
    ours, theirs = acc.take_grad(2), resumed.take_grad(2)
    assert theirs.indices.tolist() == [3, 7]
    assert np.asarray(ours.values).tobytes() == np.asarray(theirs.values).tobytes()


def test_bfloat16_sums_come_back_from_npz(tmp_path):
    options = {"dtype": jnp.bfloat16, "accumulator_dtype": jnp.bfloat16}
    acc = takers.accumulator(**options)
    acc.apply_grad([7], [1.5])
    np.savez(tmp_path / "half.npz", **acc.state_dict())
    with np.load(tmp_path / "half.npz") as saved:
        acc.load_state_dict(saved)
    assert rows_of(acc.take_grad(1)) == {7: 1.5}


def test_loading_serves_who_waits(monkeypatch):
    acc = takers.accumulator()
    acc.apply_grad([1], [2])
    saved = acc.state_dict()
    assert rows_of(acc.take_grad(1)) == {1: 2}
    taker = takers.Watch(monkeypatch).take(acc, 1)
    acc.load_state_dict(saved)
    assert rows_of(taker.result()) == {1: 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.ones(1, np.float32)}, "values of int32, got float32"),
        ({"indices": np.array([16], np.int32)}, "indices from 0 to below 16"),
        ({"counts": np.ones(2, np.int32)}, "as many indices, values and counts"),
    ],
)
def test_what_does_not_fit_is_not_loaded(change, message):
    acc = takers.accumulator()
    acc.apply_grad([1], [2])
    before = snapshot(acc)
    with pytest.raises(jaxaccum.InvalidArgumentError, match=message):
        acc.load_state_dict(acc.state_dict() | change)
    assert snapshot(acc) == before


# Devices.


def test_state_and_results_are_where_they_were_put():
    device = jax.devices()[-1]
    acc = takers.accumulator(device=device)
    acc.apply_grad([1, 2], [2, 3])
    acc.apply_grad(jnp.array([1]), jnp.array([2], jnp.int32))
    assert acc.take_grad(2).values.devices() == {device}


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param((), marks=pytest.mark.full),
        (None, "x"),
        pytest.param(("x", None), marks=pytest.mark.full),
    ],
)
def test_values_may_be_sharded(spec):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    acc = takers.accumulator(shape=(16, 4), device=sharding, capacity=4)
    for step in range(2):
        for ids in ([1, 2, 5], [8, 9, 10], [1, 2, 11]):
            acc.apply_grad(ids, np.full((3, 4), 2, np.int32), local_step=step)
        grad = acc.take_indexed_slices_grad(3)
        np.testing.assert_array_equal(grad.indices, [1, 2, 5, 8, 9, 10, 11])
        np.testing.assert_array_equal(np.asarray(grad.values)[:, 0], [4, 4] + [2] * 5)
        assert len(grad.values.devices()) == 2


@pytest.fixture
def accelerator(monkeypatch):
    """Lets every device count as one whose memory the host cannot see."""
    for module in (host_gradient, placement):
        monkeypatch.setattr(module, "is_in_host_memory", lambda array: False)


def on_device(indices, values):
    return jnp.array(indices, jnp.int32), jnp.array(values, jnp.int32)


@pytest.mark.usefixtures("accelerator")
def test_gradients_on_an_accelerator_are_checked_by_default():
    acc = takers.accumulator()
    acc.apply_grad(*on_device([1, 2, 1], [1, 2, 3]))
    with pytest.raises(jaxaccum.InvalidArgumentError, match="index is 16 exceeded 16"):
        acc.apply_grad(*on_device([16], [1]))
    assert rows_of(acc.take_grad(1)) == {1: 4, 2: 2}


@pytest.mark.usefixtures("accelerator")
def test_padding_of_our_slices_on_an_accelerator():
    for acc_rows, grad_rows in ((16, 16), (16, None), (None, 16)):
        acc = takers.accumulator(shape=(acc_rows,))
        padding = 2**31 - 1 if grad_rows is None else grad_rows
        indices, values = on_device([5, padding], [1, 9])
        acc.apply_indexed_slices_grad(jaxaccum.IndexedSlices(indices, values, (grad_rows,)))
        assert rows_of(acc.take_grad(1)) == {5: 1}


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2])
def test_it_works_under_any_mesh(axis_type):
    """A mesh of other devices than its own, set before it is made, or after."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    before = takers.accumulator(shape=(16, 8))
    before.apply_grad([1], np.full((1, 8), 3, np.int32))
    with jax.set_mesh(mesh):
        for acc in (before, takers.accumulator(shape=(16, 8))):
            acc.apply_grad([1], np.ones((1, 8), np.int32))
            acc.apply_grad(np.arange(2), jnp.full((2, 8), 2, jnp.int32))
            acc.load_state_dict(acc.state_dict())
            assert acc.statistics()["rows"] == 2
            grad = acc.take_grad(2)
            assert grad.indices.tolist() == [0, 1]
            assert grad.values[:, 0].tolist() == [2, 6 if acc is before else 3]
            acc.apply_grad([5], np.ones((1, 8), np.int32), local_step=1)
            assert asyncio.run(acc.take_grad_async(1)).indices.tolist() == [5]
        assert jax.sharding.get_abstract_mesh().axis_names == ("x",)


def test_it_cannot_be_traced():
    acc = takers.accumulator()
    acc.apply_grad([1], [1])

    @jax.jit
    def step(x):
        acc.apply_grad([2], [2])
        return x

    with pytest.raises(RuntimeError, match="outside jit"):
        step(1.0)
    for use in (
        lambda x: acc.take_grad(1).values + x,
        lambda x: acc.num_accumulated() + x,  # it would stay what it is now
        lambda x: takers.accumulator().num_accumulated() + x,
    ):
        with pytest.raises(RuntimeError, match="outside jit"):
            jax.jit(use)(1)
    assert rows_of(acc.take_grad(1)) == {1: 1}


def test_untrimmed_results_keep_their_size():
    acc = takers.accumulator(shape=(16,), capacity=8)
    acc.apply_grad([3, 1], [1, 1])
    grad = acc.take_indexed_slices_grad(1, trim=False)
    assert grad.indices.tolist() == [1, 3] + [16] * 6
    assert grad.row_mask.tolist() == [True] * 2 + [False] * 6


def test_statistics_count_everything():
    acc = takers.accumulator(capacity=2)
    acc.apply_grad([1, 2], [1, 1])
    acc.apply_grad([3], [1])
    with pytest.raises(jaxaccum.InvalidArgumentError):
        acc.apply_grad([16], [1])
    acc.apply_grad([3], [1], local_step=-1)
    assert acc.statistics() == {
        "accepted": 2, "stale": 1, "invalid": 1, "taken": 0, "grown": 1, "waiting": 0,
        "staleness": {0: 2, 1: 1}, "unclaimed": 0, "num_accumulated": 2, "global_step": 0,
        "rows": 3, "capacity": 16, "compiled_sizes": [32],
    }  # fmt: skip
