"""The WordNet example: its arithmetic against NumPy, its resuming, its manners with bad input."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import complex_model as model  # noqa: E402
import wordnet_embeddings as example  # noqa: E402

pytestmark = pytest.mark.slow

NUM_ENTITIES = 60
# 8 chunks of 3 micro-batches an epoch, 5 micro-batches a step: epochs end in mid-accumulation.
SHORT = ["--batch=40", "--micro-batches=5", "--negatives=16", "--dims=5", "--save-every=1"]


def entity_names() -> list[str]:
    return ["dog.n.01", "dog.n.02", *(f"thing{i}.n.01" for i in range(2, NUM_ENTITIES))]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    """A ring of entities: who follows whom, who precedes whom, and who is opposite."""
    ring = np.arange(NUM_ENTITIES, dtype=np.int32)
    triples = [
        np.stack([ring, np.full_like(ring, r), np.roll(ring, -shift)], axis=1)
        for r, shift in enumerate((1, -1, NUM_ENTITIES // 2))
    ]
    triples = np.random.default_rng(0).permutation(np.concatenate(triples))
    path = tmp_path_factory.mktemp("data") / "ring.npz"
    names = {"entities": "\n".join(entity_names()), "relations": "next\nprevious\nopposite"}
    np.savez(path, train=triples[:120], valid=triples[120:150], test=triples[150:], **names)
    return path


@pytest.fixture(scope="session")
def run(data):
    def call(out: pathlib.Path, *options: str) -> int:
        # The dense step is optax.MultiSteps, which does not hold under strict promotion.
        with jax.numpy_dtype_promotion("standard" if "--dense" in options else "strict"):
            return example.main(["--data", str(data), "--out", str(out), *SHORT, *options])

    return call


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("trained")
    assert run(out, "--epochs=3") == 0
    return out


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def assert_same_checkpoint(one: pathlib.Path, other: pathlib.Path) -> None:
    ours, theirs = arrays(one / "checkpoint.npz"), arrays(other / "checkpoint.npz")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name


def random_tables(rows: model.Tables, dims: int) -> model.Tables:
    rng = np.random.default_rng(3)
    return model.Tables(*(jnp.asarray(rng.normal(size=(n, 2 * dims)), jnp.float32) for n in rows))


def as_complex(table: jax.Array) -> np.ndarray:
    real, imaginary = np.split(np.asarray(table, np.float64), 2, axis=1)
    return real + 1j * imaginary


def test_wordnet_is_whole():
    graph = model.load_graph()
    assert (len(graph.entities), len(graph.relations)) == (117_659, 26)
    assert [len(getattr(graph, split)) for split in model.SPLITS] == [354_552, 5_000, 5_000]
    assert graph.rows(["entity.n.01", "dog.n.01"])[0] == 0


def test_loss_equals_complex_arithmetic():
    params = random_tables(model.Tables(9, 4), dims=3)
    triples = np.array([[0, 1, 2], [3, 3, 2]], np.int32)
    negatives = np.array([5, 6, 8])
    ids = np.concatenate([triples[:, 0], triples[:, 2], negatives])
    rows = model.gather(params, model.Tables(jnp.asarray(ids), jnp.asarray(triples[:, 1])))
    e, r = map(as_complex, params)
    expected = []
    for head, relation, tail in triples:
        query = e[head] * r[relation]
        scores = [np.sum(query * e[x].conj()).real for x in (tail, *negatives)]
        cubes = sum(np.sum(abs(x) ** 3) for x in (e[head], r[relation], e[tail]))
        expected.append(np.log(np.sum(np.exp(scores))) - scores[0] + 0.01 * cubes)
    np.testing.assert_allclose(model.loss(rows, 0.01), np.mean(expected), rtol=1e-5)


@pytest.mark.full
def test_sparse_gradient_equals_that_of_whole_tables():
    params = random_tables(model.Tables(30, 6), dims=4)
    triples = jnp.asarray(np.random.default_rng(1).integers(0, 6, (12, 3)), jnp.int32)
    lookups = model.sample_lookups(jax.random.key(0), triples, 7, 30)
    value, grads = model.sparse_grads(params, lookups, 0.02)
    dense_value, dense = jax.value_and_grad(lambda p: model.loss(model.gather(p, lookups), 0.02))(
        params
    )
    assert value == dense_value
    for grad, expected in zip(grads, dense, strict=True):
        np.testing.assert_allclose(grad.to_dense(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [7, 64])
def test_ranks_equal_an_oracle_with_ties_and_nan(block):
    # Few questions with many answers each, so that most of what is filtered would be a rival.
    rng = np.random.default_rng(2)
    triples = rng.integers(0, [8, 3, NUM_ENTITIES], (450, 3)).astype(np.int32)
    splits = np.split(np.unique(triples, axis=0)[rng.permutation(300)], [200, 270])
    graph = model.Graph(entity_names(), ["a", "b", "c"], *splits)
    params = random_tables(model.Tables(NUM_ENTITIES, 6), dims=4)
    tied = params.entities.at[1].set(params.entities[0]).at[7].set(jnp.nan)
    params = params._replace(entities=tied)
    e, r = map(as_complex, params)
    known = {tuple(t) for s in model.SPLITS for t in graph.reciprocal(getattr(graph, s)).tolist()}
    expected = []
    for head, relation, tail in graph.reciprocal(graph.test).tolist():
        scores = np.real(e.conj() @ (e[head] * r[relation]))
        scores[[0, 1]] = scores[0]  # exactly the same, whatever the order of summation
        rivals = [x for x in range(NUM_ENTITIES) if x != tail and (head, relation, x) not in known]
        expected.append(1 + sum(not scores[x] < scores[tail] for x in rivals))
    ranks = model.filtered_ranks(params, graph, graph.test, block)
    np.testing.assert_array_equal(ranks, expected)


def test_metrics():
    metrics = model.ranking_metrics(np.array([1, 2, 4, 20]))
    assert metrics == {"MRR": pytest.approx(0.45), "Hits@1": 0.25, "Hits@3": 0.5, "Hits@10": 0.75}


def test_linked_pairs(data):
    graph = model.load_graph(data)
    pairs = {frozenset((h, t)) for h, _, t in graph.train.tolist()}
    expected = [frozenset((h, t)) in pairs for h, _, t in graph.test.tolist()]
    np.testing.assert_array_equal(graph.is_linked(graph.test), expected)
    assert 0 < np.mean(expected) < 1


def test_training_learns_the_ring(run, tmp_path, capsys):
    assert run(tmp_path, "--epochs=60", "--n3=0.01", "--negatives=40", "--save-every=60") == 0
    tables = arrays(tmp_path / "embeddings.npz")
    params = model.Tables(tables["entities_table"], tables["relations_table"])
    assert params.entities.shape == (NUM_ENTITIES, 10)
    assert str(tables["entities"]).split("\n") == entity_names()
    printed = capsys.readouterr().out
    mrr = float(re.search(r"all +│ +60 │ +([0-9.]+)", printed).group(1))
    assert mrr > 0.8  # a guess among 60 entities gets 0.08
    assert re.search(r"[0-9.]+ ms a step", printed)
    assert re.search(r"[0-9]+ MB peak memory", printed)


@pytest.mark.full
def test_dense_training_agrees(run, trained, tmp_path):
    assert run(tmp_path, "--epochs=3", "--dense") == 0
    ours, dense = arrays(trained / "embeddings.npz"), arrays(tmp_path / "embeddings.npz")
    for name in ("entities_table", "relations_table"):
        np.testing.assert_allclose(ours[name], dense[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [(), pytest.param(("--dense",), marks=pytest.mark.full)])
def test_resume_is_bit_identical(run, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "--epochs=2", *options) == 0
    assert run(parts, "--epochs=1", *options) == 0
    assert run(parts, "--epochs=2", "--resume", *options) == 0
    assert_same_checkpoint(whole, parts)


@pytest.mark.full
def test_interrupted_within_an_epoch_and_resumed(run, trained, tmp_path, monkeypatch, capsys):
    end_chunk = example.end_chunk

    def interrupting(args, graph, state, run):
        end_chunk(args, graph, state, run)
        if run.chunk == 11:
            assert int(state.optimizer.num_accumulated) == 11 * 3 % 5
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(example, "end_chunk", interrupting)
    handler = signal.getsignal(signal.SIGINT)
    assert run(tmp_path, "--epochs=3") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("interrupted; saved: ")
    assert last.endswith("checkpoint.npz, after 1.375 epochs; go on with --resume")
    monkeypatch.undo()
    assert run(tmp_path, "--epochs=3", "--resume") == 0
    assert_same_checkpoint(trained, tmp_path)


def test_a_finished_run_is_shown_again(run, trained, tmp_path, capsys):
    plot = tmp_path / "curve.png"
    before = arrays(trained / "checkpoint.npz")["about"]
    assert run(trained, "--epochs=3", "--resume", f"--plot={plot}") == 0
    assert "ms a step" not in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert arrays(trained / "checkpoint.npz")["about"] == before


def test_a_synset_is_asked_without_training(run, trained, data, monkeypatch, capsys):
    """For each relation the best as many as are true, marked where train did not tell them."""
    before = (trained / "embeddings.npz").read_bytes()
    monkeypatch.setattr(example, "train", None)
    assert run(trained, "--near", "dog.n.01", "thing7.n.01") == 0
    assert (trained / "embeddings.npz").read_bytes() == before
    printed = capsys.readouterr().out
    graph, names = model.load_graph(data), entity_names()
    tables = arrays(trained / "embeddings.npz")
    entities, relations = (as_complex(tables[f"{name}_table"]) for name in model.Tables._fields)
    split_of = {
        tuple(fact): split for split in model.SPLITS for fact in getattr(graph, split).tolist()
    }
    for row in (0, 7):
        assert names[row] in printed
        known = [relation for head, relation, _ in split_of if head == row]
        assert len(known) == 3
        for relation in known:
            scores = np.real(entities.conj() @ (entities[row] * relations[relation]))
            best = np.argsort(-scores)[:1].tolist()  # on the ring one answer is true
            marks = [{"train": "", None: "?"}.get(split_of.get((row, relation, tail)), "*")
                     for tail in best]  # fmt: skip
            told = ", ".join(names[t] + mark for t, mark in zip(best, marks, strict=True))
            assert re.search(rf"│ {graph.relations[relation]} +│ {re.escape(told)} +│", printed)


def test_asking_before_training_says_so(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "--near", "dog.n.01")
    assert_one_line(error, capsys, "embeddings.npz yet: train first, without --near")


def test_fewer_epochs_than_done_are_told(run, trained, capsys):
    assert run(trained, "--epochs=2", "--resume") == 0
    assert "nothing to train: 3 epochs are done, and --epochs asks for 2" in capsys.readouterr().out


@pytest.mark.full
def test_each_micro_batch_draws_its_own_negatives(data):
    _, args = example.parse([*SHORT, "--learning-rate=0"])
    state = example.init_state(jax.random.key(0), model.load_graph(data), args)
    batches = jnp.tile(jnp.array([[[3, 1, 4]]], jnp.int32), (30, 8, 1))
    state, losses = example.train_chunk(args, NUM_ENTITIES, state, batches, jax.random.key(1))
    assert int(state.micro_step) == 30
    assert len(np.unique(losses)) == 30


@pytest.mark.full  # it reads the program that users get
def test_scan_writes_no_array_of_the_size_of_a_table(data):
    _, args = example.parse(["--dims=8"])
    graph = model.Graph([""] * 117_659, [""] * 26, *[np.zeros((1, 3), np.int32)] * 3)
    state = jax.eval_shape(lambda k: example.init_state(k, graph, args), jax.random.key(0))
    step = jax.jit(lambda s, b, k: example.train_chunk(args, 117_659, s, b, k), donate_argnums=0)
    batches = jax.ShapeDtypeStruct((4, 1024, 3), jnp.int32)
    compiled = step.lower(state, batches, jax.random.key(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 117_659 * 16 * 4 / 2
    opcodes = re.findall(r"= (?:f32|s32)\[117659[,\]]\S* ([a-z-]+)\(", compiled.as_text())
    assert {"scatter", "get-tuple-element"} <= set(opcodes)
    assert set(opcodes) <= {"parameter", "get-tuple-element", "scatter", "fusion", "while"}


def test_runs_from_any_folder(data, tmp_path):
    command = [sys.executable, EXAMPLES / "wordnet_embeddings.py", "--data", data, *SHORT]
    package = str(pathlib.Path(jaxaccum.__file__).parents[1])
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": package}
    done = subprocess.run(
        [*command, "--epochs=1", "--near", "dog"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "wordnet_embeddings.py: error: there is no synset 'dog'; near it: dog.n.01, dog.n.02\n"
    )
    done = subprocess.run(
        [*command, "--epochs=1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "Hits@10" in done.stdout
    assert sorted(p.name for p in (tmp_path / "runs" / "wordnet").iterdir()) == [
        "checkpoint.npz",
        "embeddings.npz",
    ]


def damaged_data(folder: pathlib.Path, data: pathlib.Path) -> dict[str, pathlib.Path]:
    whole = arrays(data)
    files = {name: folder / f"{name}.npz" for name in ("cut", "text", "part", "float", "beyond")}
    files["cut"].write_bytes(data.read_bytes()[:1000])
    files["text"].write_text("no archive")
    np.savez(files["part"], train=whole["train"])
    np.savez(files["float"], **{**whole, "valid": whole["valid"].astype(np.float32)})
    np.savez(files["beyond"], **{**whole, "test": whole["test"] + np.int32(1)})
    return files


BAD_DATA = {
    "cut": "cut.npz is damaged",
    "text": "text.npz is damaged",
    "part": "part.npz is damaged or no knowledge graph",
    "float": "valid must be int32 [n, 3], is float32 [30, 3]",
    "beyond": "ids beyond the names",
}
BAD_OPTIONS = {
    "--data=/nowhere/graph.npz": "/nowhere/graph.npz",
    "--near=dog": "no synset 'dog'; near it: dog.n.01, dog.n.02",
    "--near=thing2.n.1": "no synset 'thing2.n.1'; near it: thing2.n.01",
    "--out=FILE/below": "cannot write there",
    "--out=FILE": "cannot write there",
    "--plot=missing/curve.png": "cannot write there",
    "--plot=curve.gifx": "--plot must end in .png, .pdf or .svg, got curve.gifx",
    "--resume": "nothing to resume",
    "--epochs=0": "--epochs: must be at least 1 and below 2**31, got 0",
    "--epochs=many": "--epochs: invalid number value: 'many'",
    "--learning-rate=nan": "--learning-rate: must be at least 0",
    "--batch=41": "--batch 41 is no multiple of --micro-batches 5",
    "--batch=40000": "triples are too few for 8 x 8000",
}


def assert_one_line(error, capsys, *words: str) -> None:
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("wordnet_embeddings.py: error: ")
    for word in words:
        assert word in printed.err


@pytest.mark.parametrize("kind", BAD_DATA)
def test_damaged_data(kind, data, tmp_path, capsys):
    path = damaged_data(tmp_path, data)[kind]
    with pytest.raises(SystemExit) as error:
        example.main(["--data", str(path), "--out", str(tmp_path)])
    assert_one_line(error, capsys, BAD_DATA[kind])


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options(option, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "out", *option.split())
    assert_one_line(error, capsys, BAD_OPTIONS[option])


@pytest.mark.full
def test_checkpoints_that_do_not_fit(run, trained, tmp_path, capsys):
    (tmp_path / "checkpoint.npz").write_bytes((trained / "checkpoint.npz").read_bytes())
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "--epochs=3", "--resume", "--negatives=17")
    assert_one_line(error, capsys, "was made with negatives 16, not 17")
    (tmp_path / "checkpoint.npz").write_bytes((trained / "checkpoint.npz").read_bytes()[:5000])
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "--epochs=3", "--resume")
    assert_one_line(error, capsys, "checkpoint.npz is damaged")


@pytest.mark.full
def test_a_loss_gone_astray_is_said(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, "--init-scale=2e9", "--n3=2e9")
    assert_one_line(error, capsys, "lower --learning-rate")
