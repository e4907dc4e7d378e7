"""optax is an optional extra: imported when a transform is built, never with the package."""

from __future__ import annotations

import importlib
import types


def import_optax(caller: str) -> types.ModuleType:
    """Returns the optax module.

    Raises:
      ImportError: optax is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module("optax")
    except ImportError as err:
        raise ImportError(f"{caller} needs optax: pip install 'jaxaccum[optax]'") from err
