"""The cases, a module for each topic; importing this registers them all."""

from benchmarks.cases import (
    accumulator,
    compiled,
    coordinator,
    devices,
    gradient,
    losses,
    mesh_roads,
    parameter_server,
    sparse_ops,
    train_step,
    training_loops,
    workarounds,
)

__all__ = [
    "accumulator",
    "compiled",
    "coordinator",
    "devices",
    "gradient",
    "losses",
    "mesh_roads",
    "parameter_server",
    "sparse_ops",
    "train_step",
    "training_loops",
    "workarounds",
]
