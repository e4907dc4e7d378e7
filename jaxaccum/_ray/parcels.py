"""What travels as arguments of an actor's call: in the call itself, unless it is large.

Ray moves an argument of more than 100 KB through its object store, where making, announcing,
fetching and freeing an object takes about a millisecond, however small it is; fewer bytes than
that travel in the call. So a gradient of a megabyte is cut into such arguments. A larger one is
left to the store, which moves each further megabyte in a third of the time.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxaccum._coordinator.host_memory import allocate
from jaxaccum._ray.calls import import_ray
from jaxaccum._rows.tree import Leaf, PyTree

# Of Ray's 100 KiB, which are of the argument with what Ray writes around it.
_CHUNK = 96 << 10
# Where both ways take equally long, measured between processes of one machine.
_LARGEST = 5 << 18
# XLA reads arrays in place that begin at such addresses.
_ALIGNMENT = 64


def pack(tree: PyTree) -> list[Leaf]:
    """Returns the arguments as which a tree of NumPy arrays and numbers travels."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = import_ray().cloudpickle.dumps(tree, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    if sum(sizes) > _LARGEST:
        return [tree]
    # Bytes are what Ray need not pickle.
    return [pickle.dumps((pickled, sizes)), *_cut(views)]


def unpack(parcel: Sequence[Leaf]) -> PyTree:
    """Returns what was packed, in memory that nobody else writes to."""
    head, *chunks = parcel
    if not isinstance(head, bytes):
        return head
    pickled, sizes = pickle.loads(head)
    memory = allocate((sum(map(len, chunks)),), np.dtype(np.uint8)).data
    start = 0
    for chunk in chunks:
        memory[start : start + len(chunk)] = chunk
        start += len(chunk)
    buffers, start = [], 0
    for size in sizes:
        buffers.append(memory[start : start + size])
        start += _aligned(size)
    return pickle.loads(pickled, buffers=buffers)


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


def _cut(views: Iterable[memoryview]) -> Iterator[bytes]:
    """One after the other, each at an aligned place, in chunks: copied once."""
    pieces: list[memoryview | bytes] = []
    room = _CHUNK
    for view in views:
        for part in (view, bytes(_aligned(view.nbytes) - view.nbytes)):
            start = 0
            while start < len(part):
                pieces.append(part[start : start + room])
                start += len(pieces[-1])
                room -= len(pieces[-1])
                if not room:
                    yield b"".join(pieces)
                    pieces, room = [], _CHUNK
    if pieces:
        yield b"".join(pieces)
