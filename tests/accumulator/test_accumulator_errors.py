"""What the accumulator says of input that is wrong, and of input that only looks wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum
from jaxaccum import IndexedSlices, Verdict

ROWS = 12


def make(**kwargs):
    return jaxaccum.init(**{"dense_shape": (ROWS, 2), "capacity": 4, **kwargs})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, r"capacity must be from 1 to 2\*\*30, got 0"),
        ({"capacity": -3}, ValueError, "capacity .* got -3"),
        ({"capacity": 2.5}, TypeError, "float"),
        (
            {"reduction": "MEAN"},
            ValueError,
            "reduction must be one of .*'mean_per_gradient'.* got 'MEAN'",
        ),
        ({"dtype": bool}, TypeError, "dtype must be numeric, got bool"),
        ({"dtype": "qint8"}, TypeError, "dtype qint8 is quantized"),
        ({"accumulator_dtype": jnp.float16}, ValueError, "accumulator_dtype float16 .* float32"),
        ({"dense_shape": ()}, ValueError, "dense_shape must be"),
        ({"dense_shape": (3, None)}, ValueError, r"dense_shape .* got \(3, None\)"),
        ({"dense_shape": (-1, 2)}, ValueError, r"dense_shape .* got \(-1, 2\)"),
        ({"dense_shape": (2**31, 2)}, ValueError, "dense_shape"),
        ({"global_step": 2**31}, ValueError, "global_step must fit int32"),
        ({"global_step": 1.5}, TypeError, "global_step must be an integer, got 1.5"),
        ({"max_staleness": -1}, ValueError, "max_staleness must not be negative, got -1"),
        (
            {"dtype": jnp.int32, "weighted": True},
            TypeError,
            "weighted must be False for integers, got dtype int32",
        ),
    ],
)
def test_init_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_sixty_four_bits_need_x64():
    if jax.config.jax_enable_x64:
        assert make(dtype="float64").values.dtype == np.float64
    else:
        with pytest.raises(TypeError, match="dtype float64 needs jax_enable_x64"):
            make(dtype="float64")


ONES = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("grad", "step", "error", "message"),
    [
        (ONES, None, TypeError, "grad must be an IndexedSlices, got ndarray"),
        (IndexedSlices([[1, 2, 3]], ONES, None), None, ValueError, r"indices .*rank 1.*\(1, 3\)"),
        (IndexedSlices([1, 2], ONES, None), None, ValueError, r"values .*\(3, 2\) for 2 indices"),
        (IndexedSlices([1, 2, 3], np.float32(1), None), None, ValueError, r"values .*shape \(\)"),
        (IndexedSlices([1.0, 2, 3], ONES, None), None, TypeError, "indices must be integers"),
        (IndexedSlices([1, 2, 3], ONES[:, :1], None), None, ValueError, r"\(2,\), got \(1,\)"),
        (IndexedSlices([1, 2, 3], ONES, (9, 2)), None, ValueError, "12 rows, got 9"),
        (IndexedSlices([1, 2, 3], ONES, (ROWS, 3)), None, ValueError, r"\(12, 3\) does not fit"),
        (IndexedSlices([1, 2, 3], ONES.astype(np.int32), None), None, TypeError, "float32 .*int32"),
        (IndexedSlices([1, 2, 3], ONES, None), 1.0, TypeError, "local_step must be an integer"),
        (IndexedSlices([1, 2, 3], ONES, None), [1], ValueError, r"local_step .* shape \(1,\)"),
        (IndexedSlices([1, 2, 3], ONES, None), 2**40, ValueError, "local_step must fit int32"),
        (IndexedSlices([1, 2, 2**31], ONES, None), None, ValueError, "indices must fit int32"),
    ],
)
def test_apply_names_what_is_wrong(grad, step, error, message):
    with pytest.raises(error, match=message):
        jaxaccum.apply(make(), grad, step)


def test_weights_need_a_state_that_is_made_for_them():
    grad = IndexedSlices([1, 2, 3], ONES, None)
    with pytest.raises(ValueError, match=r"staleness_weight must be None unless .* weighted=True"):
        jaxaccum.apply(make(), grad, staleness_weight=lambda s: 1.0)
    with pytest.raises(
        ValueError, match=r"staleness_weight must return a scalar, got shape \(2,\)"
    ):
        jaxaccum.apply(make(weighted=True), grad, staleness_weight=lambda s: jnp.ones(2))


def test_ids_of_64_bits_never_pass_the_door():
    with pytest.raises(
        ValueError, match=r"indices must fit int32, got entries from 5 to 109951162"
    ):
        IndexedSlices(np.array([5, 2**40]), ONES[:2], None)
    with pytest.raises(ValueError, match="indices must fit int32"):
        IndexedSlices(np.array([5, 2**63], np.uint64), ONES[:2], None)
    fine = IndexedSlices(np.array([5, 2**31 - 2]), ONES[:2], None)
    state, verdict = jaxaccum.apply(jaxaccum.init((None, 2), capacity=4), fine)
    assert verdict == Verdict.ACCEPTED
    assert sorted(state.indices[:2].tolist()) == [5, 2**31 - 2]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64])
def test_indices_of_any_integer_dtype(dtype):
    state, verdict = jaxaccum.apply(
        make(), IndexedSlices(np.array([3, ROWS, 1], dtype), jnp.asarray(ONES), (ROWS, 2))
    )
    assert verdict == Verdict.ACCEPTED
    assert sorted(state.indices.tolist()) == [1, 3, ROWS, ROWS]


def test_padding_is_the_gradients_own():
    known, unknown = make(), make(dense_shape=(None, 2))
    for state in (known, unknown):
        for rows, padding in ((None, 2**31 - 1), (ROWS, ROWS)):
            grad = IndexedSlices(np.array([1, padding, 2]), ONES, (rows, 2))
            state, verdict = jaxaccum.apply(state, grad)
            assert (verdict, state.num_rows) == (Verdict.ACCEPTED, 2)
    _, verdict = jaxaccum.apply(known, IndexedSlices(np.array([1, ROWS, 2]), ONES, None))
    assert verdict == Verdict.INVALID


@pytest.mark.parametrize("num_required", [0, -2, np.int64(0)])
def test_take_needs_a_positive_number(num_required):
    with pytest.raises(ValueError, match="num_required must be positive"):
        jaxaccum.take(make(), num_required)


def test_a_traced_number_below_one_counts_as_one():
    _, _, ready = jax.jit(jaxaccum.take)(make(), 0)
    assert not ready


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dense_shape": (ROWS, 3)}, r"dense_shape \(12, 2\), got \(12, 3\)"),
        ({"dense_shape": (None, 2)}, r"dense_shape \(12, 2\), got \(None, 2\)"),
        ({"dtype": jnp.float16}, "dtype float32, got float16"),
        ({"reduction": "sum"}, "reduction mean_per_row, got sum"),
        ({"max_staleness": 2}, "max_staleness 0, got 2"),
        ({"weighted": True}, "is_weighted False, got True"),
    ],
)
def test_merge_refuses_another_kind_of_state(other, message):
    with pytest.raises(ValueError, match=message):
        jaxaccum.merge(make(), make(**other))


def test_merge_refuses_another_accumulator_dtype():
    half = {"dtype": jnp.float16}
    with pytest.raises(ValueError, match="accumulator_dtype float32, got float16"):
        jaxaccum.merge(make(**half), make(**half, accumulator_dtype=jnp.float16))


def test_grow_never_shrinks():
    with pytest.raises(ValueError, match="capacity must be at least the present 4, got 3"):
        jaxaccum.grow(make(), 3)


def test_set_step_names_what_is_wrong():
    with pytest.raises(TypeError, match=r"new_step must be an integer, got 1\.5"):
        jaxaccum.set_step(make(), 1.5)
    with pytest.raises(TypeError, match=r"new_step must be an integer, got float32"):
        jaxaccum.set_step(make(), jnp.float32(1.5))
    with pytest.raises(ValueError, match=r"new_step must be a scalar, got shape \(2,\)"):
        jaxaccum.set_step(make(), jnp.array([1, 2]))


def test_a_step_of_64_bits_saturates_rather_than_wraps():
    if jax.config.jax_enable_x64:
        assert jaxaccum.set_step(make(), jnp.int64(2**40)).global_step == 2**31 - 1
    assert jaxaccum.set_step(make(), jnp.uint32(2**32 - 1)).global_step == 2**31 - 1


def test_state_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().num_rows = 3
