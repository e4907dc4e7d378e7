"""One Ray cluster for the tests of a process; they are left out where Ray is not installed."""

import logging
import os
import pathlib
import warnings

import pytest


@pytest.fixture(scope="session")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxaccum[ray]'")
    helpers = pathlib.Path(__file__).parent
    examples = helpers.parents[1] / "examples"
    path = os.pathsep.join(
        filter(None, [str(helpers), str(examples), os.environ.get("PYTHONPATH")])
    )
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    with warnings.catch_warnings():
        # Ray forks, and at once becomes another program; JAX, if there is any yet, warns of it.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
        ray.init(
            "local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=200 * 2**20,
            runtime_env={"env_vars": environment},
        )
    yield ray
    ray.shutdown()
