"""Compiling for a GPU or TPU that is not there, and reading what comes out.

Each needs packages of its own (``libtpu``, or ``jax-cuda12-plugin`` and ``jax-cuda12-pjrt``) and no
device; ``JAX_PLATFORMS=cpu`` keeps JAX from looking for one. `GPU_FLAGS` must stand in
``XLA_FLAGS``. `.ci/run` sets both.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import mmap
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

# Read when the packages are loaded.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
# Without it a second process stops at a lock file.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import hlo_bytes
import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format
from jax.sharding import Mesh, SingleDeviceSharding

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
GPUS = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-80GB"}
# Of device memory, in bytes a second, by the vendors' data sheets.
BANDWIDTH = {"v5e": 0.82e12, "v6e": 1.64e12, "H100": 3.35e12, "A100": 2.04e12}
# What ends in a call of CUB cannot be compiled without a driver; users get CUB's sort.
GPU_FLAGS = "--xla_gpu_enable_cub_radix_sort=false"


def targets_here() -> list[str]:
    """The targets for which this environment has the package."""
    tpu = TPUS if importlib.util.find_spec("libtpu") else {}
    gpu = GPUS if importlib.util.find_spec("jax_cuda12_plugin") else {}
    return [*tpu, *gpu]


@functools.cache
def devices(target: str) -> list[Any]:
    """Four devices of a target."""
    if target in TPUS:
        return topologies.get_topology_desc(TPUS[target], platform="tpu").devices
    return topologies.get_topology_desc(
        platform="cuda", target_config=_gpu_description(GPUS[target]), topology="1x1x4"
    ).devices


def _gpu_description(name: str) -> str:
    """The text by which XLA knows a GPU, which lies in the plugin between two NUL bytes."""
    (folder,) = importlib.util.find_spec("jax_plugins.xla_cuda12").submodule_search_locations
    with (pathlib.Path(folder) / "xla_cuda_plugin.so").open("rb") as file:
        binary = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        at = binary.find(f'device_description_str: "{name}"'.encode())
        if at < 0:
            raise LookupError(f"the plugin knows no {name}")
        return binary[binary.rfind(b"\0", 0, at) + 1 : binary.find(b"\0", at)].decode()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a target, and what can be told of it.

    Attributes:
      text: the optimized HLO.
      donated: bytes of the donated arguments, as they lie on the device.
      reused: bytes of them that outputs were written into.
      temp: bytes held beside arguments and outputs.
      seconds: that compilation took.
    """

    text: str
    donated: int
    reused: int
    temp: int
    seconds: float
    accessed: float

    @functools.cached_property
    def computations(self) -> dict[str, list[str]]:
        """The lines of each computation, by name; the entry is called ENTRY."""
        found: dict[str, list[str]] = {}
        current: list[str] = []
        for line in self.text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*->.*\{$", line):
                current = found.setdefault("ENTRY" if header[1] else header[2], [])
            elif line.startswith("  "):
                current.append(line.strip())
        return found

    @functools.cached_property
    def launched(self) -> list[str]:
        """Instructions of the entry and of what it calls, but not within fusions; loops once."""
        seen, todo, lines = set(), ["ENTRY"], []
        while todo:
            name = todo.pop()
            if name in seen or name not in self.computations:
                continue
            seen.add(name)
            for line in self.computations[name]:
                lines.append(line)
                if _opcode(line) in _CALLS:
                    todo += re.findall(
                        r"(?:to_apply|body|condition|calls|true_computation|false_computation)=%?([\w.\-]+)",
                        line,
                    )
                    for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                        todo += [name.strip(" %") for name in group.split(",")]
        return lines

    @functools.cached_property
    def kernels(self) -> int:
        """How many instructions do something on the device."""
        return sum(_opcode(line) not in _FREE for line in self.launched)

    @functools.cached_property
    def opcodes(self) -> collections.Counter[str]:
        """How often each opcode stands anywhere, fusions included."""
        return collections.Counter(
            _opcode(line) for lines in self.computations.values() for line in lines
        )

    @property
    def moved(self) -> int:
        """Bytes that the kernels move by their operands; those of a loop's body once."""
        kernels = [line for line in self.launched if _opcode(line) not in _FREE]
        return hlo_bytes.count_bytes(self.computations, kernels)

    @property
    def unordered_adds(self) -> list[str]:
        """Scatters that add floats where two updates may meet: a GPU takes them in any order."""
        return [
            line
            for lines in self.computations.values()
            for line in lines
            if _opcode(line) == "scatter" and "unique_indices=true" not in line
            if (body := re.search(r"to_apply=%?([\w.\-]+)", line))
            if any(
                re.search(r"= (f|bf)\d+\[\]\S* add\(", step) for step in self.computations[body[1]]
            )
        ]

    def copies_of(self, num_bytes: int) -> list[str]:
        """Copies of at least so many bytes, anywhere; but not into a TPU's vector memory."""
        return [
            line
            for lines in self.computations.values()
            for line in lines
            if _copied_by(line) >= num_bytes
            if "S(1)" not in line.split(" copy")[0]
        ]


_CALLS = {"while", "conditional", "call", "async-start"}
_FREE = _CALLS | {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "copy-done", "async-done", "all-gather-done", "opt-barrier"),
    *("all-reduce-done", "send-done", "recv-done", "async-update", "add-dependency", ""),
}


