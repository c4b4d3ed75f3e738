"""Pixels in lanes (csrc/grouped_lanes.h): how a geometry is cut into strips, and its weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..geometry import Geometry
from . import launch
from .launch import ffi

RING_BYTES = 640 << 10  # of one thread's ring and sums: most of it stays in L2
COLUMNS = 256  # most of an item
THREADS = 4  # that should have equal shares of an image


def register_block(outputs: int, lanes: int) -> tuple[int, int]:
    """Output channels and vectors of pixels whose sums are kept in registers, for least time."""
    most, registers = (12, 32) if lanes == 16 else (6, 16)
    blocks = [(k, min((registers - 1) // (k + 1), 8)) for k in range(1, min(outputs, most) + 1)]
    return min(blocks, key=lambda b: (-(-outputs // b[0]) * _block_cycles(*b) / b[1], -b[0]))


def _block_cycles(channels: int, vectors: int) -> float:
    """Of a term: multiplications or loads, two in a cycle; pixels lie across cache lines."""
    return max(channels * vectors, channels + 2 * vectors + 2, 8) / 2


@dataclass(frozen=True)
class Strips:
    """How the work of one geometry is cut, and where a thread's pieces lie; sizes in floats."""

    geometry: Geometry
    lanes: int
    channels: int  # output channels of a register block
    vectors: int  # vectors of pixels of a register block
    groups: int  # groups per item
    rows: int  # output rows and columns per item
    columns: int
    phases: tuple[tuple[int, ...], tuple[int, ...]]  # used residues of rows and of columns
    packed_rows: int
    row_length: int
    tile: tuple[int, int]  # m of F(m, r) along T and H, 1 for direct

    @property
    def tiled(self) -> bool:
        return self.tile != (1, 1)

    @property
    def points(self) -> tuple[int, int]:
        """Along T and H, 1 for direct."""
        both = zip(self.tile, self.geometry.kernel, strict=False)
        time, down = (m + r - 1 if m > 1 else 1 for m, r in both)
        return time, down

    @property
    def pixels(self) -> int:
        """From the first to the last of a strip's row of tiles."""
        return (-(-self.rows // self.tile[1]) - 1) * self.row_length + self.columns

    @property
    def packed(self) -> int:
        """Floats of a frame and channel as it is packed."""
        return len(self.phases[0]) * len(self.phases[1]) * self.packed_rows * self.row_length

    @property
    def length(self) -> int:
        """Floats of a point of a slot: whole vectors where it is transformed."""
        if not self.tiled:
            return self.packed
        _, high, wide = self.geometry.kernel
        below = 0 if self.tile[1] > 1 else (high - 1) * self.row_length
        size = max(0 if self.tile[1] > 1 else self.packed, self.pixels + below + wide - 1)
        return -(-size // self.lanes) * self.lanes

    @property
    def frame(self) -> int:
        """Floats of a slot of the ring."""
        return self.points[1] * self.length

    @property
    def slots(self) -> int:
        """Frames of the ring: those of one output column, or of a tile."""
        if self.tile[0] > 1:
            return self.points[0]
        return min(self.geometry.span[0], self.geometry.in_size[0])

    @property
    def channel_stride(self) -> int:
        return _odd_lines(self.slots * self.frame + self.lanes)

    @property
    def packed_stride(self) -> int:
        return _odd_lines(self.packed + 2 * self.lanes) if self.tile[1] > 1 else 0

    @property
    def v_stride(self) -> int:
        return _odd_lines(self.points[0] * self.frame + self.lanes) if self.tile[0] > 1 else 0

    @property
    def sums_stride(self) -> int:
        return _odd_lines(-(-self.pixels // self.lanes) * self.lanes)

    @property
    def each(self) -> int:
        """Floats of a thread: its input ring, sums and table of terms; and with tiles a packed
        frame, V, the bias and M of a register block, once more between its two passes."""
        g = self.geometry
        outputs = self.groups * (g.out_channels // g.groups)
        rows = -(-(outputs + self.channels) // self.lanes) * self.lanes * prod(self.tile)
        depth = g.in_channels // g.groups
        channels = self.groups * depth
        size = channels * self.channel_stride + rows * self.sums_stride
        size += launch.lines(2 * g.taps * depth)
        if not self.tiled:
            return size
        points = self.points[0] * (self.points[1] + self.tile[1])
        block = self.channels * self.lanes * (1 + points * self.vectors)
        return size + channels * self.packed_stride + depth * self.v_stride + block

    @property
    def items(self) -> int:
        g = self.geometry
        chunks = -(-g.groups // self.groups)
        return chunks * -(-g.out_size[1] // self.rows) * -(-g.out_size[2] // self.columns)

    @property
    def uneven(self) -> float:
        """Time of the busiest of some threads over the mean."""
        return -(-self.items // THREADS) * THREADS / self.items

    def fields(self) -> tuple[dict[str, Any], list[Any]]:
        """An initialiser of fc_pixel_lanes, and the memory that it points to."""
        residues = ffi.new("int64_t[]", [*self.phases[0], *self.phases[1]])
        offsets = ffi.new("int64_t[]", _offsets(self))
        values = {
            "channels": self.channels,
            "vectors": self.vectors,
            "groups": self.groups,
            "high": self.rows,
            "wide": self.columns,
            "row_phases": len(self.phases[0]),
            "column_phases": len(self.phases[1]),
            "packed_rows": self.packed_rows,
            "row_length": self.row_length,
            "frame": self.frame,
            "slots": self.slots,
            "channel_stride": self.channel_stride,
            "sums_stride": self.sums_stride,
            "residues": residues,
            "offsets": offsets,
            "together": _together(self.geometry),
            "tile": self.tile,
            "points": self.points,
            "length": self.length,
            "packed_stride": self.packed_stride,
            "v_stride": self.v_stride,
        }
        return values, [residues, offsets]


def _together(g: Geometry) -> int:
    """Taps of one input channel that follow each other: those of a row, but not where time may be
    that row, as it is of one axis and not in its window. A sum has one order."""
    return g.kernel[2] if max(g.kernel[:2]) > 1 else 1


def _residues(kernel_size: int, stride: int, dilation: int) -> tuple[int, ...]:
    return tuple(sorted({k * dilation % stride for k in range(kernel_size)}))


def _reach(kernel_size: int, stride: int, dilation: int) -> int:
    """Packed rows or columns that the last tap lies behind the first."""
    return (kernel_size - 1) * dilation // stride


@functools.lru_cache(maxsize=256)
def cut(geometry: Geometry, lanes: int, tile: tuple[int, int] = (1, 1)) -> Strips:
    """The cheapest cut of a geometry by a count of cycles; for any number of threads.

    tile  m of F(m, r) along T and H of the geometry over three axes
    """
    g = geometry.lifted()
    groups = sorted({-(-g.groups // n) for n in range(1, g.groups + 1)})
    high = tile[1]
    heights = range(high, -(-min(g.out_size[1], 64) // high) * high + 1, high)
    parts = -(-g.out_size[2] // COLUMNS)
    while True:
        width = -(-g.out_size[2] // parts)
        cuts = [_strips(g, lanes, n, h, width, tile) for n in groups for h in heights]
        small = [s for s in cuts if 4 * s.each <= RING_BYTES]
        if small:
            return min(small, key=lambda s: cycles(s) * s.uneven)
        if width <= lanes:
            return min(cuts, key=lambda s: s.each)
        parts *= 2


def _strips(
    g: Geometry, lanes: int, groups: int, rows: int, columns: int, tile: tuple[int, int]
) -> Strips:
    channels, vectors = register_block(g.out_channels // g.groups, lanes)
    axes = list(zip(g.kernel, g.stride, g.dilation, strict=True))
    phases = _residues(*axes[1]), _residues(*axes[2])
    packed_rows = rows + _reach(*axes[1])
    if tile[1] > 1:
        phases = tuple(range(tile[1])), phases[1]
        packed_rows = rows // tile[1] + (tile[1] + g.kernel[1] - 2) // tile[1]
    row_length = _row_length(g, phases[1], columns)
    return Strips(
        g, lanes, channels, vectors, groups, rows, columns, phases, packed_rows, row_length, tile
    )


def _odd_lines(size: int) -> int:
    """Floats up to an odd number of cache lines: channels do not compete for the same sets."""
    return (-(-size // launch.LINE) | 1) * launch.LINE


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


def cycles(s: Strips) -> float:
    """Roughly, on one thread; constants measured on 512-bit registers."""
    g = s.geometry
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    vectors = -(-s.pixels // s.lanes)
    blocks, rest = divmod(vectors, s.vectors)
    term = blocks * _block_cycles(s.channels, s.vectors)
    term += _block_cycles(s.channels, rest) if rest else 0
    terms = c * g.taps
    for m, r in zip(s.tile, g.kernel, strict=False):
        terms //= r if m > 1 else 1
    points = prod(s.points)
    sums = points * (terms * term + 40 * (blocks + 1))
    tiles = -(-s.groups * c // s.lanes) * (s.packed // s.row_length) * -(-s.row_length // s.lanes)
    outputs = -(-s.groups * k // s.lanes) * s.rows * -(-s.columns // s.lanes)
    frames = min(g.stride[0], g.span[0]) * s.tile[0]
    transposed = 5 * s.lanes * (frames * tiles + s.tile[0] * outputs)
    lines = frames * s.packed * _lines(s.groups * c, g.in_channels)
    lines += s.tile[0] * s.rows * s.columns * _lines(s.groups * k, g.out_channels)
    each = 1.05 * s.groups * -(-k // s.channels) * sums + transposed + 3 * lines
    if s.tiled:
        each += _transform_cycles(s, vectors)
    return g.batch * s.items * -(-g.out_size[0] // s.tile[0]) * each


def _transform_cycles(s: Strips, vectors: int) -> float:
    """Of BT and AT, by what they read and write."""
    g, (time, down), (high, wide) = s.geometry, s.tile, s.points
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    values = 2 * c * time * wide if down > 1 else 0
    values += 2 * c * high * wide if time > 1 else 0
    values += k * (high * wide + time * down)
    values += 2 * k * high * down if time > 1 and down > 1 else 0
    return 1.5 * s.groups * values * vectors


def _lines(share: int, channels: int) -> float:
    """Cache lines of a pixel that an item reads or writes, one more where it shares one, and half
    of one where pixels do not follow each other.
    """
    apart = 0.5 + (share % launch.LINE > 0) if share < channels else 0.0
    return share / launch.LINE + apart


def pack(weights: np.ndarray, s: Strips) -> np.ndarray:
    """w (K, C / G, *kernel), with points for taps where there are tiles -> (G, blocks, T and H and
    W / together, C / G, together, channels of a register block)."""
    g, channels = s.geometry, s.channels
    k = g.out_channels // g.groups
    blocks = -(-k // channels)
    columns = _together(g)
    rows = weights[0, 0].size // columns
    packed = launch.aligned(g.groups, blocks, rows, g.in_channels // g.groups, columns, channels)
    # (G, K / G, C / G, rows, columns) -> (G, rows, C / G, columns, K / G)
    w = np.asarray(weights).reshape(g.groups, k, -1, rows, columns).transpose(0, 3, 2, 4, 1)
    for block in range(blocks):
        part = w[..., block * channels : (block + 1) * channels]
        packed[:, block, ..., : part.shape[-1]] = part
    return packed


def _offsets(s: Strips) -> list[int]:
    """Of every tap of (KH, KW) into a frame."""
    g, (row_phases, column_phases) = s.geometry, s.phases
    found = []
    for i in range(g.kernel[1]):
        for j in range(g.kernel[2]):
            row, a = divmod(i * g.dilation[1], g.stride[1])
            column, e = divmod(j * g.dilation[2], g.stride[2])
            phase = row_phases.index(a) * len(column_phases) + column_phases.index(e)
            found.append((phase * s.packed_rows + row) * s.row_length + column)
    return found
