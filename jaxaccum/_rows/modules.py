"""Modules of other libraries, recognised without importing these.

Nothing can be an instance of a class of a module that nobody has imported.
"""

from __future__ import annotations

import sys
import types

import jax


def find_library(name: str) -> types.ModuleType | None:
    """Returns the module of that name if somebody has imported it."""
    return sys.modules.get(name)


def holds_equinox(tree: object) -> bool:
    """Whether some node of ``tree`` is an Equinox module."""
    equinox = find_library("equinox")
    if equinox is None:
        return False

    def is_module(node: object) -> bool:
        return isinstance(node, equinox.Module)

    return any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module)))


def is_nnx_module(node: object) -> bool:
    """Whether ``node`` is a module of Flax's ``nnx``."""
    nnx = find_library("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Module)
