"""The asynchronous example: it trains, counts what it drops, and ends whatever happens."""

import pathlib
import re
import sys
import threading

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import async_workers as example  # noqa: E402
import complex_model as model  # noqa: E402

pytestmark = pytest.mark.slow

NUM_ENTITIES = 30
SHORT = ["--batch=32", "--negatives=16", "--dims=4", "--test-triples=20", "--n3=0"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A ring of entities: who follows whom."""
    ring = np.arange(NUM_ENTITIES, dtype=np.int32)
    triples = np.stack([ring, np.zeros_like(ring), np.roll(ring, -1)], axis=1)
    path = tmp_path_factory.mktemp("ring") / "ring.npz"
    names = "\n".join(f"thing{i}.n.01" for i in ring)
    splits = dict.fromkeys(("train", "valid", "test"), triples)
    np.savez(path, entities=np.array(names), relations=np.array("next"), **splits)
    return path


def run(data, capsys, *options):
    before = set(threading.enumerate())
    example.main([*SHORT, f"--data={data}", *options])
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # rich's ends a moment after its table
        assert not thread.is_alive(), thread
    out = capsys.readouterr().out
    (updates, stale), mrr = (
        map(int, re.search(r"(\d+) updates, (\d+) stale", out).groups()),
        float(re.search(r"MRR (\S+),", out)[1]),
    )
    total = re.search(r"all +│ (\d+) +│ (\d+)", out)
    assert int(total[2]) == stale
    return updates, int(total[1]), stale, mrr


@pytest.mark.parametrize("staleness", [0, 3])
def test_it_learns_the_ring(data, capsys, staleness):
    updates, accepted, stale, mrr = run(
        data, capsys, "--updates=150", "--workers=2", f"--staleness={staleness}"
    )
    assert updates == 150
    assert accepted + stale >= 2 * 150 - 2
    assert mrr > 0.9


def test_what_comes_too_late_is_dropped_and_counted(data, capsys):
    """Three workers, two wanted: the one that is slow holds up nobody."""
    updates, accepted, stale, _ = run(
        data, capsys, "--updates=30", "--workers=2", "--backup=1", "--staleness=0", "--slow=0.02"
    )
    assert updates == 30
    assert stale > 0
    assert accepted >= 2 * 30 - 3


def test_a_worker_that_fails_ends_the_run(data, monkeypatch):
    def fail(*_):
        raise MemoryError("none left")

    monkeypatch.setattr(example, "gradient", fail)
    with pytest.raises(SystemExit, match="none left"):
        example.main([*SHORT, f"--data={data}"])


@pytest.mark.parametrize("option", ["--workers=0", "--slow=-1", "--batch=x"])
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        example.main([option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_it_says_what_is_wrong_with_the_data(tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main([f"--data={tmp_path / 'missing.npz'}"])
    printed = capsys.readouterr().err
    assert printed.startswith("async_workers.py: error: ")
    assert len(printed.splitlines()) == 1
    assert model.DATA.exists()
