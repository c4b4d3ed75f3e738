"""Depthwise convolution along one axis: memory is a stack of lines, and lanes run across pixels.

Behind the convolved axis lie `inner` elements of which nothing but the channel matters, so a vector
takes any of them, whole, and its weights repeat with the least common multiple of channels and
lanes. A block of outputs along the axis shares the lines that it reads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import lcm, prod

import numpy as np

from ..geometry import Geometry
from ..plan import Plan
from .depthwise_blocks import activated
from .finish import activation_number
from .memory import aligned, int_at
from .simd import (
    Code,
    Int,
    Kernel,
    Vec,
    address,
    block,
    fma,
    kernel,
    parallel_for,
    peek,
    threads,
    vector_width,
)

BLOCKS = (8, 4, 2, 1)  # outputs along the axis at once
MOST_TAPS = 8
TABLE_VECTORS = 8  # at least, so that the loop over a table of weights is worth its start
MOST_WEIGHTS = 1 << 16  # in the table of all taps: stays in L2
CHUNK_BYTES = 4 << 10  # of a line: the lines of a block stay in L1
PREFETCH_BYTES = 16 << 20  # of x and y: more than stays in the caches between two layers

# The parameters of `line_kernel`, by position.
(
    X, Y, RESIDUAL, BIAS, WEIGHTS, ACTIVATION, LINES, OUT_LINES, INNER, PAD, TABLE, CHUNK,
    CHUNKS, PARTS, PREFETCH,
) = range(15)  # fmt: skip


@block
def line_block(
    code: Code, dtype: str, taps: int, stride: int, outputs: int, masked: int, params: Int, x: Int,
    weights: Int, bias: Int, residual: Int, y: Int, first: Int, many: Int, count: Int, next_x: Int,
    next_y: Int,
) -> None:  # fmt: skip
    """`outputs` lines of `count` elements: activation(bias + sum over taps + residual).

    x: where line `first` of the input is, or would be;  many: lines of outputs that exist
    weights (taps, table), bias (table,): from the same element of the table on
    next_x, next_y: lines to fetch into the cache for the next block; 0 for nothing
    """
    inner, table = int_at(code, params, INNER), int_at(code, params, TABLE)
    lines, activation = int_at(code, params, LINES), int_at(code, params, ACTIVATION)
    reach = (outputs - 1) * stride + taps
    starts = [x + inner * (s * code.item) for s in range(reach)]
    if masked:
        zeros = weights + table * (taps * code.item)
        inside = [code.within(code.int(0), first + s, lines) for s in range(reach)]
        starts = [code.select(inside[s], starts[s], zeros) for s in range(reach)]

    def vector(i: Int, _: list[Vec]) -> None:
        rest = code.first(count - i) if masked else None
        with code.when(next_x > 0):
            for s in range(outputs * stride):
                code.prefetch(next_x, inner * s + i)
            for o in range(outputs):
                code.prefetch(next_y, inner * o + i, write=True)
        w = [code.load(weights, table * k + i) for k in range(taps)]
        acc = [code.load(bias, i)] * outputs
        for s in range(reach):
            line = code.load(starts[s], i, rest)
            for o in range(outputs):
                if 0 <= s - o * stride < taps:
                    acc[o] = fma(line, w[s - o * stride], acc[o])

        def add_residual(_: Int, acc: list[Vec]) -> list[Vec]:
            # A line that does not exist is read as the first one, and not written.
            at = [inner * code.select(many > o, o, 0) for o in range(outputs)]
            return [z + code.load(residual, at[o] + i, rest) for o, z in enumerate(acc)]

        acc = code.loop(code.select(residual.is_(0), 0, 1), add_residual, acc)
        for o, z in enumerate(activated(code, activation, acc)):
            with code.when(many > o):
                code.store(z, y, inner * o + i, rest)

    code.loop(count, vector, step=code.lanes)


def line_kernel(DTYPE, ITEM, LANES, TAPS, STRIDE, OUTPUTS):
    """An item is a part of the axis, for a chunk of the elements behind it."""

    def kernel(params, item, thread):
        inner, table, pad = peek(params, INNER), peek(params, TABLE), peek(params, PAD)
        lines, out_lines = peek(params, LINES), peek(params, OUT_LINES)
        chunks, parts = peek(params, CHUNKS), peek(params, PARTS)
        image, chunk, part = item // (chunks * parts), item // parts % chunks, item % parts
        start = chunk * peek(params, CHUNK)
        stop = min(inner, start + peek(params, CHUNK))
        first_out, last = out_lines * part // parts, out_lines * (part + 1) // parts
        residual = peek(params, RESIDUAL)
        for t in range(first_out, last, OUTPUTS):
            first = t * STRIDE - pad
            reach = (OUTPUTS - 1) * STRIDE + TAPS
            whole = first >= 0 and first + reach <= lines and t + OUTPUTS <= last
            for begin in range(start, stop, table):
                count = min(table, stop - begin)
                x = peek(params, X) + ITEM * ((image * lines + first) * inner + begin)
                at = ITEM * ((image * out_lines + t) * inner + begin)
                y = peek(params, Y) + at
                added = residual + at if residual != 0 else 0
                next_x = next_y = 0
                if peek(params, PREFETCH):
                    # Lines of the next block, or of the next chunk; never past the last line.
                    next_begin, next_t, new = begin, t + OUTPUTS, first + reach
                    if t + OUTPUTS >= last:
                        next_begin, next_t = begin + stop - start, first_out
                        new = first_out * STRIDE - pad
                    if next_begin < inner:
                        new = max(0, min(new, lines - OUTPUTS * STRIDE))
                        next_t = max(0, min(next_t, out_lines - OUTPUTS))
                        next_x = (image * lines + new) * inner + next_begin
                        next_x = peek(params, X) + ITEM * next_x
                        next_y = (image * out_lines + next_t) * inner + next_begin
                        next_y = peek(params, Y) + ITEM * next_y
                if whole and count % LANES == 0:
                    line_block(
                        DTYPE, TAPS, STRIDE, OUTPUTS, 0, params, x, peek(params, WEIGHTS),
                        peek(params, BIAS), added, y, first, OUTPUTS, count, next_x, next_y,
                    )  # fmt: skip
                else:
                    line_block(
                        DTYPE, TAPS, STRIDE, OUTPUTS, 1, params, x, peek(params, WEIGHTS),
                        peek(params, BIAS), added, y, first, last - t, count, next_x, next_y,
                    )  # fmt: skip

    return kernel


@dataclass(frozen=True)
class Lines:
    """One axis of a geometry: images (before it), lines (along it), elements of a line (behind)."""

    images: int
    lines: int
    out_lines: int
    inner: int
    taps: int
    stride: int
    pad: int


def axis_of(geometry: Geometry) -> int | None:
    """The only axis on which anything happens, or None; for a lifted geometry."""
    busy = [
        axis
        for axis in range(3)
        if (geometry.kernel[axis], geometry.stride[axis], geometry.padding[axis]) != (1, 1, (0, 0))
    ]
    return None if len(busy) > 1 else (busy or [0])[0]


def suits(geometry: Geometry) -> bool:
    """Whether this form can compute a lifted geometry."""
    axis = axis_of(geometry)
    if axis is None or geometry.out_channels != geometry.in_channels:
        return False
    taps, dilation = geometry.kernel[axis], geometry.dilation[axis]
    table = taps * lcm(geometry.in_channels, vector_width("float32"))
    return (
        (taps == 1 or dilation == 1)
        and taps <= MOST_TAPS
        and geometry.stride[axis] <= 2
        and table <= MOST_WEIGHTS
    )


def _lines(geometry: Geometry) -> Lines:
    axis = axis_of(geometry)
    assert axis is not None
    size = geometry.in_size
    return Lines(
        images=geometry.batch * prod(size[:axis]),
        lines=size[axis],
        out_lines=geometry.out_size[axis],
        inner=prod(size[axis + 1 :]) * geometry.in_channels,
        taps=geometry.kernel[axis],
        stride=geometry.stride[axis],
        pad=geometry.padding[axis][0],
    )


def _table(geometry: Geometry, dtype: str) -> int:
    """Elements of the table of weights of one tap: whole vectors and whole pixels."""
    period = lcm(geometry.in_channels, vector_width(dtype))
    return period * -(-TABLE_VECTORS * vector_width(dtype) // period)


def pack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (C, 1, *kernel) as (taps, table), channels repeated to whole vectors, and zeros behind."""
    geometry = plan.geometry
    w = np.asarray(weights, plan.dtype).reshape(geometry.in_channels, geometry.taps)
    table = _table(geometry, plan.dtype)
    packed = aligned((geometry.taps + 1, table), plan.dtype)
    packed[-1] = 0
    packed[:-1].reshape(geometry.taps, -1, geometry.in_channels)[...] = w.T[:, None]
    return packed


