"""The parameter server's example: it learns a ring, under each policy, whoever is killed."""

import pathlib
import re
import sys

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxaccum[ray]'")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import parameter_server as example
from breadth import in_breadth

pytestmark = pytest.mark.slow

SHORT = ["--batch=32", "--negatives=16", "--dims=4", "--test-triples=20", "--n3=0", "--shards=2"]
SHORT += ["--workers=2", "--required=2", "--checkpoint-every=10", "--updates=120"]


@pytest.fixture
def ring(tmp_path):
    """Thirty entities: who follows whom."""
    entities = np.arange(30, dtype=np.int32)
    triples = np.stack([entities, np.zeros_like(entities), np.roll(entities, -1)], axis=1)
    names = {"entities": "\n".join(map(str, entities)), "relations": "next"}
    path = tmp_path / "ring.npz"
    np.savez(path, train=triples, valid=triples, test=triples, **names)
    return path


@pytest.mark.parametrize(
    "options",
    in_breadth(
        [
            ("--policy=bounded", "--kill=3"),
            ("--policy=sync",),
            ("--policy=weighted",),
            ("--policy=exactly",),
            ("--policy=carry-over", "--staleness=0"),
        ],
        [("--policy=bounded", "--kill=3")],
    ),
)
def test_it_learns_the_ring_and_tells_every_fate(cluster, ring, capsys, options):
    example.main([*SHORT, f"--data={ring}", *options])
    out = " ".join(capsys.readouterr().out.split())
    kills = ["killed worker", "killed worker", "killed a shard"] if "--kill=3" in options else []
    assert re.findall(r"killed (?:worker|a shard|the coord)", out) == kills
    totals = [map(int, row) for row in re.findall(r"│ all │ (\d+) │ (\d+) │ (\d+) │ (\d+)", out)]
    ((accepted, stale, lost, died),) = totals
    ages = map(int, re.findall(r"(\d+) were \d+", out))
    assert accepted + stale == sum(ages)
    assert died == kills.count("killed worker")
    assert bool(lost) <= bool(kills)
    assert float(re.search(r"MRR (\S+),", out)[1]) > 0.9
    assert accepted >= 2 * 120


def test_bad_options_are_refused(capsys):
    for options in (["--workers=0"], ["--policy=sync", "--required=5"], ["--policy=none"]):
        with pytest.raises(SystemExit):
            example.parse(options)
        assert options[0].split("=")[0] in capsys.readouterr().err
