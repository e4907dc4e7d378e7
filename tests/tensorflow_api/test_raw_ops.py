"""TensorFlow's raw ops by name: its vectors, its errors, its argument names."""

import inspect
import pickle

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import takers

import jaxaccum
from jaxaccum import raw_ops


def named(case):
    return case["name"]


def arguments(case, *names):
    return {name: golden_data.array(case[name]) for name in names}


@pytest.mark.parametrize(
    "case",
    [c for c in golden_data.cases("errors.json") if c["expect"]["error"] != "InternalError"],
    ids=named,
)
def test_wrong_arguments_raise_with_tensorflows_message(case):
    inputs = {k: golden_data.array(v) for k, v in case["inputs"].items()}
    with pytest.raises(jaxaccum.InvalidArgumentError) as raised:
        getattr(raw_ops, case["op"])(**inputs)
    if "densified" in case["expect"]["message"]:  # there the numbers run together
        assert str(raised.value).replace(", ", "") == case["expect"]["message"].replace(", ", "")
    else:
        assert str(raised.value) == case["expect"]["message"]


def test_a_gradient_that_would_be_lost_raises():
    (case,) = (c for c in golden_data.cases("errors.json") if c["name"] == "SparseSliceGrad-12")
    inputs = {k: golden_data.array(v) for k, v in case["inputs"].items()}
    with pytest.raises(ValueError, match="of 1 used 0"):
        raw_ops.SparseSliceGrad(**inputs)


def test_a_padded_slice_is_refused_as_tensorflow_does():
    x = {"backprop_val_grad": [1.0, 2.0], "input_indices": [[1]], "input_start": [0]}
    text = "# rows of output_indices should be not greater than of input_indices, got 2 and 1"
    with pytest.raises(jaxaccum.InvalidArgumentError, match=text):
        raw_ops.SparseSliceGrad(**x, output_indices=[[1], [2]])
    x["input_indices"] = [[1], [5]]
    with pytest.raises(ValueError, match="of 2 used 1"):
        raw_ops.SparseSliceGrad(**x, output_indices=[[1], [2]])


A = {"a_indices": [[0, 1], [2, 0]], "a_values": [1.0, 2.0], "a_shape": [3, 2]}
B = {"b_indices": np.array([[2, 0], [2, 1]]), "b_values": jnp.array([-2.0, 5.0]), "b_shape": [3, 2]}


def test_sparse_add_has_exactly_the_entries_there_are():
    total = raw_ops.SparseAdd(**A, **B, thresh=0.5)
    assert total.sum_indices.tolist() == [[0, 1], [2, 1]]
    assert total.sum_values.tolist() == [1.0, 5.0]
    assert total.sum_shape.tolist() == [3, 2]
    grads = raw_ops.SparseAddGrad(
        backprop_val_grad=[10.0, 20.0],
        a_indices=A["a_indices"],
        b_indices=B["b_indices"],
        sum_indices=total.sum_indices,
    )
    assert grads.a_val_grad.tolist() == [10.0, 0.0]
    assert grads.b_val_grad.tolist() == [0.0, 20.0]


def test_sparse_slice_has_exactly_the_entries_there_are():
    x = {"indices": [[0, 1], [1, 0], [2, 1]], "values": [1.0, 2.0, 3.0], "shape": [3, 2]}
    part = raw_ops.SparseSlice(**x, start=[1, 1], size=[5, 1])
    assert part.output_indices.tolist() == [[1, 0]]
    assert part.output_values.tolist() == [3.0]
    assert part.output_shape.tolist() == [2, 1]
    grad = raw_ops.SparseSliceGrad(
        backprop_val_grad=[7.0],
        input_indices=x["indices"],
        input_start=[1, 1],
        output_indices=part.output_indices,
    )
    assert grad.tolist() == [0.0, 0.0, 7.0]


def test_empty_operands():
    empty = {"indices": np.zeros((0, 1), np.int64), "values": np.zeros(0, np.float32)}
    part = raw_ops.SparseSlice(**empty, shape=[3], start=[0], size=[2])
    assert part.output_indices.shape == (0, 1)
    assert part.output_shape.tolist() == [2]


