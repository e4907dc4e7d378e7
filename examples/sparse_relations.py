"""Which links of WordNet carry a concept to another, by the gradient of sparse matrices.

Two relations between 117,659 concepts, "is a" and "is part of", are sparse matrices. A jitted
function adds them (``sparse_add``, each with its own weight), cuts out the block of the first
40,000 concepts (``sparse_slice``), lets activation spread from one of them and reads it off at
another.
Its gradient has an entry for every stored link, so the largest ones are the links that matter:
no dense matrix of 117,659 x 117,659 ever exists.

    python examples/sparse_relations.py
"""

from __future__ import annotations

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
STEPS, DECAY = 8, 0.5
START, GOAL = "accelerator.n.01", "artifact.n.01"


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
    for _ in range(STEPS):
        active = DECAY * (active @ block)
        reached += active[ends[1]]
    return reached


def main() -> None:
    with np.load(DATA) as data:
        triples = np.concatenate([data["train"], data["valid"], data["test"]])
        names, kinds = (str(data[key]).split("\n") for key in ("entities", "relations"))
    relations = tuple(
        relation(triples, kinds.index(kind), len(names)) for kind in ("hypernym", "part_holonym")
    )
    ends = names.index(START), names.index(GOAL)
    value = functools.partial(activation, relations=relations, ends=ends)
    links, weights = tuple(mat.data for mat in relations), jnp.array([1.0, 0.5])
    reached, (by_link, by_weight) = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(
        links, weights
    )
    print(f"from {START} to {GOAL}: {reached:.5f}")
    for kind, slope in zip(("is a", "is part of"), by_weight, strict=True):
        print(f"  change with the weight of {kind!r}: {slope:.5f}")
    print("links it depends on:")
    for kind, mat, slopes in zip(("is a", "is part of"), relations, by_link, strict=True):
        for row in np.argsort(-np.asarray(slopes), kind="stable")[: np.count_nonzero(slopes)]:
            head, tail = mat.indices[row]
            print(f"  {slopes[row]:.5f}  {names[head]} {kind} {names[tail]}")
    # Activation is a sum of products of links; taking a link away takes its products away.
    heaviest = int(jnp.argmax(by_link[0]))
    without = value((links[0].at[heaviest].set(0.0), links[1]), weights)
    np.testing.assert_allclose(reached - without, by_link[0][heaviest], rtol=1e-5)


if __name__ == "__main__":
    main()
