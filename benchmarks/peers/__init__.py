"""Other libraries, each in a process, and where it needs one in an environment, of its own.

The clock runs in the peer's process: what crosses the pipe is which steps to make and which to run,
and the seconds they took.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# The module with each peer's steps; its interpreter is this one unless a run names another.
MODULES = {"tensorflow": "benchmarks.peers.tensorflow", "torch": "benchmarks.peers.torch"}
PYTHONS: dict[str, str] = {}
VERSIONS: dict[str, str] = {}
LEFT_OUT: dict[str, str] = {}
_processes: dict[str, Peer | None] = {}


class Peer:
    """A process that makes steps of one library and runs them when told to."""

    def __init__(self, module: str, python: str) -> None:
        self._python = shutil.which(python)
        if self._python is None:
            raise RuntimeError(f"no interpreter at {python}")
        # A pipe that nobody reads would fill up and stop it.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [self._python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            cwd=ROOT,
        )
        atexit.register(self.close)
        try:
            self.version: str = self._answer()
        except RuntimeError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def make(self, make: str, **arguments: Any) -> dict[str, PeerStep]:
        """Steps by line; those made before are forgotten, with what they hold."""
        return {line: PeerStep(self, line) for line in self.ask(make=make, arguments=arguments)}

    def ask(self, **request: Any) -> Any:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            last = self._said.read().strip().split("\n")[-1]
            raise RuntimeError(f"{self._python}: {last or 'ended without a word'}")
        return json.loads(line)


@dataclasses.dataclass(frozen=True)
class PeerStep:
    """A `Step` that lives in a peer's process."""

    peer: Peer
    line: str

    def seconds(self, in_a_row: int = 1, wait_each: bool = True) -> list[float]:
        return self.peer.ask(run=self.line, in_a_row=in_a_row, wait_each=wait_each)


def process_of(peer: str) -> Peer | None:
    """The peer's process, started at the first call; None, and noted, where it cannot be had."""
    if peer not in _processes:
        try:
            _processes[peer] = Peer(MODULES[peer], PYTHONS.get(peer, sys.executable))
            VERSIONS[peer] = _processes[peer].version
        except RuntimeError as error:
            _processes[peer] = None
            LEFT_OUT[peer] = str(error)
    return _processes[peer]
