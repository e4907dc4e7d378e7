"""What users import, they find as ``jaxaccum.X``, whatever file it lives in."""

from __future__ import annotations

from typing import TypeVar

_Class = TypeVar("_Class", bound=type)


def public(cls: _Class) -> _Class:
    """Names a class after the package, so that pickles and tracebacks survive moves within it."""
    cls.__module__ = "jaxaccum"
    return cls
