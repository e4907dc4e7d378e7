"""`sparse_add` and `sparse_slice` of BCOO matrices, and their gradients.

Integer structure first, then values: ``keys`` folds rows of indices into integers and searches
them, ``places`` finds where each entry goes in the result, ``match`` pairs rows of which no shape
is known. ``checks`` refuses wrong calls, ``bounds`` works out limits, ``ops`` holds the ops and
their rules, ``raw_grads`` their gradients from bare indices. Stands on ``_rows`` alone; knows
nothing of accumulators.
"""
