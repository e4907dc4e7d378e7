"""Which of many alike cases run by default."""

import pytest


def in_breadth(names, by_default):
    """All ``names``, those not ``by_default`` only with --full."""
    return [
        name if name in by_default else pytest.param(name, marks=pytest.mark.full) for name in names
    ]