@pytest.mark.parametrize("handle", [lambda acc: acc, lambda acc: acc.accumulator_ref])
def test_accumulator_ops_work_on_the_object(handle):
    acc = takers.accumulator(shape=(3, 2))
    gradient = {
        "gradient_indices": [1],
        "gradient_values": [[1, 2]],
        "gradient_shape": [4, 2],
        "local_step": np.int64(0),
    }
    with pytest.raises(jaxaccum.InvalidArgumentError, match="dim 0 to be 3, got 4"):
        raw_ops.SparseAccumulatorApplyGradient(handle=handle(acc), has_known_shape=True, **gradient)
    assert raw_ops.SparseAccumulatorApplyGradient(
        handle=handle(acc), has_known_shape=False, **gradient
    )
    assert raw_ops.AccumulatorNumAccumulated(handle=handle(acc)) == 1
    with pytest.raises(jaxaccum.InvalidArgumentError, match="dtype must be int32"):
        raw_ops.SparseAccumulatorTakeGradient(handle=handle(acc), num_required=1, dtype="float32")
    taken = raw_ops.SparseAccumulatorTakeGradient(
        handle=handle(acc), num_required=1, dtype=jnp.int32
    )
    assert type(taken) is jaxaccum.SparseGradient
    assert taken._fields == ("indices", "values", "shape")
    assert taken.values.tolist() == [[1, 2]]
    raw_ops.AccumulatorSetGlobalStep(handle=handle(acc), new_global_step=9)
    assert not raw_ops.SparseAccumulatorApplyGradient(
        handle=handle(acc), has_known_shape=False, **gradient
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"has_known_shape": 1}, TypeError, "Expected bool for argument 'has_known_shape' not 1"),
        ({"gradient_shape": None}, ValueError, "gradient_shape"),
        ({"local_step": 1.5}, TypeError, "local_step must be an integer"),
        ({"gradient_indices": [1.0]}, TypeError, "gradient_indices must be an integer"),
        ({"handle": "a"}, TypeError, "handle must be an accumulator"),
    ],
)
def test_wrong_apply_arguments(change, error, message):
    acc = takers.accumulator(shape=(3, 2))
    right = {
        "handle": acc,
        "local_step": 0,
        "gradient_indices": [1],
        "gradient_values": [[1, 2]],
        "gradient_shape": [3, 2],
        "has_known_shape": True,
    }
    with pytest.raises(error, match=message):
        raw_ops.SparseAccumulatorApplyGradient(**(right | change))
    assert acc.num_accumulated() == 0


OPS = [name for name in raw_ops.__all__ if inspect.isfunction(getattr(raw_ops, name))]


def test_all_that_is_public_is_exported_and_documented():
    own = {
        name
        for name, value in vars(raw_ops).items()
        if getattr(value, "__module__", "") == "jaxaccum.raw_ops" and not name.startswith("_")
    }
    assert own == set(raw_ops.__all__)
    assert all(inspect.getdoc(getattr(raw_ops, name)) for name in own)


@pytest.mark.parametrize("name", OPS)
def test_arguments_are_keyword_only(name):
    parameters = inspect.signature(getattr(raw_ops, name)).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)


def test_64_bit_indices_that_do_not_fit_are_refused():
    with jax.enable_x64(False), pytest.raises(jaxaccum.InvalidArgumentError, match="int32"):
        raw_ops.SparseSlice(
            indices=np.array([[2**32]]), values=[1.0], shape=[5], start=[0], size=[5]
        )


def test_masked_arrays_are_refused():
    masked = np.ma.masked_array([1.0], [True])
    with pytest.raises(jaxaccum.InvalidArgumentError, match="Masked arrays"):
        raw_ops.SparseSlice(indices=[[2]], values=masked, shape=[5], start=[0], size=[5])


RESULTS = [
    raw_ops.SparseSum(np.array([[1]]), np.ones(1), np.array([3])),
    raw_ops.SparsePart(np.array([[1]]), np.ones(1), np.array([3])),
    raw_ops.AddGrads(np.ones(1), np.ones(2)),
    jaxaccum.SparseGradient(np.array([1]), np.ones((1, 2)), np.array([3, 2])),
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_results_can_be_pickled_under_their_public_names(result):
    pickled = pickle.dumps(result)
    assert type(result).__module__ in ("jaxaccum", "jaxaccum.raw_ops")
    assert type(result).__module__.encode() in pickled
    again = pickle.loads(pickled)
    assert type(again) is type(result)
    assert [field.tolist() for field in again] == [field.tolist() for field in result]


def test_ops_return_their_named_results():
    total = raw_ops.SparseAdd(**A, **B, thresh=0.5)
    part = raw_ops.SparseSlice(
        indices=A["a_indices"], values=A["a_values"], shape=[3, 2], start=[0, 0], size=[3, 2]
    )
    grads = raw_ops.SparseAddGrad(
        backprop_val_grad=total.sum_values,
        a_indices=A["a_indices"],
        b_indices=B["b_indices"],
        sum_indices=total.sum_indices,
    )
    assert type(total) is raw_ops.SparseSum
    assert type(part) is raw_ops.SparsePart
    assert type(grads) is raw_ops.AddGrads
    assert part.output_values.tolist() == [1.0, 2.0]
