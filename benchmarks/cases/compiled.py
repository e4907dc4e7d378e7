"""What XLA makes of each path for a GPU or TPU that is not there: counts, memory, a bound of time.

Nothing runs. Programs are compiled for the targets whose packages are installed (see
tests/helpers/targets.py) and read.
"""

from __future__ import annotations

import pathlib
import sys

from benchmarks.harness import Figures, LeftOutError, case

HELPERS = pathlib.Path(__file__).parents[2] / "tests" / "helpers"
# What differs from the usual size. The first word names the path.
PATHS: dict[str, dict[str, int]] = {
    "apply": {},
    "apply unknown": {"known": False},
    "take": {},
    "merge": {},
    "sum_duplicates": {},
    "value_and_sparse_grad": {},
    "lazy_adam": {},
    "accumulated_adam": {},
    "accumulated_adam 16384": {"capacity": 16_384},  # what four gradients can fill
    "rowwise_adagrad": {},
    "accumulated_adagrad": {},
    "sparse_add": {},
    "sparse_slice": {},
    "sparse_add_grad": {},
}


@case(
    "{target}",
    settings=[{"target": target} for target in ("H100", "A100", "v5e", "v6e")],
    quick=[{"target": target, "paths": ["apply"]} for target in ("H100", "v5e")],
    environ={
        "JAX_PLATFORMS": "cpu",  # else JAX looks for the device
        "XLA_FLAGS": "--xla_gpu_enable_cub_radix_sort=false",
    },
    by_default=False,
)
def compiled(target: str, paths: list[str] | None = None) -> Figures:
    """Counts of programs of 4,096 ids, a million rows of 64 floats and 65,536 slots.

    "least us" is what the bytes that any implementation must move would take at the memory's full
    bandwidth; "accessed MB" is XLA's own estimate for TPUs, and for GPUs what the operands of all
    kernels add up to. A number says how many slots instead, "unknown" what the vocabulary is.
    """
    sys.path.insert(0, str(HELPERS))
    import public_programs
    import targets

    import jaxaccum

    if target not in targets.targets_here():
        raise LeftOutError(f"no package that compiles for {target} is installed")
    figures = {}
    for path in paths or PATHS:
        usual = {"columns": 64, "ids": 4096, "capacity": 65_536}
        size = public_programs.Size(**(usual | PATHS[path]))
        program = public_programs.ONE_DEVICE[path.split()[0]](size)
        made = targets.compile_for(
            target,
            program.function,
            *program.shapes,
            donate=program.donate,
            place=jaxaccum.row_major if target in targets.TPUS else None,
        )
        figures[path] = {
            "kernels": made.kernels,
            "sorts": made.opcodes["sort"],
            "scatters": made.opcodes["scatter"],
            "loops": made.opcodes["while"],
            "temp MB": round(made.temp / 1e6, 1),
            "accessed MB": round((made.accessed or made.moved) / 1e6, 1),
            "must move MB": round(program.must_move / 1e6, 1),
            "least us": round(program.must_move / targets.BANDWIDTH[target] * 1e6, 1),
            "seconds to compile": round(made.seconds, 1),
        }
    return figures
