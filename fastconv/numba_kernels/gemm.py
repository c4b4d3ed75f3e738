"""The matrix micro-kernel: a block of C = A B in registers, A broadcast from rows, B streamed.

A (rows, depth) has a run-time row stride; B is packed by `pack_panels` into panels of a few vectors
of columns, [panel][depth][vectors * lanes], zeros behind the last column.
"""

from __future__ import annotations

from math import prod

import numpy as np

from ..epilogue import Epilogue
from .activations import activate
from .runs import RUN, Runs
from .simd import LINE_BYTES, Code, Int, Vec, block, fma, register_count, vector_width

# Rows of the register block by registers and vectors per panel: accumulators, a row of B, one
# element of A. 14 x 2, 8 x 3 and 6 x 4 run at the fused multiply-add peak, 7 x 4 and 9 x 3 spill.
_BLOCK_ROWS = {32: {1: 14, 2: 14, 3: 8, 4: 6}, 16: {1: 12, 2: 6, 3: 4, 4: 2}}


def epilogue_words(epilogue: Epilogue) -> str:
    """An Epilogue as the compile-time constant of `gemm_tile`."""
    words = ["bias"] * epilogue.bias + ["residual"] * epilogue.residual
    return " ".join([*words, *[epilogue.activation] * (epilogue.activation != "none")])


# Time of a multiplication in a block of so many vectors, measured at 24 to 128 deep.
_BLOCK_TIME = {1: 1.45, 2: 1.0, 3: 1.03, 4: 1.0}


def block_rows(vectors: int) -> int:
    """Rows of A that one register block takes, for panels of some vectors."""
    return _BLOCK_ROWS[register_count()][vectors]


