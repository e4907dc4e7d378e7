"""ComplEx embeddings of a knowledge graph: data, model, sampling, Adagrad on rows, evaluation.

The parts that the WordNet examples share. Everything of which there is one for each table, be it
parameters, row ids or gradients, is a `Tables` pair.

Model: Trouillon et al. 2016. Reciprocal relations and the N3 regulariser: Lacroix et al. 2018.

Shapes: V entities, R relations, B triples and N negatives in a micro-batch, D complex dimensions.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import zipfile
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum

DATA = pathlib.Path(__file__).parent / "data" / "wordnet3.npz"
SPLITS = ("train", "valid", "test")


class Tables(NamedTuple):
    """One value for the table of entities and one for the table of relations."""

    entities: Any
    relations: Any


@dataclasses.dataclass(frozen=True)
class Graph:
    """Triples (head, relation, tail) of a knowledge graph, int32 ``[n, 3]``, and what they name."""

    entities: list[str]
    relations: list[str]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def rows(self, names: list[str]) -> list[int]:
        """Rows of the entities of these names.

        Raises:
          ValueError: there is none of such a name; says which are near.
        """
        row = {name: i for i, name in enumerate(self.entities)}
        for name in names:
            if name not in row:
                word = name.split(".")[0].lower()
                same = [n for n in self.entities if n.split(".")[0].lower() == word]
                close = same[:4] or difflib.get_close_matches(name, self.entities, 4, 0.5)
                hint = f"; near it: {', '.join(close)}" if close else ""
                raise ValueError(f"there is no synset {name!r}{hint}")
        return [row[name] for name in names]

    def reciprocal(self, triples: np.ndarray) -> np.ndarray:
        """Adds (tail, R + relation, head) for each triple: every question then asks for a tail."""
        swapped = triples[:, [2, 1, 0]] + np.array([0, len(self.relations), 0], np.int32)
        return np.concatenate([triples, swapped])

    def is_linked(self, triples: np.ndarray) -> np.ndarray:
        """Which of the pairs stand in train with another relation, or the other way round."""
        linked = self.train[:, [0, 2]].astype(np.int64) @ [len(self.entities), 1]
        pairs, swapped = ([len(self.entities), 1], [1, len(self.entities)])
        ends = triples[:, [0, 2]].astype(np.int64)
        return np.isin(ends @ pairs, linked) | np.isin(ends @ swapped, linked)


def load_graph(path: pathlib.Path = DATA) -> Graph:
    """Reads a graph, and checks that its ids lie within its names.

    Raises:
      OSError: there is no such file.
      ValueError: it holds no graph.
    """
    damage = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError)
    try:
        with path.open("rb") as file, np.load(file) as archive:
            arrays = {name: archive[name] for name in (*SPLITS, "entities", "relations")}
    except damage as error:
        raise ValueError(f"{path} is damaged or no knowledge graph ({error})") from error
    names = {name: str(arrays[name]).split("\n") for name in ("entities", "relations")}
    sizes = np.array([len(names["entities"]), len(names["relations"]), len(names["entities"])])
    for split in SPLITS:
        triples = arrays[split]
        if triples.dtype != np.int32 or triples.ndim != 2 or triples.shape[1] != 3:
            raise ValueError(
                f"{path}: {split} must be int32 [n, 3], is {triples.dtype} {list(triples.shape)}"
            )
        if len(triples) == 0 or (triples < 0).any() or (triples >= sizes).any():
            raise ValueError(f"{path}: {split} is empty or has ids beyond the names given")
    return Graph(**names, **{split: arrays[split] for split in SPLITS})


def init_params(key: jax.Array, graph: Graph, dims: int, scale: float = 0.05) -> Tables:
    """Random tables, float32 ``[V, 2 D]`` and ``[2 R, 2 D]``: real parts, then imaginary ones."""
    rows = Tables(len(graph.entities), 2 * len(graph.relations))
    keys = Tables(*jax.random.split(key))
    return jax.tree.map(
        lambda k, n: scale * jax.random.normal(k, (n, 2 * dims), jnp.float32), keys, rows
    )


def shuffled_batches(
    triples: np.ndarray, seed: int, epoch: int, shape: tuple[int, ...]
) -> np.ndarray:
    """The triples in the order of one epoch, int32 ``[*shape, 3]``; what is left over stays out."""
    order = np.random.default_rng((seed, epoch)).permutation(len(triples))
    return triples[order[: np.prod(shape)]].reshape(*shape, 3)


def sample_lookups(
    key: jax.Array, triples: jax.Array, num_negatives: int, num_entities: int
) -> Tables:
    """The rows a micro-batch looks up: heads, tails and shared random negatives; relations.

    Args:
      key: of the random draw.
      triples: int32 ``[B, 3]``.
      num_negatives: N.
      num_entities: V.

    Returns:
      Row ids, int32 ``[2 B + N]`` and ``[B]``.
    """
    negatives = jax.random.randint(key, (num_negatives,), 0, num_entities, jnp.int32)
    return Tables(jnp.concatenate([triples[:, 0], triples[:, 2], negatives]), triples[:, 1])


def gather(params: Tables, lookups: Tables) -> Tables:
    """The rows looked up, ``[2 B + N, 2 D]`` and ``[B, 2 D]``."""
    return jax.tree.map(lambda table, ids: table.at[ids].get(mode="clip"), params, lookups)


def loss(rows: Tables, n3: float) -> jax.Array:
    """Cross entropy of the true tail among the negatives, plus ``n3`` times the cubed moduli.

    Args:
      rows: what `gather` returns.
      n3: weight of the regulariser.

    Returns:
      The mean over the micro-batch, ``[]``.
    """
    batch = rows.relations.shape[0]
    heads, tails, negatives = jnp.split(rows.entities, [batch, 2 * batch])
    queries = _complex_product(heads, rows.relations)
    true = jnp.sum(queries * tails, axis=-1)
    false = queries @ negatives.T
    entropy = jnp.logaddexp(true, jax.nn.logsumexp(false, axis=-1)) - true
    cubes = [_squared_modulus(x) ** 1.5 for x in (heads, rows.relations, tails)]
    return jnp.mean(entropy) + n3 * sum(jnp.sum(c) for c in cubes) / batch


def sparse_grads(params: Tables, lookups: Tables, n3: float) -> tuple[jax.Array, Tables]:
    """The loss, and its gradient as `jaxaccum.IndexedSlices`: only the rows looked up."""
    value, grads = jax.value_and_grad(loss)(gather(params, lookups), n3)
    return value, Tables(*map(_as_slices, params, lookups, grads))


def _as_slices(table: jax.Array, ids: jax.Array, grad: jax.Array) -> jaxaccum.IndexedSlices:
    return jaxaccum.IndexedSlices(ids, grad, table.shape)


def init_accumulators(params: Tables, capacity: int) -> Tables:
    """One accumulator a table, for ``capacity`` rows or the whole table if that is smaller."""

    def init(table: jax.Array) -> jaxaccum.AccumulatorState:
        rows = min(capacity, table.shape[0])
        return jaxaccum.init(table.shape, capacity=rows, reduction="mean_per_gradient")

    return jax.tree.map(init, params)


def adagrad_rows(
    table: jax.Array, squares: jax.Array, grad: jaxaccum.IndexedSlices, learning_rate: float
) -> tuple[jax.Array, jax.Array]:
    """Adagrad (Duchi et al. 2011) on the rows of a gradient that `jaxaccum.take` returned.

    Args:
      table: parameters ``[rows, 2 D]``.
      squares: sums of squared gradients ``[rows, 2 D]``.
      grad: distinct rows, ascending, padding last.
      learning_rate: of the first update; later ones shrink.

    Returns:
      The new ``table`` and ``squares``; what is donated changes in place.
    """
    in_order = {"mode": "drop", "indices_are_sorted": True}
    squares = squares.at[grad.indices].add(grad.values**2, **in_order)
    # Read back from the new buffer: reading the old one here would make XLA copy it whole.
    sums = squares.at[grad.indices].get(mode="fill", fill_value=1)
    update = -learning_rate * grad.values * jax.lax.rsqrt(sums + ADAGRAD_EPS)
    return table.at[grad.indices].add(update, **in_order), squares


# Gradients are means over thousands of triples: squares far below the usual 1e-7 must count.
ADAGRAD_EPS = 1e-12


def filtered_ranks(
    params: Tables, graph: Graph, triples: np.ndarray, block: int = 128
) -> np.ndarray:
    """Rank of the true answer among all entities, for (head, r, ?) and then for (?, r, tail).

    Filtered: the other answers known to be true, in any split, are no competitors. Pessimistic: a
    tie, or a score that is not a number, counts against the model.

    Args:
      params: the tables.
      graph: where the known answers stand.
      triples: int32 ``[n, 3]``.
      block: questions scored at a time, ``block * V * 4`` bytes.

    Returns:
      int ``[2 n]``, the best rank being 1.
    """
    questions = graph.reciprocal(triples)
    known = graph.reciprocal(np.concatenate([graph.train, graph.valid, graph.test]))
    # Known answers, sorted by question: those of question i are answers[first[i] : last[i]].
    key = known[:, 0].astype(np.int64) * (2 * len(graph.relations)) + known[:, 1]
    order = np.argsort(key, kind="stable")
    key, answers = key[order], known[order, 2]
    asked = questions[:, 0].astype(np.int64) * (2 * len(graph.relations)) + questions[:, 1]
    first, last = (np.searchsorted(key, asked, side) for side in ("left", "right"))
    ranks = []
    for start in range(0, len(questions), block):
        part = slice(start, start + block)
        counts = last[part] - first[part]
        row = np.repeat(np.arange(len(counts)), counts)
        spans = zip(first[part], last[part], strict=True)
        column = np.concatenate([answers[a:b] for a, b in spans])
        # Padded to a few shapes, so that few are compiled.
        pairs = _padded(np.stack([row, column], axis=1), 1 << (len(row) - 1).bit_length(), block)
        ranks.append(_block_ranks(params, _padded(questions[part], block, 0), pairs))
    return np.concatenate([np.asarray(r) for r in ranks])[: len(questions)]


def _padded(array: np.ndarray, length: int, value: int) -> np.ndarray:
    missing = length - len(array)
    return np.pad(array, [(0, missing), (0, 0)], constant_values=value).astype(np.int32)


@jax.jit
def _block_ranks(params: Tables, questions: jax.Array, known: jax.Array) -> jax.Array:
    head, relation, tail = questions.T
    scores = _complex_product(params.entities[head], params.relations[relation])
    scores = scores @ params.entities.T
    true = jnp.take_along_axis(scores, tail[:, None], axis=1)
    scores = scores.at[known[:, 0], known[:, 1]].set(-jnp.inf, mode="drop")
    # Where the true score itself is NaN, what was filtered counts as well, the answer included.
    rank = 1 + jnp.sum(~(scores < true), axis=1, dtype=jnp.int32)
    return jnp.minimum(rank, scores.shape[1])


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Mean reciprocal rank, and the share of ranks up to 1, 3 and 10."""
    hits = {f"Hits@{k}": float(np.mean(ranks <= k)) for k in (1, 3, 10)}
    return {"MRR": float(np.mean(1.0 / ranks)), **hits}


