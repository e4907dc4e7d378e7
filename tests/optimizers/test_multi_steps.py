"""``accumulate`` is ``optax.MultiSteps``, for any inner transform, and any number of tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from breadth import in_breadth

import jaxaccum
from jaxaccum import IndexedSlices

pytestmark = pytest.mark.usefixtures("optax_promotes")
ROWS, WIDTH, LENGTH = 6, 2, 7


def shapes(num_tables):
    tables = {f"table{k}": (ROWS, WIDTH) if k % 2 else (ROWS,) for k in range(num_tables)}
    return {"bias": (3,), **tables}


# Factors are powers of two, so that products are exact, however XLA fuses them with sums.
def halving(step):
    return jnp.where(step < 2, 0.25, 0.125)


def schedule(params):
    return optax.sgd(halving, momentum=0.5, nesterov=True)


def masked(params):
    mask = {name: not name.endswith("0") for name in params}
    decay = optax.masked(optax.add_decayed_weights(0.5), mask)
    return optax.chain(decay, optax.sgd(0.25, momentum=0.5))


def partitioned(params):
    labels = {name: "slow" if name == "bias" or name.endswith("1") else "fast" for name in params}
    parts = {"fast": optax.sgd(0.5, momentum=0.5), "slow": optax.lion(halving, b1=0.5, b2=0.5)}
    return optax.partition(parts, labels)


def injected(params):
    rest = optax.inject_hyperparams(optax.sgd)(halving, momentum=0.5)
    return optax.chain(optax.clip(1.0), rest)


EXACT = {"schedule": schedule, "masked": masked, "partitioned": partitioned, "injected": injected}


def adam(params):
    return optax.adam(optax.exponential_decay(0.1, 2, 0.5))


def adamw(params):
    clip = optax.clip_by_global_norm(3.0)
    return optax.chain(clip, optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.3))


INNER = {**EXACT, "adam": adam, "adamw": adamw}


def gradients(seed, shapes):
    """Every row of every table once, in another order for each; the first slice is padding."""
    rng, grads = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if name == "bias":
            grads[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
        else:
            ids = jnp.asarray([ROWS, *rng.permutation(ROWS)], jnp.int32)
            values = jnp.asarray(rng.normal(size=(ROWS + 1, *shape[1:])), jnp.float32)
            grads[name] = IndexedSlices(ids, values, shape)
    return grads


def run(tx, shapes, densify):
    params = trees.draw(shapes)
    state, history = tx.init(params), []

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jaxaccum.apply_updates(params, updates), state

    for seed in range(LENGTH):
        grads = gradients(seed, shapes)
        params, state = step(params, state, trees.densified(grads) if densify else grads)
        history.append(params)
    return history, state


def compare(inner, num_tables, num_required, reduction, check):
    of = shapes(num_tables)
    tx = INNER[inner](of)
    tables = {name: name != "bias" for name in of}
    ours = jaxaccum.accumulate(tx, num_required, tables=tables, capacity=ROWS, reduction=reduction)
    peer = optax.MultiSteps(tx, num_required, use_grad_mean=reduction == "mean_per_gradient")
    actual, state = run(ours, of, densify=False)
    expected, peer_state = run(peer, of, densify=True)
    check(actual, expected)
    check(state.inner_state, peer_state.inner_opt_state)
    assert state.global_step == peer_state.gradient_step > 1
    assert state.num_accumulated == peer_state.mini_step


@pytest.mark.parametrize(
    ("inner", "num_tables"),
    [
        ("partitioned", 2),
        *(pytest.param(inner, 1, marks=pytest.mark.full) for inner in EXACT),
        pytest.param("masked", 7, marks=pytest.mark.full),
        pytest.param("partitioned", 26, marks=pytest.mark.full),
    ],
)
def test_sums_are_the_same_bit_for_bit(inner, num_tables):
    def check(actual, expected):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    compare(inner, num_tables, lambda step: 1 + step % 3, "sum", check)


@pytest.mark.parametrize("num_required", [3, lambda step: 1 + (step + 1) % 3])
@pytest.mark.parametrize("inner", in_breadth(INNER, {"adamw"}))
def test_means_are_the_same(inner, num_required):
    """To rounding: optax's are running means."""

    def check(actual, expected):
        trees.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    compare(inner, 3, num_required, "mean_per_gradient", check)
