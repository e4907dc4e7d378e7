"""Many devices: what they hold together, tables in shards, and what lies where on a mesh.

Inside of mapped code: ``all_merge`` and ``all_sum`` over ``exchange``, and ``sharded_table``.
Outside of it: ``mesh``. Stands on ``_accumulator`` and ``_rows``; knows no optax and no threads.
"""
