"""`sparse_add` and `sparse_slice` of BCOO matrices, and their gradients.

Integer structure first, then values. Stands on ``_rows`` alone; knows nothing of accumulators.
"""
