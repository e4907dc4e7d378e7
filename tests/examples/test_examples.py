"""The Flax and the Equinox example: they learn, and their sparse step is the dense one."""

import ast
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import equinox_word_embeddings as words  # noqa: E402
import flax_recommender as recommender  # noqa: E402
import overnight  # noqa: E402
import sparse_relations as relations  # noqa: E402

NUM_SENSES = 60


@pytest.fixture
def ring(tmp_path) -> pathlib.Path:
    """Senses in a ring: who follows whom, who precedes whom, and who is opposite."""
    senses = np.arange(NUM_SENSES, dtype=np.int32)
    triples = np.concatenate([
        np.stack([senses, np.full_like(senses, r), np.roll(senses, -shift)], axis=1)
        for r, shift in enumerate((1, -1, NUM_SENSES // 2))
    ])  # fmt: skip
    names = {"entities": "\n".join(map(str, senses)), "relations": "next\nprevious\nopposite"}
    path = tmp_path / "ring.npz"
    np.savez(path, train=triples, valid=triples[::2], test=triples[::3], **names)
    return path


def test_the_recommender_learns_the_ring(ring, capsys):
    recommender.main(["--data", str(ring), "--epochs=25", "--dim=16", "--batch=30"])
    printed = capsys.readouterr().out
    epochs = re.findall(r"│ +\d+ +│ ([0-9.]+) +│ ([0-9.]+) +│", printed)
    losses, recalls = np.array(epochs, float).T
    assert len(losses) == 25
    assert losses[0] > 2.5  # a guess among 30 gets log(30) = 3.4
    assert losses[-1] < 1
    assert recalls[-1] > 0.9  # a guess gets 10 of 59
    assert float(re.search(r"test set: ([0-9.]+)", printed).group(1)) > 0.9


@pytest.mark.full
def test_a_step_of_the_recommender_is_that_of_dense_gradients():
    model = recommender.TwoTowers(NUM_SENSES, 3, 8)
    batches = np.random.default_rng(0).integers(0, [20, 3, 20], (3, 30, 3)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), batches[0])
    tx, step = recommender.make_step(model, 0.1)
    expected, plain = params, optax.adagrad(0.1, 0.0)
    ours, state, plain_state = jax.tree.map(jnp.copy, params), tx.init(params), plain.init(params)
    dense_grads = jax.jit(jax.value_and_grad(functools.partial(recommender.in_batch_loss, model)))
    for batch in batches:
        ours, state, loss = step(ours, state, batch)
        dense_loss, grads = dense_grads(expected, batch)
        updates, plain_state = plain.update(grads, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
        np.testing.assert_allclose(loss, dense_loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected
    )
    table, before = (tree["params"]["sense"]["embedding"] for tree in (ours, params))
    np.testing.assert_array_equal(table[20:], before[20:])


def test_word_embeddings_learn(capsys):
    words.main(["--words=20000", "--steps=150", "--dim=16", "--batch=512", "--min-count=5"])
    printed = capsys.readouterr().out
    first, last = map(float, re.search(r"loss ([0-9.]+) at first, ([0-9.]+) at", printed).groups())
    assert last < 0.9 * first < 0.9 * 9 * np.log(2) + 1e-3  # nine products of zero at first
    probes = [word for word in words.PROBES if re.search(rf"│ {word} +│ (\w+, ){{5}}", printed)]
    assert probes


@pytest.mark.parametrize("fixed", [[], pytest.param(["--fixed"], marks=pytest.mark.full)])
def test_a_run_goes_on_through_the_night(fixed, capsys):
    """Early steps begin with the flatter half, and end where the capacity grows."""
    small = ["--rows=5000", "--dim=8", "--batch-size=64", "--micro-batches=4", "--bad=0.01"]
    with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
        overnight.main([*small, "--batches=480", "--report=80", "--learning-rate=0.1", *fixed])
    printed = capsys.readouterr().out.replace(",", "")
    row = r"│ (\d+) +│ ([0-9.]+) +│ (\d+) +│ (\d+) +│ (\d+) +│ 2\^(-?\d+) +│ (\d+) of (\d+) +│"
    rows = np.array(re.findall(row, printed), float)
    batches, losses, steps, early, skipped, scale, peak, capacity = rows.T
    assert batches.tolist() == [80, 160, 240, 320, 400, 480]
    assert losses[2] < 0.8 * losses[0]
    assert early[:3].tolist() == [0, 0, 0]
    assert early[3] > 5
    assert (early[5] > early[4]) == bool(fixed)
    assert (capacity[4] > peak[5]) != bool(fixed)
    assert 9 < skipped[5] < 30
    # Without early steps there is one for each four gradients that are not skipped.
    assert steps[2] == (240 - skipped[2]) // 4
    assert scale.max() < 24


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        (words, ["--dim=0"], "argument --dim: must be at least 1 and below 2**31, got 0"),
        (words, ["--words=10"], "10 words are too few to learn from"),
        (recommender, ["--batch=0"], "argument --batch: must be at least 1 and below 2**31, got 0"),
        (recommender, ["--batch=1000000"], "--batch 1000000 is more than the 354552 links"),
        (recommender, ["--data=/nowhere/graph.npz"], "[Errno 2] No such file or directory: "),
        (relations, ["--start=dog"], "dog is none of the first 40,000 concepts"),
        (relations, ["--steps=x"], "argument --steps: invalid number value: 'x'"),
        (overnight, ["--report=0"], "argument --report: must be at least 1 and below 2**31, got 0"),
    ],
)
def test_bad_options_are_told_in_one_line(example, options, message, capsys):
    with pytest.raises(SystemExit) as error:
        example.main(options)
    assert error.value.code == 2
    printed = capsys.readouterr()
    name = pathlib.Path(example.__file__).name
    assert printed.err.startswith(f"{name}: error: {message}")
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_option_has_a_text(path):
    """Also those of examples that no test here runs; read off the source, which costs no import."""
    for node in ast.walk(ast.parse(path.read_text())):
        is_option = isinstance(node, ast.Call) and (
            ast.unparse(node.func).rsplit(".", 1)[-1] in {"add_argument", "add"}
            and node.args and ast.unparse(node.args[0]).startswith("'--")
        )  # fmt: skip
        if is_option:
            given = {keyword.arg for keyword in node.keywords}
            assert given & {"help", None}, f"{path.name}: {ast.unparse(node.args[0])} has no help"


