"""Strictness for every test: no silent promotion, several devices, x64 by ``JAX_ENABLE_X64``."""

import importlib.metadata
import os
import pathlib

import hypothesis
import jax
import platforms
import pytest

pytest_plugins = ["ray_cluster"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first call of a jitted function compiles, so a time limit would measure the compiler.
_HABITS = {"deadline": None, "print_blob": True}
hypothesis.settings.register_profile("quick", derandomize=True, max_examples=6, **_HABITS)
hypothesis.settings.register_profile("full", max_examples=25, **_HABITS)
hypothesis.settings.load_profile("quick")


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="all dtypes, shapes and sizes, and new random programs (reproduce them by the seed "
        "that is printed, with --hypothesis-seed): what the gate runs",
    )
    parser.addoption(
        "--platform",
        choices=["cuda", "rocm", "tpu"],
        help="run on the CPU what programs for this platform are made of",
    )


# Devices are threads here. Where they do not all come to a collective within 40 s, as on a busy
# machine, XLA would end the process.
DEVICES = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# Much of a run is XLA making programs fast that run once. By default they are compiled with less
# care, and with --full as users get them: what is computed must be the same. A flag that a version
# does not know would end the process, so each version has its own.
_HASTY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
HASTY = {"0.10": f"{_HASTY} --xla_cpu_use_fusion_emitters=false", "0.12": _HASTY}


def pytest_configure(config):
    if config.getoption("--platform"):
        jax.lax.platform_dependent = platforms.choose_for(config.getoption("--platform"))
    # Read once, when the first device is asked for: before any test is imported.
    version = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
    hasty = "" if config.getoption("--full") else HASTY.get(version, "")
    os.environ.setdefault("XLA_FLAGS", f"{DEVICES} {hasty}")
    if config.getoption("--full"):
        hypothesis.settings.load_profile("full")
        if not config.getoption("--hypothesis-seed"):
            config.option.hypothesis_seed = str(int.from_bytes(os.urandom(4)))


def pytest_report_header(config):
    seed = config.getoption("--hypothesis-seed")
    return f"random programs drawn with --hypothesis-seed={seed}" if seed else None


def pytest_collection_modifyitems(config, items):
    if "aot" not in (config.getoption("markexpr") or ""):
        compiled = [item for item in items if item.get_closest_marker("aot")]
        config.hook.pytest_deselected(items=compiled)
        items[:] = [item for item in items if item not in compiled]
    for option, has_it, marker in (("--full", False, "full"), ("--platform", True, "cpu")):
        if bool(config.getoption(option)) is has_it:
            left_out = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]


# A compiled program takes some thirty memory maps, of which Linux gives a process 65,530 by
# default; without one the compiler ends the process, and says no word.
MAPS, MANY_MAPS = pathlib.Path("/proc/self/maps"), 15_000


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def optax_promotes():
    """optax multiplies ints with floats, which the strict setting of the other tests forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def as_it_comes():
    """JAX with the settings of a user who has set nothing, for what the documentation shows."""
    settings = {
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
        "jax_enable_x64": False,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, setting in settings.items():
        jax.config.update(name, setting)  # in all threads
    yield
    for name, setting in before.items():
        jax.config.update(name, setting)
