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

import numpy as np

from ..epilogue import ACTIVATIONS
from ..geometry import Geometry
from ..plan import Plan
from .activations import activate
from .finish import activation_number, finish_rows
from .layout import transpose_tile
from .memory import clear, int_at, poke
from .simd import (
    Code,
    Int,
    Vec,
    address,
    block,
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


def _strips_kernel(DTYPE, ITEM, LANES, CHANNELS, VECTORS):
    """params: as `run` lists them; one item is a strip of output rows of some groups, all of T."""

    def kernel(params, item, thread):
        x, y, weights = peek(params, 0), peek(params, 1), peek(params, 2)
        bias, residual, activation = peek(params, 3), peek(params, 4), peek(params, 5)
        ring = peek(params, 6) + thread * peek(params, 7)
        sums, tile, table = ring + peek(params, 8), ring + peek(params, 9), ring + peek(params, 10)
        t, h, w, c = peek(params, 11), peek(params, 12), peek(params, 13), peek(params, 14)
        ot, oh, ow, k = peek(params, 15), peek(params, 16), peek(params, 17), peek(params, 18)
        st, sh, sw = peek(params, 19), peek(params, 20), peek(params, 21)
        pt, ph, pw = peek(params, 22), peek(params, 23), peek(params, 24)
        kt, dt, groups = peek(params, 25), peek(params, 26), peek(params, 27)
        some, high, wide = peek(params, 28), peek(params, 29), peek(params, 30)
        length, frame, slots = peek(params, 31), peek(params, 32), peek(params, 33)
        stride, sums_stride = peek(params, 34), peek(params, 35)
        row_phases, column_phases = peek(params, 36), peek(params, 37)
        residues, offsets, area = peek(params, 38), peek(params, 39), peek(params, 40)

        across, down = -(-ow // wide), -(-oh // high)
        first_column = item % across * wide
        first_row = item // across % down * high
        first_group = item // (across * down) % -(-groups // some) * some
        b = item // (across * down * -(-groups // some))
        some = min(some, groups - first_group)
        columns, rows = min(wide, ow - first_column), min(high, oh - first_row)
        depth, outputs = c // groups, k // groups
        blocks = -(-outputs // CHANNELS)
        channels, first_channel = some * depth, first_group * depth
        packed_rows = frame // (row_phases * column_phases * length)

        # Padding stays zero: for one strip it is the same rows and columns in every frame.
        clear(DTYPE, ring, channels * stride)
        following = 0
        for o in range(ot):
            low = o * st - pt
            following = max(following, low)
            while following <= min(low + (kt - 1) * dt, t - 1):
                slot = ring + following % slots * frame * ITEM
                for a in range(row_phases):
                    for r in range(packed_rows - high + rows):
                        in_h = (first_row + r) * sh - ph + peek(residues, a)
                        if in_h < 0 or in_h >= h:
                            continue
                        image_row = ((b * t + following) * h + in_h) * w
                        for e in range(column_phases):
                            start = first_column * sw - pw + peek(residues, row_phases + e)
                            left = max((sw - 1 - start) // sw, 0)
                            right = min((w - 1 - start) // sw + 1, length)
                            target = (
                                slot + ((a * column_phases + e) * packed_rows + r) * length * ITEM
                            )
                            for n in range(0, channels, LANES):
                                q = left
                                while q < right:
                                    if right - left >= LANES:
                                        q = min(q, right - LANES)  # again, rather than less
                                    transpose_tile(
                                        DTYPE,
                                        x + ((image_row + start + q * sw) * c + first_channel + n) * ITEM,
                                        sw * c, target + (n * stride + q) * ITEM, stride,
                                        right - q, channels - n,
                                    )  # fmt: skip
                                    q += LANES
                following += 1
            taps = 0
            for i in range(kt):
                if 0 <= low + i * dt < t:
                    for s in range(area):
                        at = (low + i * dt) % slots * frame + peek(offsets, s)
                        poke(table, 2 * taps, at)
                        poke(table, 2 * taps + 1, (i * area + s) * depth * CHANNELS)
                        taps += 1
            pixels = (rows - 1) * length + columns
            for g in range(some):
                for n in range(blocks):
                    under = (first_group + g) * blocks + n
                    for p in range(0, pixels, VECTORS * LANES):
                        pixels_product(
                            DTYPE, CHANNELS, VECTORS, table, taps, depth,
                            ring + (g * depth * stride + p) * ITEM, stride,
                            weights + under * kt * area * depth * CHANNELS * ITEM,
                            bias + under * CHANNELS * ITEM,
                            sums + ((g * outputs + n * CHANNELS) * sums_stride + p) * ITEM,
                            sums_stride,
                        )  # fmt: skip
            if residual == 0 and activation != 0:
                for n in range(some * outputs):
                    activate_row(DTYPE, sums + n * sums_stride * ITEM, pixels, activation)
            for r in range(rows):
                out_row = ((b * ot + o) * oh + first_row + r) * ow + first_column
                for n in range(0, some * outputs, LANES):
                    left, channel = some * outputs - n, first_group * outputs + n
                    q = 0
                    while q < columns:
                        if residual == 0 and columns >= LANES:
                            q = min(q, columns - LANES)
                        source = sums + (n * sums_stride + r * length + q) * ITEM
                        at = ((out_row + q) * k + channel) * ITEM
                        if residual == 0:
                            transpose_tile(DTYPE, source, sums_stride, y + at, k, left, columns - q)
                        else:
                            transpose_tile(DTYPE, source, sums_stride, tile, LANES, LANES, LANES)
                            finish_rows(
                                DTYPE, 1, tile, min(LANES, columns - q), y + at, k,
                                min(left, LANES), 0, residual + at, activation,
                            )  # fmt: skip
                        q += LANES

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


def run(
    plan: Plan,
    x: np.ndarray,
    packed: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    y: np.ndarray,
    scratch: np.ndarray,
) -> None:
    """x (N, T, H, W, C), residual and y (N, OT, OH, OW, K), all in C order; packed by `pack`."""
    s = cut(plan, threads())
    g, item = s.geometry, x.itemsize
    offsets = _offsets(s)
    residues = np.array([*s.phases[0], *s.phases[1]], np.int64)
    ends = np.cumsum(s.parts) * item
    shift = scratch[-packed.shape[0] * packed.shape[1] * s.channels :]
    shift[...] = 0
    if bias is not None:
        outputs = g.out_channels // g.groups
        shift.reshape(g.groups, -1)[:, :outputs] = bias.reshape(g.groups, outputs)
    params = (
        address(x), address(y), address(packed),
        address(shift), address(residual), activation_number(plan.epilogue),
        address(scratch), ends[3], ends[0], ends[1], ends[2],
        *g.in_size, g.in_channels, *g.out_size, g.out_channels, *g.stride,
        *(before for before, _ in g.padding), g.kernel[0], g.dilation[0], g.groups,
        s.groups, s.rows, s.columns, s.row_length, s.frame, s.ring,
        s.channel_stride, s.sum_stride, len(s.phases[0]), len(s.phases[1]),
        address(residues), address(offsets), prod(g.kernel[1:]),
    )  # fmt: skip
    compiled = kernel(_strips_kernel, plan.dtype, item, s.lanes, s.channels, s.vectors)
    cuts = -(-g.groups // s.groups) * -(-g.out_size[1] // s.rows) * -(-g.out_size[2] // s.columns)
    parallel_for(compiled, params, g.batch * cuts)
