"""Word embeddings in Equinox (skip-gram with negatives), from the text in Python's own library.

The words are those of the docstrings and comments of the standard library that runs this file. The
table of words gets its gradient as rows from ``jaxaccum.value_and_sparse_grad``, under ``vmap``,
and ``jaxaccum.lazy_rows`` runs optax's Adagrad on these. The table of contexts stays dense.
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import collections
import io
import pathlib
import re
import sysconfig
import time
import tokenize
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table

import jaxaccum

PROBES = ("file", "integer", "raise", "thread", "socket", "first", "red", "encoding")


class SkipGram(eqx.Module):
    """Words and contexts each have a vector; words that meet have a high product."""

    words: eqx.nn.Embedding
    contexts: eqx.nn.Embedding

    def __init__(self, count: int, dim: int, key: jax.Array) -> None:
        vectors = jax.random.normal(key, (count, dim), jnp.float32) / dim
        self.words = eqx.nn.Embedding(weight=vectors)
        self.contexts = eqx.nn.Embedding(weight=jnp.zeros_like(vectors))

    def __call__(self, word: jax.Array, others: jax.Array) -> jax.Array:
        """Scores of one word against others ``[k]``."""
        return jax.vmap(self.contexts)(others) @ self.words(word)


def negatives_loss(model: SkipGram, pairs: jax.Array, negatives: jax.Array) -> jax.Array:
    """The pair should score above 0, the word with words drawn by chance below."""
    others = jnp.concatenate([pairs[:, 1:], negatives], axis=1)
    scores = jax.vmap(model)(pairs[:, 0], others)
    signs = jnp.where(jnp.arange(scores.shape[1]) == 0, 1.0, -1.0).astype(scores.dtype)
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs[None] * scores), axis=1))


def is_table(path: Any, leaf: Any) -> bool:
    """Words only: a step looks up more contexts than there are, and dense is faster there."""
    return jax.tree_util.keystr(path) == ".words.weight"


def make_step(model: SkipGram, weights: np.ndarray, options: argparse.Namespace) -> Any:
    tx = jaxaccum.lazy_rows(optax.adagrad(options.learning_rate, 0.0))
    grad_fn = jaxaccum.value_and_sparse_grad(negatives_loss, tables=is_table)
    edges = jnp.asarray(np.cumsum(weights) / np.sum(weights), jnp.float32)

    @eqx.filter_jit(donate="all-except-first")
    def step(batch: Any, model: SkipGram, state: Any) -> Any:
        pairs, key = batch
        drawn = jax.random.uniform(key, (len(pairs), options.negatives), jnp.float32)
        negatives = jnp.minimum(jnp.searchsorted(edges, drawn), len(edges) - 1)
        value, grads = grad_fn(model, pairs, negatives)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    return tx.init(eqx.filter(model, eqx.is_inexact_array)), step


def library_text(limit: int) -> list[str]:
    """Words of comments and strings of the standard library, in the order of its files."""
    words: list[str] = []
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = io.StringIO(path.read_text("utf-8", errors="replace"))
        try:
            for token in tokenize.generate_tokens(source.readline):
                is_doc = token.type == tokenize.STRING and token.string.endswith('"""')
                if is_doc or token.type == tokenize.COMMENT:
                    words.extend(re.findall(r"[a-z]{2,}", token.string.lower()))
        except (tokenize.TokenError, SyntaxError):
            continue
        if len(words) >= limit:
            break
    return words[:limit]


def pairs_of(ids: np.ndarray, window: int) -> np.ndarray:
    """All pairs of words at most ``window`` apart, both ways."""
    near = [np.stack([ids[k:], ids[:-k]], axis=1) for k in range(1, window + 1)]
    both = np.concatenate(near)
    return np.concatenate([both, both[:, ::-1]]).astype(np.int32)


def neighbours(vectors: np.ndarray, vocabulary: list[str], count: int = 6) -> rich.table.Table:
    table = rich.table.Table("word", "nearest")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for word in (word for word in PROBES if word in vocabulary):
        likeness = unit @ unit[vocabulary.index(word)]
        best = np.argsort(-likeness)[1 : count + 1]
        table.add_row(word, ", ".join(vocabulary[i] for i in best))
    return table


def train(options: argparse.Namespace, words: list[str]) -> None:
    console = rich.console.Console()
    counts = collections.Counter(words)
    vocabulary = [word for word, count in counts.most_common() if count >= options.min_count]
    index = {word: i for i, word in enumerate(vocabulary)}
    frequent = np.array([counts[word] for word in vocabulary], float)
    rng = np.random.default_rng(options.seed)
    ids = np.array([index[word] for word in words if word in index])
    share = frequent[ids] / frequent.sum()
    ids = ids[rng.random(len(ids)) < np.sqrt(1e-3 / share)]  # thin out the most frequent words
    pairs = pairs_of(ids, options.window)
    console.print(f"{len(words):,} words, {len(vocabulary):,} different, {len(pairs):,} pairs")
    model = SkipGram(len(vocabulary), options.dim, jax.random.key(options.seed))
    state, step = make_step(model, frequent**0.75, options)
    losses, start = [], 0.0
    for number in rich.progress.track(range(options.steps), "training", console=console):
        picked = pairs[rng.integers(0, len(pairs), options.batch)]
        model, state, loss = step((picked, jax.random.key(number)), model, state)
        losses.append(loss)
        if number == 0:  # the first step compiles
            loss.block_until_ready()
            start = time.perf_counter()
    ends = [float(jnp.mean(jnp.stack(part))) for part in (losses[:50], losses[-50:])]
    speed = (time.perf_counter() - start) / max(options.steps - 1, 1) * 1e3
    told = f"; {speed:.2f} ms a step" if options.steps > 1 else ""
    console.print(f"loss {ends[0]:.3f} at first, {ends[1]:.3f} at last{told}")
    console.print(neighbours(np.asarray(model.words.weight), vocabulary))


def make_parser() -> running.Parser:
    parser = running.Parser(__file__, __doc__)
    parser.number("--steps", 3000, "updates of the tables")
    parser.number("--batch", 2048, "pairs an update is computed from")
    parser.number("--words", 500_000, "read at most so many")
    parser.number("--min-count", 3, "leave out words that are rarer")
    parser.number("--window", 4, "words at most so far apart are a pair")
    parser.number("--negatives", 8, "random words a pair is told from")
    parser.number("--dim", 64, "numbers a word")
    parser.number("--learning-rate", 0.05, "of Adagrad", low=0)
    parser.number("--seed", 0, "of tables, order and negatives", low=0)
    return parser


def work(options: argparse.Namespace) -> None:
    words = library_text(options.words)
    if len(words) < 1000:
        raise running.UserError(f"{len(words)} words are too few to learn from")
    train(options, words)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    return parser.run(lambda: work(options))


if __name__ == "__main__":
    raise SystemExit(main())
