"""Word embeddings in Equinox (skip-gram with negatives), from the text in Python's own library.

The words are those of the docstrings and comments of the standard library that runs this file. The
table of words gets its gradient as rows from ``jaxaccum.value_and_sparse_grad``, under ``vmap``,
and ``jaxaccum.lazy_rows`` runs optax's Adagrad on these. The table of contexts stays dense.

    python examples/equinox_word_embeddings.py [--steps 3000] [--dim 64]
"""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import re
import sys
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
    losses, start = [], time.perf_counter()
    for number in rich.progress.track(range(options.steps), "training", console=console):
        picked = pairs[rng.integers(0, len(pairs), options.batch)]
        model, state, loss = step((picked, jax.random.key(number)), model, state)
        losses.append(loss)
    ends = [float(jnp.mean(jnp.stack(part))) for part in (losses[:50], losses[-50:])]
    speed = (time.perf_counter() - start) / options.steps * 1e3
    console.print(f"loss {ends[0]:.3f} at first, {ends[1]:.3f} at last; {speed:.2f} ms a step")
    console.print(neighbours(np.asarray(model.words.weight), vocabulary))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--words", type=int, default=500_000, help="read at most so many")
    parser.add_argument("--min-count", type=int, default=3)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--negatives", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    names = ("steps", "words", "min_count", "window", "negatives", "dim", "batch")
    wrong = [name for name in names if getattr(options, name) < 1]
    words = [] if wrong else library_text(options.words)
    if wrong or len(words) < 1000:
        cause = f"{wrong[0]} must be positive" if wrong else "too few words in the library's text"
        print(f"equinox_word_embeddings: {cause}", file=sys.stderr)
        raise SystemExit(2)
    train(options, words)


if __name__ == "__main__":
    main()
