"""Runs the examples as the gallery shows them, and keeps what they print and draw.

python docs/make_gallery.py              # all: some minutes
python docs/make_gallery.py wordnet near # some, by the names below; near asks what wordnet saved
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile

FOLDER = pathlib.Path(__file__).parent / "gallery"
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
COMMANDS = {
    "wordnet": "wordnet_embeddings.py --plot wordnet.svg",
    "near": "wordnet_embeddings.py --near dog.n.01 violin.n.01 Paris.n.01",
    "flax": "flax_recommender.py",
    "equinox": "equinox_word_embeddings.py",
    "async": "async_workers.py --workers 3 --backup 1 --slow 0.5 --staleness 0 --updates 300",
    "overnight": "overnight.py",
    "server": "parameter_server.py --updates 1000 --kill 3 --test-triples 2000",
    "devices": "data_parallel.py --epochs 1",
    "processes": "multi_process.py --epochs 1",
    "relations": "sparse_relations.py",
}


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or COMMANDS:
            script, *options = COMMANDS[name].split()
            done = subprocess.run(
                [sys.executable, EXAMPLES / script, *options],
                cwd=scratch, stdout=subprocess.PIPE, text=True, check=True,
                env={**os.environ, "COLUMNS": "86", "PYTHONPATH": str(EXAMPLES.parent)},
            )  # fmt: skip
            # Of a bar that is drawn over and over the last line is what stays.
            lines = [re.sub(r".*\r", "", line).rstrip() for line in done.stdout.splitlines()]
            lines = [x for x in lines if not re.match(r"\[Gloo\]|.*\(raylet\)", x)]  # C++ talking
            shown = "\n".join([f"$ python examples/{COMMANDS[name]}", *lines]).rstrip()
            (FOLDER / f"{name}.txt").write_text(shown + "\n")
            for plot in pathlib.Path(scratch).glob("*.svg"):
                plot.replace(FOLDER / plot.name)
            print(f"{name}: {FOLDER / name}.txt", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
