"""The machinery of ``python -m benchmarks``: clocks, peers, results, figures in prose, plots."""

import inspect
import json
import pathlib
import re
import sys
import threading
import types

import pytest
import rich.console

import benchmarks.cases  # noqa: F401 (registers them)
from benchmarks import figures, harness, peers, plots, steps, tables
from benchmarks.results import Results, shown


@pytest.fixture
def clock(monkeypatch):
    """A clock that only what is measured moves on: ``clock.pass_(seconds)``."""
    now = types.SimpleNamespace(seconds=0.0)
    now.pass_ = lambda seconds: setattr(now, "seconds", now.seconds + seconds)
    fake = types.SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr(steps, "time", fake)
    monkeypatch.setattr(harness, "time", fake)
    return now


def results():
    found = Results(environment={"versions": {"jax": "1"}, "processor": "P", "cores": 2})
    found.environment["date"] = "2026-01-01"
    for rows, ours, dense in ((2048, 2.0934, 0.552), (1_000_000, 7.982, 100.289)):
        found.add(
            {
                "case": "train_step",
                "point": f"{rows:,}",
                "at": {"rows": rows},
                "figures": {
                    "jaxaccum": {"ms": ours, "times": 1.0, "MB": rows / 1253},
                    "dense": {"ms": dense, "times": dense / ours, "MB": rows / 975},
                },
            }
        )
    return found


@pytest.mark.parametrize("name", harness.CASES)
def test_settings_fit_their_case_and_name_its_points(name):
    case = harness.CASES[name]
    for settings in (case.settings, case.quick):
        for setting in settings:
            inspect.signature(case.run).bind(**setting)
        points = [case.point.format(**setting) for setting in settings]
        assert len(set(points)) == len(points) > 0
        assert not [point for point in points if "/" in point or "--" in point]
    assert case.about.endswith((".", "; MB received by each device."))


def test_what_is_prepared_is_not_timed_and_the_first_call_neither(clock):
    step = steps.Step(
        lambda: clock.pass_(2.0), lambda _: clock.pass_(0.5), lambda: clock.pass_(100.0)
    )
    assert step.seconds(3) == [2.5] * 3
    assert clock.seconds == 4 * 102.5
    assert step.seconds() == [2.5]


def test_a_row_of_calls_is_waited_for_once(clock):
    step = steps.Step(lambda: clock.pass_(2.0), lambda _: clock.pass_(1.0))
    assert step.seconds(4, wait_each=False) == [9 / 4]
    with pytest.raises(ValueError, match="prepared"):
        steps.Step(print, prepare=print).seconds(2, wait_each=False)


def test_steps_take_turns_and_the_middle_of_their_times_counts(clock):
    order, times = [], {"ours": iter([9, 9, 1, 2, 7, 3]), "theirs": iter([9, 9, 6, 6, 6, 6])}

    def step(name):
        def call():
            order.append(name)
            clock.pass_(next(times[name]))

        return steps.Step(call)

    found = harness.measure(
        {name: step(name) for name in times}, in_a_row=1, turns=(1, 4), seconds=1e9, per=2
    )
    assert order == ["ours"] * 2 + ["theirs"] * 2 + ["ours", "theirs"] * 4
    assert found["ours"] == {"ms": 1250.0, "times": 1.0}
    assert found["theirs"] == {"ms": 3000.0, "times": 2.4}


def test_turns_end_with_the_seconds_but_not_before_the_least(clock):
    calls = []
    step = steps.Step(lambda: (calls.append(None), clock.pass_(10.0)))
    harness.measure({"ours": step}, in_a_row=1, turns=(3, 50), seconds=35.0)
    assert len(calls) == 2 + 4
    harness.measure({"ours": step}, in_a_row=1, turns=(3, 50), seconds=5.0)
    assert len(calls) == 6 + 2 + 3


def test_slow_steps_have_fewer_calls_in_a_row(clock):
    slow, fast = (steps.Step(lambda s=s: clock.pass_(s)) for s in (0.15, 0.01))
    assert harness.calls_in_a_row(slow, 5) == 2
    assert harness.calls_in_a_row(fast, 5) == 5
    assert harness.calls_in_a_row(steps.Step(lambda: clock.pass_(9.0)), 5) == 1


