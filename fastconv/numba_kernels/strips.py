"""Convolution with few channels per group: lanes are output pixels, no channel is padded.

A strip of output rows moves along T. Its input rows are transposed once into a ring of frames,
[channel][frame][phase][row][column], so that every tap of every output of the strip is one offset:
with column stride s, the columns p, p + s, ... make phase p, and tap k of output q is column
q + k * dilation // s of phase k * dilation % s; rows likewise. Weights are broadcast, sums leave as
[channel][pixel] and are transposed back on their way to y.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numba import njit

from ..epilogue import ACTIVATIONS
from ..geometry import Geometry
from ..plan import Plan
from .activations import activate
from .finish import activation_number, finish_rows
from .layout import Views, transpose_tile
from .memory import clear, int_at, poke
from .simd import (
    Code,
    Int,
    Kernel,
    Vec,
    address,
    block,
    call,
    fma,
    kernel,
    parallel_for,
    peek,
    register_count,
    threads,
    vector_width,
)

RING_BYTES = 640 << 10  # of one thread's ring and sums: most of it stays in L2
LINE_BYTES = 64


def register_block(outputs: int) -> tuple[int, int]:
    """Output channels and vectors of pixels whose sums are kept in registers."""
    spare = register_count() - 1
    blocks = range(1, min(outputs, 12 if spare > 16 else 6) + 1)
    # Least padding, then most sums at once, then most uses of a pixel.
    best = min(blocks, key=lambda k: (-(-outputs // k) * k, -k * min(spare // (k + 1), 8), -k))
    return best, min(spare // (best + 1), 8)


@dataclass(frozen=True)
class Strips:
    """How the work of one geometry is cut, and where a thread's pieces lie; sizes in elements."""

    geometry: Geometry
    lanes: int
    channels: int  # output channels of a register block
    vectors: int  # vectors of pixels of a register block
    groups: int  # groups per item
    rows: int  # output rows and columns per item
    columns: int
    phases: tuple[tuple[int, ...], tuple[int, ...]]  # used residues of rows and of columns
    row_length: int
    frame: int
    ring: int  # frames that one output column of T spans
    channel_stride: int
    sum_stride: int

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Elements of a thread's input ring, sums, transposed tile and tap table (int64 pairs)."""
        g = self.geometry
        inputs = self.groups * (g.in_channels // g.groups) * self.channel_stride
        outputs = self.groups * (g.out_channels // g.groups)
        rows = -(-(outputs + self.channels) // self.lanes) * self.lanes
        sizes = (inputs, rows * self.sum_stride, self.lanes**2, 4 * g.taps)
        return tuple(-(-size // 16) * 16 for size in sizes)  # type: ignore[return-value]


def _residues(kernel_size: int, stride: int, dilation: int) -> tuple[int, ...]:
    return tuple(sorted({k * dilation % stride for k in range(kernel_size)}))


def _reach(kernel_size: int, stride: int, dilation: int) -> int:
    """Packed rows or columns that the last tap lies behind the first."""
    return (kernel_size - 1) * dilation // stride


@functools.lru_cache(maxsize=256)
def cut(plan: Plan, workers: int) -> Strips:
    """The cheapest cut of a plan by a count of cycles, for some threads."""
    g = plan.geometry.lifted()
    width = -(-g.out_size[2] // -(-g.out_size[2] // 256))
    fewest = max(1, vector_width(plan.dtype) // max(g.in_channels // g.groups, 1))
    groups = sorted({min(g.groups, fewest * n) for n in (1, 2, 3, 4, 5, 6, 8, 12, 16)} | {1})
    heights = range(1, min(g.out_size[1], 64) + 1)
    cuts = [_strips(g, plan.dtype, n, h, width) for n in groups for h in heights]
    small = [s for s in cuts if sum(s.parts) * _item(plan) <= RING_BYTES]
    if not small:
        return min(cuts, key=lambda s: sum(s.parts))
    return min(small, key=lambda s: cycles(s, workers))


def _item(plan: Plan) -> int:
    return np.dtype(plan.dtype).itemsize


def _strips(g: Geometry, dtype: str, groups: int, rows: int, columns: int) -> Strips:
    lanes = vector_width(dtype)
    channels, vectors = register_block(g.out_channels // g.groups)
    axes = list(zip(g.kernel, g.stride, g.dilation, strict=True))
    phases = _residues(*axes[1]), _residues(*axes[2])
    row_length = _row_length(g, phases[1], columns)
    frame = len(phases[0]) * len(phases[1]) * (rows + _reach(*axes[1])) * row_length
    ring = g.span[0]
    block_pixels = vectors * lanes
    pixels = -(-((rows - 1) * row_length + columns) // block_pixels) * block_pixels
    # An odd number of lines between channels: they do not compete for the same cache sets.
    line = LINE_BYTES // np.dtype(dtype).itemsize
    odd = lambda size: (-(-size // line) | 1) * line  # noqa: E731
    return Strips(
        g, lanes, channels, vectors, groups, rows, columns, phases, row_length, frame, ring,
        odd(ring * frame + block_pixels), odd(pixels),
    )  # fmt: skip


def _row_length(g: Geometry, phases: tuple[int, ...], columns: int) -> int:
    """Columns of a packed row; zeros in front of a row are those behind the row before it too."""
    w, s, before = g.in_size[2], g.stride[2], g.padding[2][0]
    full = columns + _reach(g.kernel[2], s, g.dilation[2])
    if columns < g.out_size[2]:
        return full
    starts = [phase - before for phase in phases]
    zeros = min(max(-(start // s), 0) for start in starts)
    data = max(min((w - 1 - start) // s + 1, full) for start in starts)
    return max(full - zeros, data)


def cycles(s: Strips, workers: int) -> float:
    """Roughly, of the busiest thread; constants measured on 512-bit registers."""
    g = s.geometry
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    chunks = -(-g.groups // s.groups)
    items = g.batch * chunks * -(-g.out_size[1] // s.rows) * -(-g.out_size[2] // s.columns)
    pixels = s.sum_stride // (s.vectors * s.lanes) * s.vectors
    sums = s.groups * -(-k // s.channels) * (s.channels * c * g.taps * pixels / 2 + 40)
    tiles = -(-s.groups * c // s.lanes) * (s.frame // s.row_length) * -(-s.row_length // s.lanes)
    outputs = -(-s.groups * k // s.lanes) * s.rows * -(-s.columns // s.lanes)
    frames = min(g.stride[0], s.ring)
    return -(-items // workers) * g.out_size[0] * (sums + 150 * (frames * tiles + outputs))


def scratch_size(plan: Plan) -> int:
    """Elements of plan.dtype that all threads need."""
    s = cut(plan, threads())
    g = s.geometry
    padded_bias = g.groups * -(-g.out_channels // g.groups // s.channels) * s.channels
    return sum(s.parts) * threads() + padded_bias


def pack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, C / G, *kernel) -> (G, blocks, taps, C / G, channels of a register block)."""
    g = plan.geometry
    k = g.out_channels // g.groups
    channels, _ = register_block(k)
    blocks = -(-k // channels)
    padded = np.zeros((g.groups, blocks * channels, g.in_channels // g.groups, g.taps), plan.dtype)
    padded[:, :k] = np.asarray(weights).reshape(g.groups, k, -1, g.taps)
    # (G, blocks, channels, C / G, taps) -> (G, blocks, taps, C / G, channels)
    padded = padded.reshape(g.groups, blocks, channels, -1, g.taps)
    return np.ascontiguousarray(padded.transpose(0, 1, 4, 3, 2))


@block
def pixels_product(
    code: Code,
    dtype: str,
    channels: int,
    vectors: int,
    table: Int,
    taps: Int,
    depth: Int,
    source: Int,
    source_stride: Int,
    weights: Int,
    bias: Int,
    sums: Int,
    sums_stride: Int,
) -> None:
    """sums (channels, vectors * lanes) = bias + sum over taps and depth of weights times pixels.

    table (taps, 2) int64: offset into a channel of source, offset into the weights
    source (depth, source_stride);  bias (channels,)
    weights (depth, channels) at each tap's offset
    """

    def tap(t: Int, totals: list[Vec]) -> list[Vec]:
        pixels = source + int_at(code, table, 2 * t) * code.item
        factors = weights + int_at(code, table, 2 * t + 1) * code.item

        def channel(c: Int, totals: list[Vec]) -> list[Vec]:
            start = c * source_stride
            x = [code.load(pixels, start + j * code.lanes) for j in range(vectors)]
            following = []
            for k in range(channels):
                w = code.broadcast(factors, c * channels + k)
                following += [fma(w, x[j], totals[k * vectors + j]) for j in range(vectors)]
            return following

        return code.loop(depth, channel, totals)

    first = [code.broadcast(bias, k) for k in range(channels) for _ in range(vectors)]
    totals = code.loop(taps, tap, first)
    for k in range(channels):
        for j in range(vectors):
            code.store(totals[k * vectors + j], sums, k * sums_stride + j * code.lanes)


@block
def activate_row(code: Code, dtype: str, row: Int, count: Int, activation: Int) -> None:
    """row (count,) = activation(row), whole vectors."""
    for number, name in enumerate(ACTIVATIONS):
        if name != "none":

            def vector(i: Int, _: list[Vec], name: str = name) -> None:
                code.store(activate(code.load(row, i), name), row, i)

            with code.when(activation.is_(number)):
                code.loop(count, vector, step=code.lanes)


# What `_prepared` puts where: addresses of the call, then what is known before it.
(
    X, Y, RESIDUAL, SCRATCH, BIAS, WEIGHTS, ACTIVATION, THREAD_STEP, SUMS, TILE, TABLE,
    T, H, W, C, OT, OH, OW, K, ST, SH, SW, PAD_T, PAD_H, PAD_W, KT, DT, GROUPS,
    SOME, HIGH, WIDE, LENGTH, FRAME, SLOTS, STRIDE, SUMS_STRIDE, ROW_PHASES, COLUMN_PHASES,
    RESIDUES, OFFSETS, AREA, PACK, MULTIPLY, UNPACK,
) = range(44)  # fmt: skip


@njit(error_model="numpy")
def _strip(params, item):
    """Image, first group and their number, first output row and number, first column and number."""
    across = -(-peek(params, OW) // peek(params, WIDE))
    down = -(-peek(params, OH) // peek(params, HIGH))
    chunks = -(-peek(params, GROUPS) // peek(params, SOME))
    column = item % across * peek(params, WIDE)
    row = item // across % down * peek(params, HIGH)
    group = item // (across * down) % chunks * peek(params, SOME)
    return (
        item // (across * down * chunks),
        group,
        min(peek(params, SOME), peek(params, GROUPS) - group),
        row,
        min(peek(params, HIGH), peek(params, OH) - row),
        column,
        min(peek(params, WIDE), peek(params, OW) - column),
    )


def _pack_kernel(DTYPE, ITEM, LANES):
    """Transpose a frame's rows of a strip into the ring: item = (strip, frame)."""

    def kernel(params, item, thread):
        t, h, w, c = peek(params, T), peek(params, H), peek(params, W), peek(params, C)
        image, first_group, some, first_row, rows, first_column, _ = _strip(params, item // t)
        depth, frame, length = c // peek(params, GROUPS), peek(params, FRAME), peek(params, LENGTH)
        stride, step = peek(params, STRIDE), peek(params, SW)
        row_phases, column_phases = peek(params, ROW_PHASES), peek(params, COLUMN_PHASES)
        packed_rows = frame // (row_phases * column_phases * length)
        channels = some * depth
        slot = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        slot += item % t % peek(params, SLOTS) * frame * ITEM
        for phase in range(row_phases * column_phases):
            top = first_row * peek(params, SH) - peek(params, PAD_H)
            top += peek(peek(params, RESIDUES), phase // column_phases)
            start = first_column * step - peek(params, PAD_W)
            start += peek(peek(params, RESIDUES), row_phases + phase % column_phases)
            left, right = (
                max((step - 1 - start) // step, 0),
                min((w - 1 - start) // step + 1, length),
            )
            for r in range(packed_rows - peek(params, HIGH) + rows):
                row = top + r * peek(params, SH)
                if row < 0 or row >= h:
                    continue
                source = (((image * t + item % t) * h + row) * w + start) * c + first_group * depth
                target = (phase * packed_rows + r) * length
                for n in range(0, channels, LANES):
                    q = left
                    while q < right:
                        if right - left >= LANES:
                            q = min(q, right - LANES)  # some pixels again, rather than fewer
                        transpose_tile(
                            DTYPE, peek(params, X) + (source + q * step * c + n) * ITEM, step * c,
                            slot + (target + n * stride + q) * ITEM, stride,
                            right - q, channels - n,
                        )  # fmt: skip
                        q += LANES

    return kernel


def _multiply_kernel(DTYPE, ITEM, LANES, CHANNELS, VECTORS):
    """The sums of a strip at one output time: item = (strip, time)."""

    def kernel(params, item, thread):
        _, first_group, some, _, rows, _, columns = _strip(params, item // peek(params, OT))
        depth = peek(params, C) // peek(params, GROUPS)
        outputs = peek(params, K) // peek(params, GROUPS)
        blocks, area, kt = -(-outputs // CHANNELS), peek(params, AREA), peek(params, KT)
        stride, sums_stride = peek(params, STRIDE), peek(params, SUMS_STRIDE)
        ring = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        sums, table = ring + peek(params, SUMS), ring + peek(params, TABLE)
        taps = 0
        for i in range(kt):
            at = item % peek(params, OT) * peek(params, ST) - peek(params, PAD_T)
            at += i * peek(params, DT)
            if 0 <= at < peek(params, T):
                for s in range(area):
                    slot = at % peek(params, SLOTS) * peek(params, FRAME)
                    poke(table, 2 * taps, slot + peek(peek(params, OFFSETS), s))
                    poke(table, 2 * taps + 1, (i * area + s) * depth * CHANNELS)
                    taps += 1
        pixels = (rows - 1) * peek(params, LENGTH) + columns
        for g in range(some):
            for n in range(blocks):
                under = (first_group + g) * blocks + n
                for p in range(0, pixels, VECTORS * LANES):
                    pixels_product(
                        DTYPE, CHANNELS, VECTORS, table, taps, depth,
                        ring + (g * depth * stride + p) * ITEM, stride,
                        peek(params, WEIGHTS) + under * kt * area * depth * CHANNELS * ITEM,
                        peek(params, BIAS) + under * CHANNELS * ITEM,
                        sums + ((g * outputs + n * CHANNELS) * sums_stride + p) * ITEM,
                        sums_stride,
                    )  # fmt: skip

    return kernel


def _unpack_kernel(DTYPE, ITEM, LANES):
    """Activation and residual, and the way to y: item = (strip, time)."""

    def kernel(params, item, thread):
        ot, k, residual = peek(params, OT), peek(params, K), peek(params, RESIDUAL)
        image, group, some, row, rows, column, columns = _strip(params, item // ot)
        outputs = k // peek(params, GROUPS)
        sums_stride, length = peek(params, SUMS_STRIDE), peek(params, LENGTH)
        ring = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        sums, tile = ring + peek(params, SUMS), ring + peek(params, TILE)
        if residual == 0 and peek(params, ACTIVATION) != 0:
            for n in range(some * outputs):
                row_of_sums = sums + n * sums_stride * ITEM
                count = (rows - 1) * length + columns
                activate_row(DTYPE, row_of_sums, count, peek(params, ACTIVATION))
        for r in range(rows):
            at = (image * ot + item % ot) * peek(params, OH) + row + r
            target = (at * peek(params, OW) + column) * k + group * outputs
            for n in range(0, some * outputs, LANES):
                left, q = some * outputs - n, 0
                while q < columns:
                    if residual == 0 and columns >= LANES:
                        q = min(q, columns - LANES)
                    source = sums + (n * sums_stride + r * length + q) * ITEM
                    to = (target + q * k + n) * ITEM
                    y = peek(params, Y) + to
                    if residual == 0:
                        transpose_tile(DTYPE, source, sums_stride, y, k, left, columns - q)
                    else:
                        transpose_tile(DTYPE, source, sums_stride, tile, LANES, LANES, LANES)
                        finish_rows(
                            DTYPE, 1, tile, min(LANES, columns - q), y, k, min(left, LANES),
                            0, residual + to, peek(params, ACTIVATION),
                        )  # fmt: skip
                    q += LANES

    return kernel


def _strips_kernel(DTYPE, ITEM):
    """One item is a strip of output rows of some groups, all of T."""

    def kernel(params, item, thread):
        t, ot = peek(params, T), peek(params, OT)
        some = _strip(params, item)[2]
        ring = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        channels = some * (peek(params, C) // peek(params, GROUPS))
        # Padding stays zero: for one strip it is the same rows and columns in every frame.
        clear(DTYPE, ring, channels * peek(params, STRIDE))
        following = 0
        for o in range(ot):
            first = o * peek(params, ST) - peek(params, PAD_T)
            following = max(following, first)
            while following <= min(first + (peek(params, KT) - 1) * peek(params, DT), t - 1):
                call(peek(params, PACK), params, item * t + following, thread)
                following += 1
            call(peek(params, MULTIPLY), params, item * ot + o, thread)
            call(peek(params, UNPACK), params, item * ot + o, thread)

    return kernel


def _offsets(s: Strips) -> np.ndarray:
    """Of every tap of (KH, KW) into a frame."""
    g, (row_phases, column_phases) = s.geometry, s.phases
    packed_rows = s.frame // (len(row_phases) * len(column_phases) * s.row_length)
    found = []
    for i in range(g.kernel[1]):
        for j in range(g.kernel[2]):
            row, a = divmod(i * g.dilation[1], g.stride[1])
            column, e = divmod(j * g.dilation[2], g.stride[2])
            phase = row_phases.index(a) * len(column_phases) + column_phases.index(e)
            found.append((phase * packed_rows + row) * s.row_length + column)
    return np.array(found, np.int64)


class _Prepared(NamedTuple):
    """Everything about a plan and a number of threads but the arrays."""

    kernel: Kernel
    known: tuple[int, ...]  # parameters behind the addresses of the call
    items: int
    tables: tuple[np.ndarray, ...]  # whose addresses are among them


@functools.lru_cache(maxsize=256)
def _prepared(plan: Plan, workers: int) -> _Prepared:
    s = cut(plan, workers)
    g, item, dtype = s.geometry, _item(plan), plan.dtype
    offsets = _offsets(s)
    residues = np.array([*s.phases[0], *s.phases[1]], np.int64)
    ends = np.cumsum(s.parts) * item
    stages = (
        kernel(_pack_kernel, dtype, item, s.lanes),
        kernel(_multiply_kernel, dtype, item, s.lanes, s.channels, s.vectors),
        kernel(_unpack_kernel, dtype, item, s.lanes),
    )
    known = (
        activation_number(plan.epilogue), *map(int, (ends[3], *ends[:3])),
        *g.in_size, g.in_channels, *g.out_size, g.out_channels, *g.stride,
        *(before for before, _ in g.padding), g.kernel[0], g.dilation[0], g.groups,
        s.groups, s.rows, s.columns, s.row_length, s.frame, s.ring,
        s.channel_stride, s.sum_stride, len(s.phases[0]), len(s.phases[1]),
        address(residues), address(offsets), prod(g.kernel[1:]),
        *(stage.address for stage in stages),
    )  # fmt: skip
    cuts = -(-g.groups // s.groups) * -(-g.out_size[1] // s.rows) * -(-g.out_size[2] // s.columns)
    compiled = kernel(_strips_kernel, dtype, item)
    return _Prepared(compiled, known, g.batch * cuts, (residues, offsets))


def run(plan: Plan, packed: np.ndarray, bias: np.ndarray | None, views: Views) -> None:
    """views of x (N, T, H, W, C), residual and y (N, OT, OH, OW, K); packed by `pack`."""
    prepared = _prepared(plan, threads())
    groups, blocks, *_, channels = packed.shape
    shift = views.workspace[-groups * blocks * channels :]
    shift[...] = 0
    if bias is not None:
        shift.reshape(groups, -1)[:, : bias.size // groups] = bias.reshape(groups, -1)
    arrays = (views.x, views.y, views.residual, views.workspace, shift, packed)
    parallel_for(prepared.kernel, (*map(address, arrays), *prepared.known), prepared.items)
