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

from ..geometry import Geometry
from ..plan import Plan
from .emit import LINE_BYTES
from .finish import activation_number
from .layout import Views
from .runs import run_lengths
from .simd import (
    Kernel,
    address,
    kernel,
    parallel_for,
    register_count,
    threads,
    vector_width,
)
from .strip_stages import multiply_kernel, pack_kernel, strips_kernel, unpack_kernel

RING_BYTES = 640 << 10  # of one thread's ring and sums: most of it stays in L2


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
    item: int  # bytes of an element
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
    groups = sorted({-(-g.groups // n) for n in range(1, g.groups + 1)})
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
    item = np.dtype(dtype).itemsize
    line = LINE_BYTES // item
    odd = lambda size: (-(-size // line) | 1) * line  # noqa: E731
    return Strips(
        g, item, lanes, channels, vectors, groups, rows, columns, phases, row_length, frame, ring,
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
    transposed = 150 * (frames * tiles + outputs)
    lines = frames * s.frame * _lines(s.groups * c, g.in_channels, s.item)
    lines += s.rows * s.columns * _lines(s.groups * k, g.out_channels, s.item)
    return -(-items // workers) * g.out_size[0] * (sums + transposed + 10 * lines)


def _lines(share: int, channels: int, item: int) -> float:
    """Cache lines of a pixel that an item reads or writes, one more where it shares one."""
    size = share * item
    return size / LINE_BYTES + (share < channels and size % LINE_BYTES > 0)


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
        kernel(pack_kernel, dtype, item, s.lanes),
        kernel(multiply_kernel, dtype, item, s.lanes, s.channels, s.vectors),
        kernel(unpack_kernel, dtype, item, s.lanes),
    )
    known = (
        activation_number(plan.epilogue), *map(int, (ends[3], *ends[:3])),
        *g.in_size, g.in_channels, *g.out_size, g.out_channels, *g.stride,
        *(before for before, _ in g.padding), g.kernel[0], g.dilation[0], g.groups,
        s.groups, s.rows, s.columns, s.row_length, s.frame, s.ring,
        s.channel_stride, s.sum_stride, len(s.phases[0]), len(s.phases[1]),
        address(residues), address(offsets), prod(g.kernel[1:]), g.span[1],
        run_lengths(g.in_channels // g.groups)[0],
        *(stage.address for stage in stages),
    )  # fmt: skip
    cuts = -(-g.groups // s.groups) * -(-g.out_size[1] // s.rows) * -(-g.out_size[2] // s.columns)
    compiled = kernel(strips_kernel, dtype, item)
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
