"""`value_and_sparse_grad`: a traced backward pass, with the cotangents of tables kept as rows.

Offers that one function. Stands on ``_rows`` alone; knows nothing of what becomes of a gradient.
"""
