"""Trees of parameters and gradients: drawn, made dense, compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum import IndexedSlices


def is_slices(node):
    return isinstance(node, IndexedSlices)


def draw(shapes, seed=0, dtype=jnp.float32):
    """Normal numbers of these ``shapes``, a dict."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def densified(grads):
    """Gradients held as rows made dense, in a tree or alone."""
    return jax.tree.map(lambda g: g.to_dense() if is_slices(g) else g, grads, is_leaf=is_slices)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)