def test_threads_deal_applies_and_one_takes():
    lock, applied, taken = threading.Lock(), [], []

    def apply(k):
        with lock:
            applied.append(k)

    cycle = steps.by_threads(
        apply, lambda: taken.append(len(applied)), given=3, applies=10, threads=4
    )
    cycle()
    assert sorted(applied) == sorted(k % 3 for k in range(10))
    assert taken == [10]


@pytest.fixture
def echo(monkeypatch):
    helpers = pathlib.Path(__file__).parents[1] / "helpers"
    monkeypatch.setenv("PYTHONPATH", str(helpers))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setattr(peers, "_processes", {})
    monkeypatch.setattr(peers, "VERSIONS", {})
    monkeypatch.setattr(peers, "LEFT_OUT", {})
    monkeypatch.setattr(peers, "MODULES", {"echo": "echo_peer", "gone": "no_such_module"})
    yield
    for peer in filter(None, peers._processes.values()):
        peer.close()


@pytest.mark.usefixtures("echo")
def test_a_peer_makes_and_times_steps_in_its_process():
    peer = peers.process_of("echo")
    assert peer is peers.process_of("echo")  # one process a peer
    assert peers.VERSIONS == {"echo": "1.2.3"}
    made = peer.make("count", upto=5)
    assert list(made) == ["counts", "fails"]
    times = made["counts"].seconds(4)  # and a fifth that is not timed
    assert len(times) == 4
    assert all(0 < seconds < 1 for seconds in times)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        made["fails"].seconds()


@pytest.mark.usefixtures("echo")
def test_a_peer_that_is_missing_is_left_out_and_named(monkeypatch):
    assert peers.process_of("gone") is None
    assert re.search("no_such_module", peers.LEFT_OUT["gone"])
    monkeypatch.setitem(peers.PYTHONS, "echo", "/no/such/python")
    assert peers.process_of("echo") is None
    assert "/no/such/python" in peers.LEFT_OUT["echo"]
    assert peers.VERSIONS == {}


def test_results_come_back_from_their_file(tmp_path):
    results().write(tmp_path / "new" / "cpu.json")
    assert Results.read(tmp_path / "new" / "cpu.json") == results()
    Results().write(tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text())["points"] == []


def test_a_point_measured_again_replaces_the_first():
    found = results()
    found.add({"case": "train_step", "point": "2,048", "at": {}, "figures": {"a": {"ms": 1.0}}})
    assert found.figure("train_step/2,048/a") == 1.0
    assert len(found.points) == 2


@pytest.mark.parametrize(
    ("path", "metric", "value"),
    [
        ("train_step/2,048/jaxaccum", "ms", 2.0934),
        ("train_step/2,048/jaxaccum", "us", 2093.4),
        ("train_step/2,048/jaxaccum/us", "ms", 2093.4),
        ("train_step/1,000,000/dense", "s", 0.100289),
        ("train_step/1,000,000/dense/MB", "ms", 1_000_000 / 975),
    ],
)
def test_a_path_leads_to_its_figure(path, metric, value):
    assert results().figure(path, metric) == pytest.approx(value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("cycle/2,048/dense", "no case 'cycle'"),
        ("train_step/4,096/dense", "no point '4,096'"),
        ("train_step/2,048/torch", "no line 'torch'"),
        ("train_step/2,048/dense/GBit", "no 'GBit'"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(path, says):
    with pytest.raises(KeyError, match=says):
        results().figure(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0347, "0.035"),
        (0.1, "0.10"),
        (1.0, "1.0"),
        (2.0934, "2.1"),
        (9.96, "10"),
        (47.86, "48"),
        (99.7, "100"),
        (123.4, "123"),
        (9057.2, "9,057"),
    ],
)
def test_figures_are_shown_with_two_digits_or_whole(value, text):
    assert shown(value) == text


PAGE = """\
A step takes 8.0 ms<!--= train_step/1,000,000/jaxaccum --> here,
dense 0.10 s<!--= train_step/1,000,000/dense --> which is 13
or 13 times<!--= train_step/1,000,000/dense --> ours, 8.0 ms<!--= /jaxaccum -->, 798 MB<!--= / -->,
and holds 2.1<!--= train_step/2,048/dense/MB --> of them.

<!--table: - | train_step/{0}/jaxaccum | train_step/{0}/dense/us | - -->
| rows | ours | dense, us | by formula |
|---|---:|---|---|
| `2,048` | 2.1 ms | 552 | 7 |
| 1,000,000 | 8.0 ms | 100,289 | 9 |

```python
"5 ms, however many <!--table: no -->"
```
"""


