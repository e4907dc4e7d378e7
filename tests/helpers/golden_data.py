"""Reads the golden vectors, wherever the tests are run from."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "golden"


def cases(file: str) -> list[dict[str, Any]]:
    """The cases of a golden file that this run can hold: 64-bit dtypes need x64."""
    every = json.loads((FOLDER / file).read_text())["cases"]
    assert every
    return [case for case in every if is_representable(case.get("dtype", "float32"))]


def some_cases(file: str, drawn: int = 16) -> list[Any]:
    """The same as parameters of a test; all but ``drawn`` random ones wait for ``--full``."""
    every = cases(file)
    random = [case["name"] for case in every if case["name"].startswith("random-")]
    late = set(random[drawn:])
    return [
        pytest.param(
            case, id=case["name"], marks=[pytest.mark.full] if case["name"] in late else []
        )
        for case in every
    ]


def is_representable(dtype: str) -> bool:
    return jax.dtypes.canonicalize_dtype(dtype) == jnp.dtype(dtype)


def array(arr: dict[str, Any]) -> np.ndarray:
    """The NumPy array that a golden ``{"dtype", "shape", "data"}`` stands for."""
    dtype = jnp.dtype(arr["dtype"])
    if jnp.issubdtype(dtype, jnp.complexfloating):
        pairs = np.array(arr["data"], np.float64).reshape(*arr["shape"], 2)
        return (pairs[..., 0] + 1j * pairs[..., 1]).astype(dtype)
    # float() reads the strings that stand for what is not finite.
    data = np.array(arr["data"], object).reshape(arr["shape"])
    if jnp.issubdtype(dtype, jnp.floating):
        data = np.vectorize(float, otypes=[np.float64])(data) if data.size else data
    return data.astype(dtype)
