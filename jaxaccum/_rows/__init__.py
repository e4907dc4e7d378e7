"""The floor: what a row, its padding and a table are, and arithmetic every other room needs.

Offers `IndexedSlices` and its checks, which leaves of a tree are tables, rows made unique, gathered
and scattered, exact quotients, prefix sums. Knows nothing of accumulators, optimizers or threads.
"""
