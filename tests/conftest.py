"""Strictness for every test: no silent promotion, several devices, x64 by ``JAX_ENABLE_X64``."""

import contextlib
import os

# Read once, when the first device is asked for; so before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first call of a jitted function compiles, so a time limit would measure the compiler.
hypothesis.settings.register_profile(
    "jaxaccum", deadline=None, derandomize=True, max_examples=25, print_blob=True
)
hypothesis.settings.load_profile("jaxaccum")


@pytest.fixture
def as_it_comes():
    """JAX with the settings of a user who has set nothing, for what the documentation shows."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.enable_x64(False))
        yield
