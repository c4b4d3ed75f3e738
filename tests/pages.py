"""Arrays beside memory that the process may not touch: a stray access ends it."""

from __future__ import annotations

import ctypes
import mmap
import sys
from math import prod

import numpy as np
import pytest

from fastconv.plan import CHANNELS_LAST, CONTIGUOUS

needs_mprotect = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="mprotect as Linux has it"
)


class BetweenForbiddenPages:
    """An array (N, C, *size) that ends, or begins, exactly where nothing may be read."""

    def __init__(self, shape, dtype="float32", layout=CONTIGUOUS, at_end=True):
        size = prod(shape) * np.dtype(dtype).itemsize
        inner = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for page in (start, start + mmap.PAGESIZE + inner):
            no_access = 0
            assert protect(ctypes.c_void_p(page), mmap.PAGESIZE, no_access) == 0
        offset = mmap.PAGESIZE + (inner - size if at_end else 0)
        flat = np.frombuffer(self._map, dtype, prod(shape), offset)
        in_memory = (shape[0], *shape[2:], shape[1]) if layout == CHANNELS_LAST else shape
        array = flat.reshape(in_memory)
        self.array = np.moveaxis(array, -1, 1) if layout == CHANNELS_LAST else array
