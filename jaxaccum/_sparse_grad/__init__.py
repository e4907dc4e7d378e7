"""`value_and_sparse_grad`: a traced backward pass, with the cotangents of tables kept as rows.

Offers that one function. ``evaluate`` goes through the equations (``jaxpr``), of which each has a
rule (``rules``, ``windows``) or holds others (``control_flow``); ``terms`` says what a cotangent is
meanwhile, ``module_arguments`` takes modules of Equinox and Flax apart. Stands on ``_rows``
alone; knows nothing of what becomes of a gradient.
"""
