"""Names for trees of arrays, whose leaves no type checker can follow."""

from __future__ import annotations

from typing import Any, TypeAlias

PyTree: TypeAlias = Any
"""Any pytree: nested containers of arrays, a single array included."""

Leaf: TypeAlias = Any
"""What stands in a tree: an array, its shape, a gradient held as rows, or what else users put."""