def best_answers(
    params: Tables, graph: Graph, row: int, count: int = 3
) -> list[tuple[int, list[tuple[int, str | None]]]]:
    """The answers that score best to (row, relation, ?), for each relation that the entity has.

    As many as there are true ones, in whatever split, but at most ``count``.

    Returns:
      For each relation (row, split) pairs, best first; ``None`` for what is not true.
    """
    known = {
        (relation, tail): split
        for split in reversed(SPLITS)
        for head, relation, tail in getattr(graph, split).tolist()
        if head == row
    }
    answers = []
    real, imaginary = np.split(params.entities[row], 2)
    relations = [relation for relation, _ in known]
    for relation in sorted(set(relations)):
        turn_real, turn_imaginary = np.split(params.relations[relation], 2)
        asked = [real * turn_real - imaginary * turn_imaginary,
                 real * turn_imaginary + imaginary * turn_real]  # fmt: skip
        scores = params.entities @ np.concatenate(asked)
        best = np.argsort(-scores)[: min(count, relations.count(relation))].tolist()
        answers.append((relation, [(tail, known.get((relation, tail))) for tail in best]))
    return answers


def _complex_product(a: jax.Array, b: jax.Array) -> jax.Array:
    (a_re, a_im), (b_re, b_im) = jnp.split(a, 2, axis=-1), jnp.split(b, 2, axis=-1)
    return jnp.concatenate([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], axis=-1)


def _squared_modulus(a: jax.Array) -> jax.Array:
    real, imaginary = jnp.split(a, 2, axis=-1)
    return real**2 + imaginary**2
