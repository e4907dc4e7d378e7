"""A run: cases in processes of their own, a progress bar, tables, one file and plots of it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import rich.console
import rich.progress

import benchmarks.cases  # noqa: F401 (registers them)
from benchmarks import plots, results, tables
from benchmarks.harness import CASES
from benchmarks.peers import MODULES, ROOT


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    console = rich.console.Console()
    if options.list:
        for name, case in CASES.items():
            console.print(f"[bold]{name}[/]: {case.about}", highlight=False)
        return 0
    run = Run(options, console)
    try:
        run.all()
    except KeyboardInterrupt:
        run.left_out["run"] = "interrupted"
    return run.finish()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures jaxaccum beside TensorFlow, PyTorch, optax and plain JAX.",
        epilog="Figures in README and docs: python -m benchmarks figures --help",
    )
    made.add_argument("--quick", action="store_true", help="a minute: that every case runs")
    made.add_argument(
        "--only", action="append", metavar="NAME", choices=[*CASES], help="this case; repeatable"
    )
    made.add_argument("--list", action="store_true", help="print the names of the cases and end")
    made.add_argument("--device", metavar="PLATFORM", help="cpu, gpu or tpu; JAX's own choice")
    made.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help="file of the results, plots in a folder beside it; with --only, what another run has "
        "written there of other cases stays (default: by device and version of JAX in "
        "benchmarks/results/; none with --quick)",
    )
    made.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        type=peer,
        help=f"interpreter of an environment with {' or '.join(MODULES)}, where it is not this one",
    )
    return made


def peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in MODULES or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON with NAME of {[*MODULES]}")
    return name, python


class Run:
    """What has been measured so far; it is written after each case, so that nothing is lost."""

    def __init__(self, options: argparse.Namespace, console: rich.console.Console) -> None:
        self.options, self.console = options, console
        self.results = results.Results()
        self.left_out = self.results.left_out
        self.failed: set[str] = set()
        self.out: pathlib.Path | None = options.out
        self.start = time.monotonic()
        self.bar = rich.progress.Progress(
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("")

    def chosen(self) -> list[str]:
        """The names of the cases to run; those whose packages are missing are left out."""
        names = self.options.only or [name for name, case in CASES.items() if case.by_default]
        for name in names:
            missing = [p for p in CASES[name].needs if importlib.util.find_spec(p) is None]
            if missing:
                self.left_out[name] = f"{', '.join(missing)} not installed"
        return [name for name in names if name not in self.left_out]

    def all(self) -> None:
        names = self.chosen()
        self.bar.update(self.task, total=sum(len(self.settings(name)) for name in names))
        with self.bar:
            for group in self.groups(names):
                self.run_group(group)

    def settings(self, name: str) -> list[dict[str, Any]]:
        return CASES[name].quick if self.options.quick else CASES[name].settings

    def groups(self, names: list[str]) -> list[list[str]]:
        """The cases of each process: one, but all that share an environment where time matters."""
        if not self.options.quick:
            return [[name] for name in names]
        by_environ: dict[str, list[str]] = {}
        for name in names:
            by_environ.setdefault(json.dumps(dict(CASES[name].environ)), []).append(name)
        return list(by_environ.values())

    def run_group(self, names: list[str]) -> None:
        """Runs cases in a process; one that dies loses its own points alone."""
        environ = {**os.environ, **CASES[names[0]].environ}
        if self.options.device:
            environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(self.options.device, self.options.device)
        told = {"cases": names, "quick": self.options.quick, "peers": dict(self.options.peer)}
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(told)]
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environ
            ) as process:
                try:
                    for line in process.stdout:
                        self.take_up(json.loads(line))
                except BaseException:
                    process.kill()
                    raise
            if process.returncode:
                self.failed.add(", ".join(names))
                self.left_out[", ".join(names)] = f"the process ended with {process.returncode}"
            if self.failed & {*names, ", ".join(names)}:
                errors.seek(0)
                self.console.print(errors.read()[-4000:], markup=False, highlight=False)
        for name in names:
            if points := self.results.of_case(name):
                self.console.print(f"[bold]{name}[/]: {CASES[name].about}", highlight=False)
                self.console.print(tables.table_of(points))
        self.write()

    def take_up(self, told: dict[str, Any]) -> None:
        event = told.pop("event")
        if event == "environment" and not self.results.environment:
            self.begin(told["environment"])
        elif event == "start":
            name = f"{told['case']}: {told['point']}"
            self.bar.update(self.task, description=name)
            if not self.console.is_terminal:  # where no bar shows it
                self.console.print(name, highlight=False)
        elif event == "peers":
            self.results.environment["versions"] |= told["versions"]
            self.left_out |= told["left_out"]
        elif event in ("point", "left out", "failed"):
            self.bar.advance(self.task)
            if event == "point":
                self.results.add(told)
            else:
                self.left_out[f"{told['case']}: {told['point']}"] = told["why"]
                self.failed |= {told["case"]} if event == "failed" else set()

    def begin(self, environment: dict[str, Any]) -> None:
        """Once the device is known: where the results go, and what of them stays."""
        name = f"{environment['platform']}-jax{environment['versions']['jax']}.json"
        if self.out is None and not self.options.quick:
            self.out = results.FOLDER / name
        if self.options.only and self.out and self.out.exists():
            before = results.Results.read(self.out)
            self.results.points = before.points
            environment["versions"] = (
                before.environment.get("versions", {}) | environment["versions"]
            )
        self.results.environment = environment
        self.console.print(
            f"{environment['processor']}, {environment['cores']} cores, JAX "
            f"{environment['versions']['jax']} on {environment['device']}", highlight=False,
        )  # fmt: skip

    def write(self) -> None:
        if self.out and self.results.points:
            self.results.write(self.out)

    def finish(self) -> int:
        """Says what was left out and where things are; the exit status."""
        for name, why in self.left_out.items():
            self.console.print(f"left out: {name}: {why}", highlight=False, markup=False)
        self.write()
        if self.out and self.results.points:
            drawn = plots.draw_all(self.results, self.out.with_suffix(""))
            self.console.print(f"written: {self.out}", highlight=False, soft_wrap=True)
            for path in drawn:
                self.console.print(f"drawn: {path}", highlight=False, soft_wrap=True)
        if self.options.quick:
            self.console.print("Quick: all sizes are tiny, and the figures mean nothing.")
        minutes, seconds = divmod(round(time.monotonic() - self.start), 60)
        self.console.print(f"{len(self.results.points)} points in {minutes} min {seconds} s")
        interrupted = "run" in self.left_out
        return 130 if interrupted else 1 if self.failed else 0
