"""optax on the rows a gradient touches: a transform made lazy, micro-batches, updates applied.

The one room that imports optax, when a transform is built and never before. ``state_layout`` tells
which part of a state is kept by row, ``trial`` whether a transform treats rows apart, ``catch_up``
what a row missed. Stands on ``_accumulator`` and ``_rows``; knows no threads, and of meshes what
``_rows`` tells it.
"""
