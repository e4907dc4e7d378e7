"""Gradients gathered in a pytree of fixed capacity, by pure functions.

Offers the state and its verbs (`apply`, `take`, `merge` and the rest), and the index that gives a
row its slot. Stands on ``_rows`` alone; knows no devices, no optax, no threads, no clocks.
"""
