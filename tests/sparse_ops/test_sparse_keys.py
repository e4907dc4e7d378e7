"""Folding, counting and searching rows, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum._sparse_ops import keys, match


@pytest.mark.parametrize(
    "num_rows", [1, 4096, *(pytest.param(n, marks=pytest.mark.full) for n in (4, 4095, 5000))]
)
def test_search_agrees_with_numpy(num_rows):
    rng = np.random.default_rng(num_rows)
    # Crowded into the first bucket, spread over all, and crowded into the last.
    for low, span in ((0, 10), (0, 2**32 - 1), (2**32 - 11, 2**32 - 1)):
        table = np.sort(rng.integers(low, span, num_rows, dtype=np.uint32))
        asked = np.append(rng.integers(0, span, 50, dtype=np.uint32), [*table[[0, -1]], span])
        asked = asked.astype(np.uint32)
        words = (jnp.array(table),), (jnp.array(asked),)
        want = np.searchsorted(table, asked)
        for largest in (np.uint32(span), np.uint32(2**32 - 1)):  # known, or a mere bound
            np.testing.assert_array_equal(find_lower_bound(*words, largest), want)


find_lower_bound = jax.jit(keys.find_lower_bound)
match_rows, match_in_line = jax.jit(match.match_rows), jax.jit(match.match_in_line)


@pytest.mark.parametrize("far", [0, 2**31 - 8])  # one word, and a box of more than 2**32 cells
def test_match_rows_takes_the_first_of_equal_rows(far):
    table = np.array([[5, 1], [-3, 2], [5, 1], [-2, 7], [-3, 2 + far], [far, -far]], np.int32)
    asked = np.array([[5, 1], [-3, 2], [0, 0], [-2, 7], [9, 9], [-3, 2 + far], [far, -far]])
    place = {tuple(row): i for i, row in reversed(list(enumerate(table.tolist())))}
    want = [place.get(tuple(row), 6) for row in asked.tolist()]
    (found,) = match_rows(jnp.array(table), jnp.array(asked, jnp.int32))
    assert found.tolist() == want


@pytest.mark.parametrize("far", [0, 2**31 - 8])
def test_match_rows_of_an_ascending_table(far):
    table = np.array([[-9, 4], [-9, 4], [-1, 0], [0, -3], [0, 5], [7, far], [7 + far, 1]], np.int32)
    asked = np.append(table, [[-9, 0], [0, 6], [8, -3], [-10, 5]], axis=0).astype(np.int32)
    want = [0, 0, *range(2, 7), *[7] * 4]
    found = match_rows(jnp.array(table), jnp.array(asked), jnp.array(table))
    assert [f.tolist() for f in found] == [want, want[:7]]


@pytest.mark.parametrize("step", [1, -1])  # ascending, and sorted first
def test_rows_that_would_share_a_word_are_told_apart(step):
    table = jnp.array([[0, 0], [2**16, 5], [2**16, 2**16 - 1]], jnp.int32)[::step]
    asked = jnp.array([[0, 5], [2**16, 5]], jnp.int32)
    assert match_rows(table, asked)[0].tolist() == [3, 1]


def test_rows_outside_the_box_are_nowhere_in_a_directory():
    table = np.arange(2**13)  # their keys take all values of their bits: the next one is outside
    asked = np.array([-1, 0, 2**13 - 1, 2**13, 2**31 - 1, -(2**31)], np.int32)
    (found,) = match_rows(jnp.array(table[:, None], jnp.int32), jnp.array(asked[:, None]))
    assert found.tolist() == [2**13, 0, 2**13 - 1, *[2**13] * 3]


def test_rows_in_line_are_not_searched(monkeypatch):
    monkeypatch.setattr(match, "match_rows", lambda _, rows: (jnp.full(len(rows), 9, jnp.int32),))
    table, asked = jnp.array([[1, 2], [1, 3], [2, 2]]), [[0, 9], [1, 2], [1, 3], [2, 2], [3, 0]]
    in_line = jax.jit(lambda *rows: match.match_in_line(*rows))  # traced anew
    found, num_used, _ = in_line(table, jnp.array(asked))
    assert (found.tolist(), num_used) == ([3, 0, 1, 2, 3], 3)


def in_line_cases():
    """Output rows, input rows counted as they are: guessed right at first, never afterwards."""
    rows = [[0, 9], [1, 2], [1, 3], [2, 2], [3, 0]]
    yield rows[1:4], rows
    yield rows[1:4], rows[::-1]  # out of order
    yield rows[1:4][::-1], rows[::-1]  # both in the same order, which does not ascend
    yield rows[1:3], [*rows[:2], rows[1], *rows[2:]]  # a repeated input: one row too many
    yield [rows[1], rows[1], rows[2]], [*rows[:2], rows[1], *rows[2:]]  # repeated on both sides
    yield [[1, 2], [2, 2], [2, 3]], rows  # as many in the box, of which one differs
    yield rows, rows[1:4]  # rows of the table left over
    yield rows[1:4], [[9, 9]] * 5
    yield rows[1:4], [[1, 3], [1, 3], [2, 2]]  # the right number, the first of them wrong
    yield rows[1:4], [*rows[1:4], [1, 3]]  # all in line, and one again
    yield [[1, 3], [1, 2], [2, 2]], [[1, 3], [1, 2], [2, 2]]  # equal, out of order
    yield rows[1:4], [*rows[1:4], rows[3]]  # and the last one again
    yield [[0, 0], [2**16, 2**16]], [[0, 0], [1, 2**16 - 1]]  # a key of 32 bits says they are equal


@pytest.mark.parametrize(("table", "asked"), list(in_line_cases()))
def test_match_in_line_is_match_rows(table, asked):
    place = {tuple(row): i for i, row in reversed(list(enumerate(table)))}
    want = [place.get(tuple(row), len(table)) for row in asked]
    found, num_used, _ = match_in_line(jnp.array(table), jnp.array(asked))
    assert (found.tolist(), num_used) == (want, len({*want} - {len(table)}))


@pytest.mark.parametrize(("num_rows", "num_asked"), [(0, 2), (2, 0), (3, 2)])
def test_rows_without_columns_are_all_the_same(num_rows, num_asked):
    table, asked = jnp.zeros((num_rows, 0), jnp.int32), jnp.zeros((num_asked, 0), jnp.int32)
    found, num_used, num_padding = match.match_in_line(table, asked)
    assert (found.tolist(), num_used) == ([0] * num_asked, 1 if num_rows and num_asked else 0)
    assert num_used + num_padding == num_rows
