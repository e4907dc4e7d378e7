"""TensorFlow's names over the coordinator: its class, its shared names, its kernels' refusals.

Nothing in the library but `jaxaccum.raw_ops` stands on this room.
"""
