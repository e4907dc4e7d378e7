"""The server's folder: checkpoints of one step on all shards, and what was accepted since.

::

    folder/latest.json         which of them is whole, its step, and what the coordinator knew
    folder/save-7/shard-0.npz  parameters, optimizer state, gradients that wait
    folder/since-7.jsonl       a line for each gradient accepted and each step taken since

Each is of a number of its own, for one step may be saved twice, and a server die half-way.

The journal is written as things happen and outlives the process (of a machine that loses power, the
last lines may be lost). All processes of the server must see the folder.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import TextIO

import numpy as np

from jaxaccum._rows.tree import Leaf

_LATEST = "latest.json"


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of any dtype JAX has: those that NumPy's format does not know, as bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {f"{array.dtype.name} {name}": array for name, array in arrays.items()}
    plain = {
        name: array.view(f"V{array.itemsize}") if array.dtype.kind == "V" else array
        for name, array in named.items()
    }
    np.savez(path, allow_pickle=False, **plain)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` has written."""
    arrays = {}
    with np.load(path) as archive:
        for full in archive.files:
            dtype, name = full.split(" ", 1)
            arrays[name] = archive[full].view(np.dtype(dtype))
    return arrays


class Folder:
    """Checkpoints of one server.

    Args:
      path: of the folder.
    """

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        self._journal: TextIO | None = None

    def latest(self) -> dict[str, Leaf] | None:
        """Returns what the coordinator wrote with the last whole checkpoint, and its ``number``."""
        try:
            found: dict[str, Leaf] = json.loads((self.path / _LATEST).read_text())
        except FileNotFoundError:
            return None
        return found

    def begin(self) -> int:
        """Begins a checkpoint, and a journal of what is not in it; returns its number."""
        self.path.mkdir(parents=True, exist_ok=True)
        number = 1 + max((n for _, n in self._numbered()), default=0)
        self.close()
        self._journal = (self.path / f"since-{number}.jsonl").open("x")
        return number

    def shard_path(self, number: int, shard: int) -> pathlib.Path:
        """Where a shard writes its part."""
        return self.path / f"save-{number}" / f"shard-{shard}.npz"

    def note(self, what: str, value: str | int) -> None:
        """Writes a line into the journal."""
        if self._journal is not None:
            self._journal.write(json.dumps([what, value]) + "\n")
            self._journal.flush()

    def finish(self, number: int, about: Mapping[str, object]) -> None:
        """Makes a checkpoint that all shards have written the latest; removes those before."""
        partial = self.path / "partial.json"
        partial.write_text(json.dumps({"number": number, **about}))
        partial.replace(self.path / _LATEST)
        for path, other in self._numbered():
            if other < number and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif other < number:
                path.unlink(missing_ok=True)

    def read_journal(self, number: int) -> tuple[list[str], int]:
        """Returns the keys accepted since a checkpoint was begun, and the last step, or zero."""
        accepted, last = [], 0
        for path, other in self._numbered():
            if other < number or path.is_dir():
                continue
            for line in path.read_text().splitlines():
                try:
                    what, value = json.loads(line)
                except ValueError:  # the line that was being written when the process died
                    continue
                if what == "accepted":
                    accepted.append(value)
                else:
                    last = max(last, value)
        return accepted, last

    def close(self) -> None:
        """Closes the journal."""
        if self._journal is not None:
            self._journal.close()

    def _numbered(self) -> list[tuple[pathlib.Path, int]]:
        paths = [*self.path.glob("save-*"), *self.path.glob("since-*.jsonl")]
        numbered = [(path, int(path.stem.split("-")[1])) for path in paths]
        return sorted(numbered, key=lambda pair: pair[1])
