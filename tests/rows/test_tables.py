"""Selecting tables from a tree: predicates, trees of bools, and what is no table."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from internals import select_tables

from jaxaccum import IndexedSlices

TREE = {
    "user": {"table": jnp.zeros((3, 2)), "bias": jnp.zeros(3)},
    "layers": [jnp.zeros((2, 2)), jnp.zeros(2)],
    "steps": jnp.zeros(4, jnp.int32),
    "scale": jnp.float32(1),
    "absent": None,
}
NONE = jax.tree.map(lambda _: False, TREE)
USER = {**NONE, "user": {"table": True, "bias": False}}


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (lambda path, leaf: jax.tree_util.keystr(path) == "['user']['table']", USER),
        (lambda path, leaf: np.bool_(leaf.shape == (3, 2)), USER),
        (USER, USER),
        ({**NONE, "user": True}, {**NONE, "user": {"table": True, "bias": True}}),
        ({**NONE, "user": {"table": np.True_, "bias": False}, "layers": False}, USER),
        (False, NONE),
    ],
    ids=["path", "leaf", "tree", "prefix", "numpy bools", "one bool"],
)
def test_selects(tables, expected):
    assert select_tables(tables, TREE) == expected


def test_a_module_of_bools_is_a_tree_though_it_is_callable():
    model = eqx.nn.Embedding(3, 2, key=jax.random.key(0))
    chosen = jax.tree.map(lambda leaf: leaf.ndim == 2, model)
    assert callable(chosen)
    assert jax.tree.leaves(select_tables(chosen, model)) == [True]


def test_a_bare_array_is_selected_by_a_bare_bool():
    assert select_tables(True, jnp.zeros((3, 2))) is True
    assert select_tables(lambda path, leaf: path == (), jnp.zeros((3, 2))) is True


def test_slices_are_one_leaf():
    slices = IndexedSlices(jnp.zeros(2, jnp.int32), jnp.zeros((2, 2)), (3, 2))
    tree = {"a": slices, "b": jnp.zeros(2)}
    assert select_tables({"a": True, "b": False}, tree) == {"a": True, "b": False}
    is_slices = lambda path, leaf: isinstance(leaf, IndexedSlices)  # noqa: E731
    assert select_tables(is_slices, tree) == {"a": True, "b": False}


@pytest.mark.parametrize(
    ("tables", "error", "message"),
    [
        (lambda path, leaf: 1, TypeError, r"tables\(path, leaf\) must return a bool, got 1 for"),
        (lambda path, leaf: jnp.bool_(True), TypeError, "must return a bool"),
        ({**NONE, "scale": 3}, TypeError, r"a tree of bools, got 3 for leaf \['scale'\]"),
        ({"user": True}, ValueError, "tables must match the tree it selects from"),
        ({**NONE, "user": [True, False]}, ValueError, "be a prefix of it; got PyTreeDef"),
        ({**NONE, "steps": True}, TypeError, r"selects leaf \['steps'\].*floating.*got int32"),
        ({**NONE, "scale": True}, ValueError, r"selects leaf \['scale'\].*rows, got a scalar"),
    ],
)
def test_wrong_tables_are_named(tables, error, message):
    with pytest.raises(error, match=message):
        select_tables(tables, TREE)


def test_a_leaf_that_is_no_array_is_no_table():
    with pytest.raises(TypeError, match=r"the only leaf.*array, got float"):
        select_tables(True, 1.0)
