"""Counters at the top of int32 stay there: a wrapped one would be negative, and nothing ready."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import saturating_add, saturating_sum

import jaxaccum

TOP = 2**31 - 1
GRAD = jaxaccum.IndexedSlices(np.array([2, 2], np.int32), np.ones((2, 1), np.float32), (4, 1))


def near_the_top(state, below=0):
    """``state`` as after so many gradients that ``below`` more fit its counters."""
    count = jnp.int32(TOP - below)
    return dataclasses.replace(
        state,
        num_accumulated=count,
        global_step=count,
        verdict_counts=jnp.full(5, TOP - below, jnp.int32),
        counts=jnp.where(state.counts > 0, count, 0),
    )


def held():
    state, _ = jaxaccum.apply(jaxaccum.init((4, 1), capacity=2), GRAD)
    return state


def test_sums_saturate_as_python_integers_would():
    numbers = [0, 1, 5, TOP - 1, TOP]
    for count in [*numbers, -7]:
        for more in numbers:
            total = saturating_add(jnp.int32(count), jnp.int32(more))
            assert int(total) == min(count + more, TOP)
    columns = np.array([[1, TOP], [2, TOP], [3, 1]], np.int32)
    np.testing.assert_array_equal(saturating_sum(jnp.asarray(columns)), [6, TOP])


@pytest.mark.parametrize("below", [0, 1, 2])
def test_gradients_past_the_top_still_count_and_are_taken(below):
    state = near_the_top(held(), below)
    for _ in range(3):
        state, verdict = jaxaccum.apply(state, GRAD)
        assert verdict == jaxaccum.Verdict.ACCEPTED
    assert state.num_accumulated == TOP
    assert state.verdict_counts.tolist() == [TOP, *[TOP - below] * 4]
    assert state.counts[0] == TOP
    state, mean, ready = jaxaccum.take(state, TOP)
    assert ready
    np.testing.assert_array_equal(mean.values[0], np.float32(8) / np.float32(TOP))
    assert state.global_step == min(TOP - below + 1, TOP)


def test_at_the_top_a_gradient_of_an_earlier_step_is_still_stale():
    state, _, _ = jaxaccum.take(near_the_top(held()))
    _, verdict = jaxaccum.apply(state, GRAD, 0)
    assert verdict == jaxaccum.Verdict.STALE


def test_merged_counters_stay_at_the_top():
    state = near_the_top(held(), 1)
    merged, _ = jaxaccum.merge(state, state)
    for counter in (merged.num_accumulated, *merged.verdict_counts, merged.counts[0]):
        assert counter == TOP


def test_counters_of_many_devices_stay_at_the_top():
    count = jax.local_device_count()
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), near_the_top(held(), 1))
    merge = jax.pmap(lambda state: jaxaccum.all_merge(state, "data")[0], axis_name="data")
    merged = merge(states)
    assert merged.num_accumulated.tolist() == [TOP] * count
    assert merged.verdict_counts[0].tolist() == [TOP] * 5