def _opcode(line: str) -> str:
    op = hlo_bytes.parse(line)
    return op.opcode if op else ""


def _copied_by(line: str) -> int:
    op = hlo_bytes.parse(line)
    # What starts a copy makes a pair of both buffers.
    shares = {"copy": 1, "copy-start": 2}
    return op.size // shares[op.opcode] if op and op.opcode in shares else 0


def compile_for(
    target: str,
    function: Callable[..., Any],
    *shapes: Any,
    donate: tuple[int, ...] = (),
    place: Callable[[Any, Any], Any] | None = None,
) -> Compiled:
    """Compiles ``function`` of arrays of ``shapes`` for one device of ``target``.

    ``place(tree, sharding)`` gives the formats of the arguments; results that take the place of
    donated ones, which come first, keep theirs.
    """
    one = SingleDeviceSharding(devices(target)[0])
    if place is None:
        formats = [jax.tree.map(lambda _: one, tree) for tree in shapes]
        return compile_placed(function, shapes, formats, donate=donate)
    formats = [place(tree, one) for tree in shapes]
    return compile_placed(
        function, shapes, formats, donate=donate, **kept_formats(function, shapes, formats, donate)
    )


def kept_formats(function: Callable[..., Any], shapes: Any, formats: Any, donate: Any) -> Any:
    """Options of `jax.jit` that give the first results the formats of the donated arguments."""
    if not donate:
        return {}
    others = [None] * (len(jax.eval_shape(function, *shapes)) - len(donate))
    return {"out_shardings": (*(formats[i] for i in donate), *others)}


def compile_placed(
    function: Callable[..., Any], shapes: Any, formats: Any, donate: Any = (), **options: Any
) -> Compiled:
    """Compiles ``function`` of arrays of ``shapes`` that lie where ``formats`` say."""
    args = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tuple(shapes),
        tuple(formats),
        is_leaf=lambda node: isinstance(node, Format),
    )
    start = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=donate, **options).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    kept = [args[i] for i in donate]
    cost = {}
    if "tpu" in str(compiled.input_shardings).lower():
        cost = compiled.cost_analysis() or {}
    return Compiled(
        text=compiled.as_text(),
        donated=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)),
        reused=memory.alias_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        seconds=seconds,
        accessed=cost.get("bytes accessed", 0.0),
    )


def mesh(target: str, axis_name: str) -> Mesh:
    """Four devices of ``target`` in a row."""
    return Mesh(np.array(devices(target)[:4]), (axis_name,))
