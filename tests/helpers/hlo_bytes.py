"""Bytes that the kernels of a compiled program read and write, counted by their operands."""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

import numpy as np

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
# These touch some rows of their first operand, and no more.
_READ_ROWS = ("gather", "dynamic-slice")
_WRITE_ROWS = ("scatter", "dynamic-update-slice")


class Op(NamedTuple):
    """One instruction: its name, what it makes, what it does, and to which others."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    line: str

    @property
    def size(self) -> int:
        """The bytes of what it makes."""
        return sum(
            _WIDTHS.get(kind, 8) * int(np.prod([int(n) for n in dims.split(",") if n]))
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", self.shape)
        )


def parse(line: str) -> Op | None:
    """Reads a line of HLO."""
    found = re.match(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^()]*)", line)
    if not found:
        return None
    name, shape, opcode, operands = found.groups()
    return Op(name, shape, opcode, re.findall(r"%([\w.\-]+)", operands), line)


def count_bytes(computations: dict[str, list[str]], launched: list[str]) -> int:
    """Bytes that all kernels among ``launched`` move."""
    ops = {op.name: op for lines in computations.values() for op in map(parse, lines) if op}
    moved = 0
    for op in filter(None, map(parse, launched)):
        if called := re.search(r"calls=%?([\w.\-]+)", op.line):
            moved += _moved_by_fusion(list(filter(None, map(parse, computations[called[1]]))))
        else:
            moved += op.size + sum(ops[name].size for name in op.operands)
    return moved


def _moved_by_fusion(body: list[Op]) -> int:
    ops = {op.name: op for op in body}
    uses = collections.defaultdict[str, list[Op]](list)
    for op in body:
        for name in op.operands:
            uses[_source(name, ops)].append(op)
    root = next(op for op in body if op.line.startswith("ROOT"))
    results = root.operands if root.opcode == "tuple" else [root.name]
    written = sum(_written_by(ops[_source(name, ops)], ops) for name in results)
    return written + sum(
        _read_of(op, uses[op.name], ops) for op in body if op.opcode == "parameter"
    )


def _source(name: str, ops: dict[str, Op]) -> str:
    """What ``name`` is but for its shape."""
    while ops[name].opcode == "bitcast":
        (name,) = ops[name].operands
    return name


def _written_by(op: Op, ops: dict[str, Op]) -> int:
    if op.opcode not in _WRITE_ROWS:
        return op.size
    return ops[op.operands[2 if op.opcode == "scatter" else 1]].size


def _read_of(parameter: Op, uses: list[Op], ops: dict[str, Op]) -> int:
    """What a kernel reads of one of its operands."""
    read = 0
    for use in uses:
        is_first = bool(use.operands) and _source(use.operands[0], ops) == parameter.name
        if use.opcode == "bitcast":
            continue
        if is_first and use.opcode in _READ_ROWS:
            read += use.size
        elif is_first and use.opcode == "dynamic-update-slice":
            continue
        elif is_first and use.opcode == "scatter":
            # To add, the rows are read first; to set, they are not.
            read += _written_by(use, ops) if "scatter-add" in use.name else 0
        else:
            return parameter.size
    return min(read, parameter.size)