def scratch_size(plan: Plan) -> int:
    """Elements of workspace: the bias, repeated like the weights."""
    return _table(plan.geometry, plan.dtype)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """As `depthwise.run`, for x, residual and y (N, T, H, W, C) in C order."""
    compiled, fixed, items = _launch(plan, threads())
    repeated = workspace[: packed.shape[1]]
    repeated.reshape(-1, plan.geometry.in_channels)[...] = 0 if bias is None else bias
    arrays = (x, y, residual, repeated, packed)
    parallel_for(compiled, (*map(address, arrays), *fixed), items)


@functools.lru_cache(maxsize=256)
def _launch(plan: Plan, workers: int) -> tuple[Kernel, tuple[int, ...], int]:
    """The kernel of a plan, the parameters behind its arrays, and how many items."""
    geometry = plan.geometry.lifted()
    cut = _lines(geometry)
    table, itemsize = _table(geometry, plan.dtype), np.dtype(plan.dtype).itemsize
    # A line is cut for the cache, and smaller while there are threads without work.
    chunk = table * max(1, min(CHUNK_BYTES // itemsize, cut.inner) // table)
    chunks = -(-cut.inner // chunk)
    # Least outputs in blocks, one more for the start of each.
    outputs = min(BLOCKS, key=lambda b: -(-cut.out_lines // b) * (b + 1))
    parts = 1
    while cut.images * chunks * parts < 2 * workers and parts * outputs < cut.out_lines:
        parts += 1
    x_and_y = itemsize * (prod(geometry.x_shape) + prod(geometry.y_shape))
    fixed = (
        activation_number(plan.epilogue), cut.lines, cut.out_lines, cut.inner, cut.pad, table,
        chunk, chunks, parts, int(x_and_y > PREFETCH_BYTES),
    )  # fmt: skip
    lanes = vector_width(plan.dtype)
    constants = (plan.dtype, itemsize, lanes, cut.taps, cut.stride, outputs)
    return kernel(line_kernel, *constants), fixed, cut.images * chunks * parts
