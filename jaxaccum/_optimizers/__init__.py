"""optax on the rows a gradient touches: a transform made lazy, micro-batches, updates applied.

The one room that knows optax, which is imported when a transform is built and never before. Stands
on ``_accumulator`` and ``_rows``; knows no meshes and no threads.
"""
