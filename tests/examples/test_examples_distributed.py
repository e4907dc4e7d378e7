"""The examples of many devices and many processes, run as a person would, in a short setting."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import jaxaccum

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SHORT = ["--epochs=1", "--batch=512", "--micro-batches=4", "--dims=8"]
SHORT += ["--train-triples=5000", "--test-triples=20"]


def run(script, *arguments, code=0):
    package = pathlib.Path(jaxaccum.__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / script, *SHORT, *arguments],
        env={**environment, "PYTHONPATH": str(package), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def mrr(output):
    return re.findall(r"MRR ([\d.]+)", output)


@pytest.mark.full
def test_all_ways_train_to_the_same_mrr(tmp_path):
    one, *many = mrr(run("data_parallel.py", "--devices=4"))
    assert float(one) > 0
    assert many == [one, one]
    assert mrr(run("multi_process.py", f"--out={tmp_path}")) == [one]
    resumed = run("multi_process.py", f"--out={tmp_path}", "--resume", "--epochs=2")
    assert "epoch 1:" not in resumed
    assert "epoch 2:" in resumed


def test_what_cannot_work_is_said_in_a_line(tmp_path):
    wrong = {
        "3 devices, --micro-batches 4": ["data_parallel.py", "--devices=3"],
        "16 batches at least": ["data_parallel.py", "--devices=4", "--train-triples=100"],
        "nothing to resume": ["multi_process.py", "--resume", f"--out={tmp_path}"],
    }
    for message, command in wrong.items():
        assert message in run(*command, code=2)
