"""``suggest_capacity`` against counting in sets, and on batches that it has not seen."""

import numpy as np
import pytest
from breadth import in_breadth

import jaxaccum


def distinct(batches, num_required):
    full = len(batches) // num_required * num_required
    groups = [batches[i : i + num_required] for i in range(0, full, num_required)]
    return [len({int(i) for batch in group for i in np.ravel(batch)}) for group in groups]


@pytest.mark.parametrize("quantile", [0.0, 0.4, 0.9])
def test_a_quantile_is_that_of_the_counts(quantile):
    rng = np.random.default_rng(3)
    batches = [rng.integers(0, 60, (size, 2)) for size in rng.integers(1, 9, 41)]
    counts = np.sort(distinct(batches, 4))
    capacity = jaxaccum.suggest_capacity(iter(batches), 4, quantile=quantile, margin=0)
    assert capacity == max(counts[int(np.ceil(quantile * (len(counts) - 1)))], 16)


@pytest.mark.parametrize("exponent", in_breadth([1.05, 1.2, 1.6, 2.5], {1.05, 1.6}))
@pytest.mark.parametrize("size", in_breadth([8, 64, 1024], {8, 1024}))
def test_batches_of_zipf_that_it_has_not_seen_fit(exponent, size):
    draw = lambda seed, n: np.random.default_rng(seed).zipf(exponent, (n, size)) % 10**6  # noqa: E731
    capacity = jaxaccum.suggest_capacity(draw(0, 40), 4)
    unseen = distinct(draw(1, 1600), 4)
    assert max(unseen) <= capacity <= max(size, 1.5 * max(unseen) + 20)


def test_one_gradient_fits_and_no_more_than_all_are_needed():
    same = np.ones((8, 50), int)
    assert jaxaccum.suggest_capacity(same, 4) == 50
    assert jaxaccum.suggest_capacity(np.arange(400).reshape(8, 50), 4) == 200
    assert jaxaccum.suggest_capacity(np.zeros((8, 0), int), 4) == 1


def test_what_it_refuses():
    ids = np.ones((3, 2), int)
    for options, message in (
        ({"num_required": 4}, "batches must be at least num_required=4, got 3"),
        ({"num_required": 0}, "num_required must be positive, got 0"),
        ({"quantile": 1.1}, "quantile must be from 0 to 1, got 1.1"),
        ({"margin": -0.1}, "margin must not be negative, got -0.1"),
        ({"batches": [1]}, "batches must be arrays of ids, got the number 1 at 0"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxaccum.suggest_capacity(**{"batches": ids, "num_required": 1, **options})
    with pytest.raises(TypeError, match=r"batches\[1\] must be integers, got float64"):
        jaxaccum.suggest_capacity([ids, ids * 0.5], 1)
