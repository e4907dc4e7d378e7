"""Strictness for every test: no silent promotion, several devices, x64 by ``JAX_ENABLE_X64``."""

import os

# Read once, when the first device is asked for; so before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first call of a jitted function compiles, so a time limit would measure the compiler.
hypothesis.settings.register_profile(
    "jaxaccum", deadline=None, derandomize=True, max_examples=25, print_blob=True
)
hypothesis.settings.load_profile("jaxaccum")
