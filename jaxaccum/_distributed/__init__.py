"""Many devices: what they hold together, tables in shards, and what lies where on a mesh.

Stands on ``_accumulator`` and ``_rows``; knows no optax and no threads.
"""
