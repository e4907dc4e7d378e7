"""Counts of what comes before, against NumPy's cumsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import as_words, count_before, rank_in_words, sum_before

SIZES = [0, 1, 31, 32, 127, 128, 129, 511, 512, 5000]


@pytest.mark.parametrize("size", SIZES)
def test_count_before(size):
    mask = np.random.default_rng(size).random(size) < 0.5
    want = np.concatenate([[0], np.cumsum(mask)])
    np.testing.assert_array_equal(jax.jit(count_before)(mask), want)


@pytest.mark.parametrize("size", [1, 128, 129, 16_385, 40_000])
def test_sum_before(size):
    counts = np.random.default_rng(size).integers(0, 2**11, size).astype(np.int32)
    counts[:128] = 2**17 - 1  # the largest there may be: a block of them is exact in float32
    want = np.concatenate([[0], np.cumsum(counts)])[:-1]
    np.testing.assert_array_equal(jax.jit(sum_before)(counts), want)


def test_counts_of_several_masks_at_once():
    masks = np.random.default_rng(0).random((3, 300)) < 0.5
    want = np.concatenate([np.zeros((3, 1)), np.cumsum(masks, axis=1)], axis=1)
    np.testing.assert_array_equal(jax.vmap(count_before)(masks), want)


def test_rank_in_words():
    mask = np.random.default_rng(0).random(32 * 150) < 0.3
    words = as_words(jnp.asarray(mask))
    assert [int(w) & 1 for w in words] == mask[::32].astype(int).tolist()
    positions = np.random.default_rng(1).permutation(mask.size).astype(np.int32)
    want = np.concatenate([[0], np.cumsum(mask)])[positions]
    np.testing.assert_array_equal(rank_in_words(words, jnp.asarray(positions)), want)
