"""Small things kernels do to memory: int64 tables, zeros, arrays at cache-line borders."""

from __future__ import annotations

from math import prod

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .simd import Code, Int, address, block

_LINE_BYTES = 64

_I64 = ir.IntType(64)


@intrinsic
def poke(_context, array, index, value):
    """Set element `index` of an int64 array given by its address."""

    def generate(context, builder, _signature, values):
        start = builder.inttoptr(values[0], _I64.as_pointer())
        builder.store(values[2], builder.gep(start, [values[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@block
def clear(code: Code, dtype: str, target: Int, count: Int) -> None:
    """Write `count` zeros, rounded up to whole vectors."""
    code.loop(count, lambda i, _: code.store(code.zero(), target, i), step=code.lanes)


def int_at(code: Code, array: Int, index: Int | int) -> Int:
    """Element `index` of an int64 array given by its address, inside a building block."""
    b = code.builder
    start = b.inttoptr(array.value, _I64.as_pointer())
    return Int(b, b.load(b.gep(start, [code.int(index).value])))


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialised array in C order that begins at a cache line."""
    size = prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _LINE_BYTES, np.uint8)
    start = -address(memory) % _LINE_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)