def test_links_matter_as_much_as_their_loss_takes_away(capsys):
    assert relations.main([]) == 0
    printed = capsys.readouterr().out
    links = [line for line in printed.splitlines() if " is a " in line]
    shares = [float(line.split()[0]) for line in links]
    (reached,) = map(float, re.findall(r"from accelerator.n.01 to artifact.n.01: (\S+)", printed))
    # All ways end in one link, which carries whatever arrives; no other carries more.
    assert shares == sorted(shares, reverse=True)
    assert max(shares) == reached
    assert relations.main(["--steps=1"]) == 0
    assert "no way of at most 1 link" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_says_what_is_saved(tmp_path):
    # What a shell starts in the background does not hear Ctrl-C, nor do its children.
    hearing = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    example = str(EXAMPLES / "equinox_word_embeddings.py")
    command = [sys.executable, "-c", hearing, "-u", example, "--words=20000"]
    package = str(pathlib.Path(jaxaccum.__file__).parents[1])
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": package},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "different" in process.stdout.readline()  # the words are read, training begins
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT)
    assert error.split("\n") == ["", "interrupted; saved: nothing", ""]


def test_pairs_are_all_words_within_the_window():
    pairs = words.pairs_of(np.array([5, 6, 7, 8]), window=2)
    near = [(5, 6), (6, 7), (7, 8), (5, 7), (6, 8)]
    assert sorted(map(tuple, pairs.tolist())) == sorted(near + [(b, a) for a, b in near])
    assert pairs.dtype == np.int32
