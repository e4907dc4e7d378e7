"""Many threads, one accumulator: one lock, one queue of takers, the sums of one tree on the device.

The one room of locks, clocks and NumPy reads; it does no arithmetic on gradients. Stands on
``_accumulator`` and ``_rows``; knows nothing of TensorFlow's class, whose errors it raises.
"""