def panel_vectors(columns: int, dtype: str) -> int:
    """Vectors per panel: little padding behind `columns`, and enough to do per element of A."""
    needed = -(-columns // vector_width(dtype))
    order = (2, 4, 3, 1) if register_count() == 32 else (2, 3, 1)
    return min(order, key=lambda v: (-(-needed // v) * v * _BLOCK_TIME[v], order.index(v)))


def panel_memory(*shape: int, dtype: str) -> np.ndarray:
    """Zeros (..., depth, vectors * lanes) for panels, with memory for one more behind the last:
    products ask for the panel behind the one they use."""
    memory = np.zeros(prod(shape) + prod(shape[-2:]), dtype)
    return memory[: prod(shape)].reshape(shape)


def pack_panels(b: np.ndarray, vectors: int) -> np.ndarray:
    """b (..., depth, columns) -> (..., panels, depth, vectors * lanes), zeros behind the last."""
    *outer, depth, columns = b.shape
    width = vectors * vector_width(str(b.dtype))
    panels = panel_memory(*outer, -(-columns // width), depth, width, dtype=str(b.dtype))
    for panel in range(panels.shape[-3]):
        part = b[..., panel * width : (panel + 1) * width]
        panels[..., panel, :, : part.shape[-1]] = part
    return panels


@block
def gemm_tile(
    code: Code,
    dtype: str,
    rows: int,
    vectors: int,
    epilogue: str,
    a: Int,
    a_stride: Int,
    b: Int,
    depth: Int,
    c: Int,
    c_stride: Int,
    columns: Int,
    bias: Int,
    residual: Int,
    residual_stride: Int,
) -> None:
    """c (rows, columns) = activation(a (rows, depth) @ b + bias + residual) for one panel b.

    epilogue: words out of "bias", "residual" and an activation; "" for the bare product
    columns: valid ones, the others are not touched; bias must be readable for the whole panel
    residual may be c itself, which makes the product accumulate

    Equivalent to: c[:, :columns] = f(a @ b + bias + residual)[:, :columns]
    """
    _tile(
        code, rows, vectors, epilogue, a, a_stride, b, depth, c, c_stride, columns,
        bias, residual, residual_stride,
    )  # fmt: skip


def _tile(
    code: Code, rows: int, vectors: int, epilogue: str, a: Int, a_stride: Int, b: Int, depth: Int,
    c: Int, c_stride: Int, columns: Int, bias: Int, residual: Int, residual_stride: Int,
) -> None:  # fmt: skip
    words, lanes = epilogue.split(), code.lanes
    width = vectors * lanes
    full = columns >= width
    partial = columns < width
    spare = code.scratch(rows * vectors)
    out, out_stride = code.select(full, c, spare), code.select(full, c_stride, width)
    if "residual" in words:
        with code.when(partial):
            _copy_columns(code, rows, residual, residual_stride, spare, width, columns)
        residual = code.select(full, residual, spare)
        residual_stride = code.select(full, residual_stride, width)
    # A panel is streamed once per block of rows: the next one, right behind, arrives meanwhile.
    ahead = b + depth * (width * code.item) if rows == block_rows(vectors) else None
    sums = _product(code, rows, vectors, a, a_stride, b, depth, ahead)
    for j in range(vectors):
        shift = code.load(bias, j * lanes) if "bias" in words else None
        for i in range(rows):
            total = sums[i * vectors + j]
            if shift is not None:
                total = total + shift
            if "residual" in words:
                total = total + code.load(residual, residual_stride * i + j * lanes)
            code.store(activated(total, words), out, out_stride * i + j * lanes)
    with code.when(partial):
        _copy_columns(code, rows, spare, width, c, c_stride, columns)


@block
def gemm_rows(
    code: Code,
    dtype: str,
    rows: int,
    vectors: int,
    epilogue: str,
    count: Int,
    a: Int,
    a_stride: Int,
    b: Int,
    depth: Int,
    c: Int,
    c_stride: Int,
    columns: Int,
    bias: Int,
    residual: Int,
    residual_stride: Int,
) -> None:
    """`gemm_tile` for any count of rows: blocks of `rows`, then of half as many, down to one."""
    first, size = code.int(0), rows
    while size:
        blocks = (count - first) // size

        def tile(n: Int, _: list[Vec], first: Int = first, size: int = size) -> None:
            row = first + n * size
            _tile(
                code, size, vectors, epilogue,
                a + row * a_stride * code.item, a_stride, b, depth,
                c + row * c_stride * code.item, c_stride, columns,
                bias, residual + row * residual_stride * code.item, residual_stride,
            )  # fmt: skip

        code.loop(blocks, tile)
        first, size = first + blocks * size, size // 2


def _product(
    code: Code, rows: int, vectors: int, a: Int, a_stride: Int, b: Int, depth: Int,
    ahead: Int | None,
) -> list[Vec]:  # fmt: skip
    """The rows * vectors sums over depth, row by row; the panel at `ahead` comes into the cache."""
    width = vectors * code.lanes
    memory = code.scratch(rows * vectors)
    runs = Runs(code, [(memory, n * code.lanes) for n in range(rows * vectors)], depth > RUN)

    def run(start: Int, sums: list[Vec]) -> list[Vec]:
        def step(n: Int, sums: list[Vec]) -> list[Vec]:
            k = start + n
            if ahead is not None:
                for line in range(0, width, LINE_BYTES // code.item):
                    code.prefetch(ahead, k * width + line, level=2)
            panel = [code.load(b, k * width + j * code.lanes) for j in range(vectors)]
            following = []
            for i in range(rows):
                value = code.broadcast(a, a_stride * i + k)
                following += [fma(value, panel[j], sums[i * vectors + j]) for j in range(vectors)]
            return following

        return code.loop((depth - start).minimum(RUN), step, runs.start(start.is_(0), sums))

    return runs.total(code.loop(depth, run, [code.zero()] * (rows * vectors), step=RUN))


def activated(total: Vec, words: list[str]) -> Vec:
    """The activation among the words of an epilogue."""
    name = next((w for w in words if w not in ("bias", "residual")), "none")
    return activate(total, name)


def _copy_columns(
    code: Code, rows: int, source: Int, source_stride: Int | int, target: Int,
    target_stride: Int | int, columns: Int,
) -> None:  # fmt: skip
    def row(i: Int, _: list[Vec]) -> None:
        def vector(j: Int, _: list[Vec]) -> None:
            mask = code.first(columns - j)
            value = code.load(source, i * source_stride + j, mask)
            code.store(value, target, i * target_stride + j, mask)

        code.loop(columns, vector, step=code.lanes)

    code.loop(code.int(rows), row)
