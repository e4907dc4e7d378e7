"""The floor: what a row, its padding and a table are, and arithmetic every other room needs.

* Gradients: `IndexedSlices` (``indexed_slices``, ``shapes``), each row once (``unique_rows``),
  on trees (``map_values``), kept from those who would do arithmetic on row numbers
  (``strangers``).
* Tables: which leaves are tables (``tables``, ``tree``), rows of them read, written and added
  (``row_arithmetic``), bags of rows (``embedding_bag``), how they lie in memory (``row_major``) and
  on a mesh (``on_mesh``), and what varies over its axes (``varying``).
* Numbers: exact quotients (``quotient``), prefix sums (``prefix_sums``), detours round XLA's CPU
  backend (``cpu_workarounds``).
* Names: of public classes (``public``), and of modules of other libraries (``modules``).

Imports no other room and no optional library: optax, Equinox and Flax are recognised by their
names. Knows nothing of accumulators, optimizers' states or threads.
"""
