"""optax is an optional extra: imported when a transform is built, never with the package."""

from __future__ import annotations

import importlib
import types
from typing import Protocol

from jaxaccum._rows.tree import PyTree


class Transform(Protocol):
    """What is used of an optax transform, with extra arguments or without."""

    def init(self, params: PyTree, /) -> PyTree:
        """Returns the state before the first step."""

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, /, **extra_args: object
    ) -> tuple[PyTree, PyTree]:
        """Returns the updates to be added to ``params``, and the new state."""


def import_optax(caller: str) -> types.ModuleType:
    """Returns the optax module.

    Raises:
      ImportError: optax is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module("optax")
    except ImportError as err:
        raise ImportError(f"{caller} needs optax: pip install 'jaxaccum[optax]'") from err
