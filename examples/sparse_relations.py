"""Which links of WordNet carry a concept to another, by the gradient of sparse matrices.

Two relations between 117,659 concepts, "is a" and "is part of", are sparse matrices. A jitted
function adds them (``sparse_add``, each with its own weight), cuts out the block of the first
40,000 concepts (``sparse_slice``), lets activation spread from one of them and reads it off at
another.
Its gradient has an entry for every stored link, so the largest ones are the links that matter:
no dense matrix of 117,659 x 117,659 ever exists.
"""

from __future__ import annotations

import running  # before JAX: from here on Ctrl-C ends in one line

# isort: split
import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

import jaxaccum

DATA = pathlib.Path(__file__).parent / "data" / "wordnet3.npz"
BLOCK = 40_000
ROOM = 65_536  # links the block may hold; too few would be an error, not a loss


def relation(triples: np.ndarray, kind: int, num_entities: int) -> sparse.BCOO:
    """The links of one relation, sorted: then adding merges them without a sort."""
    links = np.unique(triples[triples[:, 1] == kind][:, [0, 2]], axis=0)
    return sparse.BCOO(
        (jnp.ones(len(links)), jnp.asarray(links)),
        shape=(num_entities, num_entities),
        indices_sorted=True,
        unique_indices=True,
    )


def activation(
    links: tuple[jax.Array, jax.Array],
    weights: jax.Array,
    *,
    relations: tuple[sparse.BCOO, sparse.BCOO],
    ends: tuple[int, int],
    options: argparse.Namespace,
) -> jax.Array:
    """What reaches the last of ``ends`` when the first is activated."""
    is_a, part_of = (
        sparse.BCOO(
            (weight * values, mat.indices),
            shape=mat.shape,
            indices_sorted=True,
            unique_indices=True,
        )
        for weight, values, mat in zip(weights, links, relations, strict=True)
    )
    both = jaxaccum.sparse_add(is_a, part_of)
    block = jaxaccum.sparse_slice(both, (0, 0), (BLOCK, BLOCK), nse=ROOM)
    active = jnp.zeros(BLOCK).at[ends[0]].set(1.0)
    reached = jnp.zeros(())
    for _ in range(options.steps):
        active = options.decay * (active @ block)
        reached += active[ends[1]]
    return reached


def make_parser() -> running.Parser:
    parser = running.Parser(__file__, __doc__)
    add = parser.add_argument
    for flag, default, text in (
        ("--start", "accelerator.n.01", "concept that is activated"),
        ("--goal", "artifact.n.01", "concept where activation is read off"),
    ):
        add(flag, default=default, metavar="SYNSET", help=f"{text} (default: {default})")
    parser.number("--steps", 8, "links that activation may go")
    parser.number("--decay", 0.5, "what is left of it after a link", low=0)
    return parser


def work(options: argparse.Namespace) -> None:
    with np.load(DATA) as data:
        triples = np.concatenate([data["train"], data["valid"], data["test"]])
        names, kinds = (str(data[key]).split("\n") for key in ("entities", "relations"))
    for name in (options.start, options.goal):
        if name not in names[:BLOCK]:
            raise running.UserError(f"{name} is none of the first {BLOCK:,} concepts")
    relations = tuple(
        relation(triples, kinds.index(kind), len(names)) for kind in ("hypernym", "part_holonym")
    )
    ends = names.index(options.start), names.index(options.goal)
    value = functools.partial(activation, relations=relations, ends=ends, options=options)
    links, weights = tuple(mat.data for mat in relations), jnp.array([1.0, 0.5])
    reached, (by_link, by_weight) = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(
        links, weights
    )
    print(f"from {options.start} to {options.goal}: {reached:.5f}")
    if reached == 0:
        print(f"no way of at most {running.count(options.steps, 'link')}")
        return
    for kind, slope in zip(("is a", "is part of"), by_weight, strict=True):
        print(f"  change with the weight of {kind!r}: {slope:.5f}")
    print("links it depends on:")
    for kind, mat, slopes in zip(("is a", "is part of"), relations, by_link, strict=True):
        for row in np.argsort(-np.asarray(slopes), kind="stable")[: np.count_nonzero(slopes)]:
            head, tail = mat.indices[row]
            print(f"  {slopes[row]:.5f}  {names[head]} {kind} {names[tail]}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    return parser.run(lambda: work(options))


if __name__ == "__main__":
    raise SystemExit(main())