def renewed(text):
    return figures.renewed(text, results())


def test_a_page_that_shows_the_results_stays_as_it_is():
    page = renewed(PAGE)
    assert not page.problems
    assert page.text == PAGE


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("8.0 ms<", "8.1 ms<"),
        ("0.10 s", "0.1 s"),
        ("13 times", "12 times"),
        ("2.1<", "1,002.1<"),
        ("| 2.1 ms", "| 2.2 ms"),
        ("| 100,289", "| 100"),
    ],
)
def test_a_wrong_figure_is_renewed_and_found(right, wrong):
    page = renewed(PAGE.replace(right, wrong, 1))
    assert page.text == renewed(PAGE).text
    assert not page.problems
    assert list(figures.differences("page", PAGE.replace(right, wrong, 1), page.text))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("000/jaxaccum --> here", "000/lazy --> here", "1: no line 'lazy'"),
        ("| `2,048` |", "| 4,096 |", "9: no point '4,096'"),
        ("| 552 | 7 |", "| 552 |", "9: a row of 3 cells under 4 paths"),
        ("| 552 |", "| slow 552 |", "9: 'slow 552' is no figure"),
        ("which is 13", "5 us, which is 13", "2: '5 us' has no mark"),
        ("which is 13", "2.5 times faster", "2: '2.5 times faster' has no mark"),
        ("2.1<!--= train_step/2,048/dense/MB", "2.1<!--= /dense/MB", "4: '/dense/MB' has no mark"),
    ],
)
def test_what_the_run_did_not_measure_is_a_problem(old, new, says):
    (problem,) = renewed(PAGE.replace(old, new, 1)).problems
    assert problem.startswith(says)


def test_a_cell_with_a_mark_of_its_own_goes_by_that():
    cell = "| 0.10 s<!--= train_step/1,000,000/dense -->, and more |"
    page = renewed(PAGE.replace("| 552 |", cell))
    assert page.problems == []
    assert cell in page.text


def test_what_was_measured_on_is_told():
    page = renewed("On <!--origin-->an abacus<!--end-->.")
    assert page.text == "On <!--origin-->P, 2 cores; JAX 1; 2026-01-01<!--end-->."


def test_the_table_of_counts_is_made_anew(tmp_path, monkeypatch):
    def metrics(kernels, accessed):
        made = {"kernels": kernels, "sorts": 0, "scatters": 3, "loops": 0, "temp MB": 1.5}
        return made | {"accessed MB": accessed, "must move MB": 34.6, "least us": 10.3}

    def counts(name, **figures):
        point = {"case": "compiled", "point": "v5e", "at": {}, "figures": figures}
        Results(points=[point]).write(tmp_path / name)
        return tmp_path / name

    before = counts("before", take=metrics(21, 500), apply=metrics(9, 0))
    after = counts("after", take=metrics(12, 400), apply=metrics(9, 6.5), merge=metrics(14, 90))
    monkeypatch.setattr(figures, "COUNTS", (before, after))
    page = figures.renewed("<!--counts-->\n| old |\n<!--end-->\n", Results())
    first, names, line, *rows, last, _ = page.text.split("\n")
    assert (first, last) == ("<!--counts-->", "<!--end-->")
    assert {names.count("|"), line.count("|")} == {row.count("|") for row in rows}
    assert rows == [
        "| v5e | `take` | 21 → 12 | 0 | 3 | 0 | 1.5 | 500 → 400 | 34.6 | 10.3 |",
        "| v5e | `apply` | 9 | 0 | 3 | 0 | 1.5 | 6.5 | 34.6 | 10.3 |",  # not counted before
        "| v5e | `merge` | 14 | 0 | 3 | 0 | 1.5 | 90 | 34.6 | 10.3 |",  # nor asked for
    ]


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0.9, 30, [1, 2, 5, 10, 20]),
        (0.4, 600, [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]),
        (15, 5e6, [1e2, 1e3, 1e4, 1e5, 1e6]),
        (1e-4, 2e9, [1e-3, 1, 1e3, 1e6, 1e9]),
    ],
)
def test_ticks_are_numbers_people_read(low, high, found):
    assert plots.ticks(low, high) == pytest.approx(found)


