"""A run that nobody watches: a skewed stream, half precision, bad batches, new ids after a while.

Clicks on bags of items that come by Zipf's law are predicted from a table of item vectors. Halfway
the stream becomes less skewed, so that a step touches more rows than it was set up for; now and
then a batch has a NaN in it; and the loss is computed in float16, under a scale that follows the
verdicts. `jaxaccum.accumulate` goes on through all of that, and says what happened. At each report
the program gives it the capacity that would have done.

    python examples/overnight.py [--batches 8000] [--capacity 4000] [--fixed]
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

import jaxaccum

TABLES = {"items": True, "head": False}
BAG = 4  # items that are shown together
GROWS_AFTER = 100  # so many finite gradients double the scale, as one that is not halves it


class Stream:
    """Bags of items by Zipf's law, and whether they were clicked; every so often a NaN."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rng = np.random.default_rng(options.seed)
        self.names = self.rng.permutation(options.rows).astype(np.int32)
        self.taste = self.rng.choice([-1.0, 1.0], options.rows)
        self.size, self.bad = options.batch_size, options.bad

    def draw(self, batches: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
        """Items ``[batches, size, BAG]`` and clicks ``[batches, size]``."""
        odds = np.cumsum(1.0 / np.arange(1, len(self.names) + 1) ** skew)
        drawn = self.rng.random((batches, self.size, BAG)) * odds[-1]
        items = self.names[np.minimum(np.searchsorted(odds, drawn), len(odds) - 1)]
        clicks = (self.taste[items].sum(axis=-1) > 0).astype(np.float32)
        clicks[self.rng.random(batches) < self.bad, 0] = np.nan
        return items, clicks


def click_loss(params: Any, items: jax.Array, clicks: jax.Array, scale: jax.Array) -> Any:
    """Mean log loss, times ``scale``, through logits in float16."""
    vectors = params["items"][items].astype(jnp.float16)
    logits = jnp.sum(vectors, axis=1) @ params["head"].astype(jnp.float16)
    losses = optax.sigmoid_binary_cross_entropy(logits, clicks.astype(jnp.float16))
    return jnp.mean(losses).astype(jnp.float32) * scale, jnp.mean(losses.astype(jnp.float32))


def transform(options: argparse.Namespace, capacity: int) -> Any:
    adam = jaxaccum.lazy_rows(optax.adam(options.learning_rate))
    capacity = {"items": capacity, "head": None}
    return jaxaccum.accumulate(
        adam, options.micro_batches, tables=TABLES, capacity=capacity, skip=optax.skip_not_finite
    )


def make_loop(tx: Any) -> Any:
    """A function that takes all batches that it is given, in one compiled loop."""
    grad_fn = jaxaccum.value_and_sparse_grad(click_loss, tables=TABLES, has_aux=True)

    def advance(carry: Any, batch: Any) -> Any:
        params, state, scale, streak = carry
        (_, loss), grads = grad_fn(params, *batch, scale)
        grads = jaxaccum.map_values(lambda g: g.astype(jnp.float32) / scale, grads)
        updates, state = tx.update(grads, state, params)
        is_finite = state.verdict != jaxaccum.Verdict.SKIPPED
        streak = jnp.where(is_finite, streak + 1, 0)
        scale = jnp.where(is_finite, scale, scale / 2)
        scale = jnp.where(streak == GROWS_AFTER, scale * 2, scale)
        streak = jnp.where(streak == GROWS_AFTER, 0, streak)
        return (jaxaccum.apply_updates(params, updates), state, scale, streak), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(carry: Any, items: jax.Array, clicks: jax.Array) -> Any:
        return jax.lax.scan(advance, carry, (items, clicks))

    return loop


def report(num_batches: int, losses: jax.Array, state: Any, scale: jax.Array) -> list[str]:
    """What to look at in the morning."""
    *_, skipped = state.verdict_counts.tolist()
    return [
        f"{num_batches:,}",
        f"{np.nanmean(losses):.3f}",
        f"{int(state.global_step):,}",
        f"{int(state.num_early):,}",
        f"{skipped:,}",
        f"2^{np.log2(scale):.0f}",
        f"{int(state.peak_rows[0]):,} of {state.sums['items'].values.shape[0]:,}",
    ]


def train(options: argparse.Namespace) -> None:
    console, stream = rich.console.Console(), Stream(options)
    seen, _ = stream.draw(50 * options.micro_batches, options.skew)
    capacity = options.capacity or jaxaccum.suggest_capacity(seen, options.micro_batches)
    tx = transform(options, capacity)
    loop = make_loop(tx)
    key = jax.random.key(options.seed)
    params = {
        "items": 0.1 * jax.random.normal(key, (options.rows, options.dim), jnp.float32),
        "head": jnp.ones(options.dim, jnp.float32),
    }
    carry = (params, tx.init(params), jnp.float32(2.0**24), jnp.int32(0))
    table = rich.table.Table("batches", "loss", "steps", "early", "skipped", "scale", "rows held")
    start, early = time.perf_counter(), 0
    for done in range(0, options.batches, options.report):
        skew = options.skew if done < options.batches / 2 else options.later_skew
        carry, losses = loop(carry, *stream.draw(options.report, skew))
        params, state, *rest = carry
        table.add_row(*report(done + options.report, losses, state, rest[0]))
        if state.num_early > early and not options.fixed:
            early = int(state.num_early)
            tx = transform(options, state.needed_capacity()["items"])
            params, state = jaxaccum.grow_tables(tx, params, state)
            carry, loop = (params, state, *rest), make_loop(tx)
    console.print(table)
    console.print(f"{options.batches:,} batches in {time.perf_counter() - start:.0f} seconds")


def make_parser() -> running.Parser:
    parser = running.Parser(__file__, __doc__)
    parser.number("--batches", 8000, "micro-batches in all")
    parser.number("--report", 1000, "a report every so many of them")
    parser.number("--micro-batches", 8, "micro-batches of a step")
    parser.number("--batch-size", 256, "bags in a micro-batch")
    parser.number("--rows", 200_000, "items there are")
    parser.number("--dim", 16, "numbers an item")
    parser.number("--skew", 1.2, "exponent of Zipf's law", low=0)
    parser.number("--later-skew", 0.9, "the same from halfway on", low=0)
    parser.number("--bad", 0.002, "share of batches with a NaN", low=0)
    parser.number(
        "--capacity", None, "rows of a step; by default as suggested by the first batches"
    )
    parser.add_argument("--fixed", action="store_true", help="never grow")
    parser.number("--learning-rate", 0.02, "of Adam", low=0)
    parser.number("--seed", 0, "of what is drawn", low=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    return parser.run(lambda: train(options))


if __name__ == "__main__":
    raise SystemExit(main())
