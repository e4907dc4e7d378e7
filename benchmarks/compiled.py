"""What XLA makes of each path for a GPU or TPU that is not there: counts, memory, a bound of time.

Nothing runs. Programs of 4,096 ids, a table of a million rows and 65,536 slots are compiled for
the targets whose packages are installed (see tests/helpers/targets.py) and read. ``least us`` is
what the bytes that any implementation must move would take at the memory's full bandwidth;
``accessed`` is XLA's own estimate, which it makes for TPUs alone.

    export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_enable_cub_radix_sort=false
    python benchmarks/compiled.py [--by-default] [--columns 64] [--package FOLDER] [--name after]
    python benchmarks/compiled.py --table

``--package`` reads another version of jaxaccum, for a table of before and after; ``--by-default``
leaves tables on TPUs as they come, by columns.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def measure(target: str, name: str, columns: int, by_default: bool) -> dict[str, object]:
    import public_programs
    import targets

    size = public_programs.Size(columns=columns, ids=4096, capacity=65_536)
    program = public_programs.ONE_DEVICE[name](size)
    place = None
    if target in targets.TPUS and not by_default:
        import jaxaccum

        place = jaxaccum.row_major
    compiled = targets.compile_for(
        target, program.function, *program.shapes, donate=program.donate, place=place
    )
    return {
        "path": name,
        "target": target,
        "columns": columns,
        "kernels": compiled.kernels,
        "sorts": compiled.opcodes["sort"],
        "scatters": compiled.opcodes["scatter"],
        "loops": compiled.opcodes["while"],
        "reused MB": round(compiled.reused / 1e6, 1),
        "temp MB": round(compiled.temp / 1e6, 1),
        "accessed MB": round(compiled.accessed / 1e6),
        "must move MB": round(program.must_move / 1e6, 1),
        "least us": round(program.must_move / targets.BANDWIDTH[target] * 1e6, 1),
        "seconds to compile": round(compiled.seconds, 1),
    }


def print_table(before: pathlib.Path, after: pathlib.Path) -> None:
    """The table of docs/accelerators.md: before and after, where both have been compiled."""
    old = {
        (row["target"], row["path"], row["columns"]): row for row in json.loads(before.read_text())
    }
    changing = ["kernels", "sorts", "scatters", "loops", "temp MB", "accessed MB"]
    fixed = ["must move MB", "least us"]
    print("| target | path | " + " | ".join(changing + fixed) + " |")
    print("|---" * (2 + len(changing + fixed)) + "|")
    for row in json.loads(after.read_text()):
        was = old.get((row["target"], row["path"], row["columns"]))
        if was is None:
            continue
        cells = [
            str(row[key]) if was[key] == row[key] else f"{was[key]} → {row[key]}"
            for key in changing
        ]
        if not row["accessed MB"]:
            cells[-1] = ""  # no estimate
        cells += [str(row[key]) for key in fixed]
        print(f"| {row['target']} | `{row['path']}` | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", default=str(ROOT), help="folder that holds jaxaccum")
    parser.add_argument("--name", default="after")
    parser.add_argument("--columns", type=int, nargs="+", default=[64])
    parser.add_argument("--targets", nargs="+", help="all that are here by default")
    parser.add_argument("--by-default", action="store_true", help="tables of TPUs by columns")
    parser.add_argument("--table", action="store_true", help="print what before and after say")
    options = parser.parse_args()
    results = ROOT / "benchmarks" / "results"
    if options.table:
        print_table(results / "compiled-before.json", results / "compiled-after.json")
        return
    sys.path[:0] = [str(ROOT / "tests" / "helpers"), options.package]
    import public_programs
    import targets

    file = results / f"compiled-{options.name}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for target in options.targets or targets.targets_here():
        for columns in options.columns:
            for name in public_programs.ONE_DEVICE:
                row = measure(target, name, columns, options.by_default)
                key = ("path", "target", "columns")
                rows = [old for old in rows if any(old[k] != row[k] for k in key)] + [row]
                print(row, flush=True)
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