def test_labels_have_units_and_are_spread():
    assert [plots.amount("ms")(value) for value in (0.05, 2, 5000)] == ["50 us", "2 ms", "5 s"]
    assert [plots.amount("MB")(value) for value in (0.5, 20, 2000)] == ["0.5 MB", "20 MB", "2 GB"]
    assert [plots.count(value) for value in (8, 500, 2000, 1e7)] == ["8", "500", "2k", "10M"]
    moved = plots.spread([0.5, 0.1, 0.51], apart=0.1)
    assert moved == pytest.approx([0.455, 0.1, 0.555], abs=1e-3)


@pytest.mark.full  # and each case is drawn in the gate
def test_plots_of_the_same_results_are_the_same_and_say_whose_they_are(tmp_path):
    found = results()
    for point in found.points:
        for metrics in point["figures"].values():
            del metrics["MB"]  # and with it a plot
    first, second = (plots.draw_all(found, tmp_path / f, mark="cpu.json 0123") for f in "ab")
    assert [path.name for path in first] == ["vocabulary.png", "vocabulary.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert "cpu.json 0123" in first[1].read_text()


def test_lines_of_a_plot_differ_without_colour():
    styles = [(dashes, marker) for _, dashes, marker in plots.styles_of(LINES)]
    assert len({marker for _, marker in styles}) == len(styles)
    lightness = {style[0] for style in plots.styles_of(LINES)}
    assert len(lightness) > 4


LINES = ["jaxaccum", "with catch_up", "by hand", "MultiSteps", "dense", "PyTorch", "bare adds"]


def test_cells_of_a_table_have_the_unit_that_reads_best():
    assert tables.cell({"ms": 0.0213, "times": 1.0}) == "21 us"
    assert tables.cell({"ms": 2000.0, "times": 13.4, "MB": 0.5}) == "2.0 s (13x)\n0.50 MB"


def test_a_run_takes_up_what_its_processes_tell(tmp_path, monkeypatch):
    from benchmarks import run

    monkeypatch.setattr(plots, "draw_all", lambda found, folder: [folder])

    out = tmp_path / "cpu.json"
    known = results()
    known.environment |= {"versions": {"jax": "0", "torch": "2"}}
    known.write(out)
    options = run.parser().parse_args(["--only", "small", "--out", str(out)])
    going = run.Run(options, rich.console.Console(quiet=True))
    machine = {"platform": "cpu", "device": "P", "processor": "P", "cores": 2, "date": "today"}
    point = {"case": "small", "point": "1", "at": {}, "figures": {"a": {"ms": 1.0}}}
    for told in (
        {"event": "environment", "environment": machine | {"versions": {"jax": "1"}}},
        {"event": "start", "case": "small", "point": "1"},
        {"event": "point", **point},
        {"event": "left out", "case": "small", "point": "2", "why": "one device"},
        {"event": "peers", "versions": {"tensorflow": "3"}, "left_out": {"torch": "gone"}},
    ):
        going.take_up(told)
    assert going.finish() == 0
    found = Results.read(out)
    assert found.points == [*known.points, point]
    assert found.environment["versions"] == {"jax": "1", "torch": "2", "tensorflow": "3"}
    assert found.left_out == {"small: 2": "one device", "torch": "gone"}
    going.take_up({"event": "failed", "case": "small", "point": "3", "why": "ValueError: no"})
    assert going.finish() == 1


def test_a_process_that_dies_fails_the_run(monkeypatch):
    from benchmarks import run

    going = run.Run(run.parser().parse_args(["--only", "small"]), rich.console.Console(quiet=True))
    monkeypatch.setattr(sys, "executable", "false")
    going.run_group(["small"])
    assert going.left_out == {"small": "the process ended with 1"}
    assert going.finish() == 1


def test_the_interpreter_of_a_peer_is_named(capsys):
    from benchmarks import run

    known = run.parser().parse_args(["--peer", f"torch={sys.executable}", "--only", "cycle"])
    assert known.peer == [("torch", sys.executable)]
    with pytest.raises(SystemExit):
        run.parser().parse_args(["--peer", "keras=/bin/python"])
    assert "'keras=/bin/python' is not NAME=PYTHON" in capsys.readouterr().err
