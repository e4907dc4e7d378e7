"""The machine, the date and the versions that a figure is worthless without."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "flax", "equinox", "dm-haiku")


def describe() -> dict[str, Any]:
    """What JAX runs on here; asks for its devices."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "platform": device.platform,
        "device": device.device_kind,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Its name, as Linux tells it."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
