"""Memory of large outputs, used again.

A network allocates and frees tens of megabytes per layer, and every fresh page is a fault: a run of
X3D-M spends 40 to 80 ms of processor time on them beside 150 ms of computing. So blocks of outputs
are kept when their last tensor dies, up to a limit, and new ones are made by NumPy, which asks the
system for huge pages. They begin at a cache line, as PyTorch's own do and NumPy's do not: a vector
across two lines takes twice as long.

Tensors made here cannot be resized in place; PyTorch says so where one tries.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

DTYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
LINE = 64  # bytes of a cache line
SMALLEST = 1 << 20  # bytes; below, PyTorch's allocator has memory at hand
LIMIT = 1 << 28  # bytes kept in all while unused

_unused: dict[int, list[np.ndarray]] = {}  # by size in bytes


class _Block(np.ndarray):
    """What a tensor holds on to; gives its memory back when the tensor's storage is gone."""

    memory: np.ndarray | None

    def __array_finalize__(self, parent: object) -> None:
        self.memory = None  # views own nothing

    def __del__(self) -> None:
        # No lock: this may run in the middle of any other code, `empty` included; list operations
        # are atomic, and the limit may be passed by what two threads give back at once.
        if self.memory is not None and unused_bytes() + self.memory.nbytes <= LIMIT:
            _unused.setdefault(self.memory.nbytes, []).append(self.memory)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor on the CPU, of a dtype in DTYPES."""
    nbytes = prod(shape) * DTYPES[dtype].itemsize
    if nbytes < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    try:
        memory = _unused[nbytes].pop()
    except (KeyError, IndexError):
        memory = _new(nbytes)
    block = memory.view(DTYPES[dtype]).reshape(shape).view(_Block)
    block.memory = memory
    return torch.from_numpy(block)


def _new(nbytes: int) -> np.ndarray:
    """Uninitialised bytes that begin at a cache line."""
    memory = np.empty(nbytes + LINE, np.uint8)
    start = -memory.__array_interface__["data"][0] % LINE
    return memory[start : start + nbytes]


def unused_bytes() -> int:
    """Bytes kept for outputs to come."""
    return sum(size * len(blocks) for size, blocks in list(_unused.items()))


def release() -> None:
    """Give all unused memory back to the system."""
    _unused.clear()
