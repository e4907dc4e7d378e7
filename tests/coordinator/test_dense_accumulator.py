"""`ConditionalAccumulator`: TensorFlow's own traces, bit for bit, and what it cannot do."""

import asyncio

import golden_data
import jax.numpy as jnp
import numpy as np
import pytest
import takers

import jaxaccum


def accumulator(dtype="float32", shape=(2, 3), **options):
    return jaxaccum.ConditionalAccumulator(dtype, shape, **options)


def apply(acc, op):
    return {"applied": acc.apply_grad(golden_data.array(op["grad"]), op["local_step"])}


def take(acc, op):
    if "blocks" in op["expect"]:
        with pytest.raises(jaxaccum.DeadlineExceededError):
            acc.take_grad(op["num_required"], timeout=0)
        return op["expect"]
    mean = np.array(acc.take_grad(op["num_required"]))
    expect = golden_data.array(op["expect"])
    assert (mean.dtype, mean.shape) == (expect.dtype, expect.shape)
    mean[np.isnan(mean)] = np.nan  # JSON carries no sign of NaN
    assert mean.tobytes() == expect.tobytes()
    return op["expect"]


PLAY = {
    "apply": apply,
    "take": take,
    "set_global_step": lambda acc, op: acc.set_global_step(op["new_global_step"]),
}


@pytest.mark.parametrize("case", golden_data.some_cases("dense_accumulator.json", drawn=4))
def test_traces(case):
    shape = None if case["shape"] == "unknown" else case["shape"]
    acc = accumulator(
        case["dtype"],
        shape,
        reduction_type=case["reduction_type"],
        accumulator_dtype=case["dtype"],
    )
    for op in case["ops"]:
        if "error" in (op["expect"] or {}):
            with pytest.raises(jaxaccum.InvalidArgumentError) as raised:
                PLAY[op["op"]](acc, op | {"expect": {}})
            assert str(raised.value) == op["expect"]["message"]
        else:
            assert PLAY[op["op"]](acc, op) == op["expect"]
        assert acc.num_accumulated() == op["num_accumulated"]


def test_inputs_of_every_form_mean_the_same():
    acc = accumulator(reduction_type="SUM")
    given = [[1, 2, 3], [4, 5, 6]]
    for form in (given, tuple(map(tuple, given)), np.array(given, np.float32)):
        assert acc.apply_grad(form) is True
    assert acc.apply_grad(jnp.array(given, jnp.float32)) is True
    assert acc.apply_grad(np.array(given, np.float32).T.copy().T) is True
    assert acc.take_grad(5).tolist() == [[5, 10, 15], [20, 25, 30]]


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (np.ones((2, 3)), "grad must be float32 as the accumulator, got float64"),
        (np.ones((2, 3), np.int32), "grad must be float32 as the accumulator, got int32"),
        (np.ma.masked_array(np.ones((2, 3), np.float32)), "grad must not be a masked array"),
        (["a"], "grad must be float32"),
        ([[1.0, 2.0]], r"Shape mismatch: expected \[2,3\], got \[1,2\]"),
    ],
)
def test_bad_gradients_change_nothing(grad, message):
    acc = accumulator()
    with pytest.raises(jaxaccum.InvalidArgumentError, match=message):
        acc.apply_grad(grad)
    assert (acc.num_accumulated(), acc.statistics()["invalid"]) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": None}, TypeError, "Expected DataType for argument 'dtype' not None"),
        ({"dtype": bool}, TypeError, "numeric"),
        ({"shape": (-1, 2)}, ValueError, "Dimension -1 must be >= 0"),
        (
            {"reduction_type": "mean"},
            ValueError,
            "Attr 'reduction_type' of 'ConditionalAccumulator' Op passed string 'mean' not in",
        ),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        accumulator(**arguments)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("int8", 42), ("bfloat16", 42.5), ("complex64", 42.5)]
)
def test_dtypes_that_tensorflow_has_no_kernel_for(dtype, expected):
    """Sums of 16-bit floats are wider, means of integers truncated; counts need not fit."""
    acc = accumulator(dtype, ())
    for value in (85, 0):
        acc.apply_grad(np.asarray(value, jnp.dtype(dtype)))
    mean = acc.take_grad(2)
    assert mean.dtype == jnp.dtype(dtype)
    assert mean == expected


def test_it_waits_saves_and_closes_as_all_accumulators_do(monkeypatch, tmp_path):
    acc = accumulator(shape=(2,), shared_name="dense")
    taker = takers.Watch(monkeypatch).take(acc, 2)
    acc.apply_grad([1, 2])
    np.savez(tmp_path / "half.npz", **acc.state_dict())
    accumulator(shape=(2,), shared_name="dense").apply_grad([3, 4])
    assert taker.result().tolist() == [2, 3]
    resumed = accumulator(shape=(2,))
    with np.load(tmp_path / "half.npz") as saved:
        resumed.load_state_dict(saved)
    resumed.apply_grad([5, 6])
    assert asyncio.run(resumed.take_grad_async(2)).tolist() == [3, 4]
    assert resumed.statistics() == {
        "accepted": 1, "stale": 0, "invalid": 0, "taken": 1, "grown": 0, "waiting": 0,
        "unclaimed": 0, "num_accumulated": 0, "global_step": 1, "staleness": {0: 1},
    }  # fmt: skip
    with pytest.raises(ValueError, match="shared_name 'dense'"):
        jaxaccum.SparseConditionalAccumulator("float32", (2,), shared_name="dense")
    acc.close()
    with pytest.raises(jaxaccum.CancelledError):
        acc.apply_grad([1, 2])
