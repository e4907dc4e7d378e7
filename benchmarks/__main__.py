"""Runs every comparison that the project quotes, or renews the figures it quotes.

python -m benchmarks                     all cases, into benchmarks/results/, with plots beside
python -m benchmarks --quick             that they run; the figures mean nothing
python -m benchmarks figures --check     whether README and docs show what the run measured
python -m benchmarks figures --write     makes them
"""

from __future__ import annotations

import sys

from benchmarks import figures


def main() -> int:
    if sys.argv[1:2] == ["figures"]:
        return figures.main(sys.argv[2:])
    from benchmarks import run

    return run.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
