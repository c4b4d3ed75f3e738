"""Output pixels as rows of a matrix product (csrc/dense.h): panels, tables, and what is copied."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ..geometry import Geometry
from . import launch
from .panels import block_rows, pack_split, panel_split

BLOCK_PIXELS = 112  # of an address table: the weights pass through L2 once per block
CHUNK = 512  # terms of a panel that stay in L2 while they meet a block of pixels
TABLE_ENTRIES = 16 << 10
JOINED_CHANNELS = 16  # so few make too short sums per address
# Time of a multiplication in panels of so many vectors, by lanes and relative; one vector is too
# little to do per address.
BLOCK_TIME = {
    16: (0, 1.42, 1.0, 1.0, 1.0),
    8: (0, 1.22, 1.0, 1.0, 1.45),
    4: (0, 1.2, 1.0, 1.0, 1.4),
}
PACKED_FLOATS = 64 << 10  # of input rows that one item copies


def merged(geometry: Geometry) -> Geometry:
    """The same convolution with one row per frame, where nothing slides over rows and columns."""
    g = geometry.lifted()
    still = [
        k == s == 1 and p == (0, 0) for k, s, p in zip(g.kernel, g.stride, g.padding, strict=True)
    ]
    if not (still[1] and still[2]):
        return g
    return replace(g, in_size=(g.in_size[0], 1, g.in_size[1] * g.in_size[2]))


@dataclass(frozen=True)
class Products:
    """How the work of one geometry is cut; the fields of fc_pixel_rows."""

    geometry: Geometry
    lanes: int
    vectors: tuple[int, int]
    panels: tuple[int, int]
    taps: int
    depth: int
    joined: bool
    run: int
    block: int
    chunk_taps: int
    chunk_depth: int
    packed_row: int
    packed_rows: int
    piece: int

    @property
    def each(self) -> int:
        """Floats of a thread: zeros, the table of addresses, copied input rows."""
        copied = self.geometry.kernel[0] * self.packed_rows * self.packed_row
        zeros = launch.lines(max(self.geometry.in_channels, self.depth))
        return zeros + launch.lines(2 * self.taps * self.block) + copied

    def fields(self) -> dict[str, Any]:
        """An initialiser of fc_pixel_rows."""
        names = set(self.__dataclass_fields__) - {"geometry", "lanes"}
        return {name: getattr(self, name) for name in names}


@functools.lru_cache(maxsize=256)
def cut(geometry: Geometry, lanes: int) -> Products:
    """The pieces for a geometry, for any number of threads."""
    g = merged(geometry)
    vectors, panels = panel_split(-(-(g.out_channels // g.groups) // lanes), BLOCK_TIME[lanes])
    joined = g.groups == 1 and g.in_channels <= JOINED_CHANNELS and g.dilation[2] == 1 < g.kernel[2]
    depth = g.in_channels // g.groups * (g.kernel[2] if joined else 1)
    taps = g.taps // g.kernel[2] if joined else g.taps
    rows = max(block_rows(v) for v in vectors if v)
    frame = g.out_size[1] * g.out_size[2]
    # A register block stays in one frame, which may lack some taps; small frames are combined.
    slides = g.padding[0] != (0, 0) and frame >= 2 * rows
    run = frame if slides else max(g.batch * g.out_size[0] * frame, 1)
    block = max(min(BLOCK_PIXELS, TABLE_ENTRIES // taps) // rows, 1) * rows
    chunk_taps = max(min(CHUNK // depth, taps), 1)
    copied = 0, 0, 0
    if joined and g.padding[2] != (0, 0):
        copied, run = _copies(g)
    return Products(
        g, lanes, vectors, panels, taps, depth, joined, run, block,
        -(-taps // -(-taps // chunk_taps)), -(-depth // -(-depth // CHUNK)), *copied,
    )  # fmt: skip


def _copies(g: Geometry) -> tuple[tuple[int, int, int], int]:
    """Floats of a copied row, rows of a frame and output pixels of an item; the pixels it cuts."""
    step, reach, channels = g.stride[2], g.kernel[2], g.in_channels
    room = PACKED_FLOATS // g.kernel[0] // channels  # columns of all rows of a frame
    high = (room // ((g.out_size[2] - 1) * step + reach) - g.span[1]) // g.stride[1] + 1
    high = max(min(high, g.out_size[1]), 1)
    rows = (high - 1) * g.stride[1] + g.span[1]
    wide = max(min((room // rows - reach) // step + 1, g.out_size[2]), min(64, g.out_size[2]))
    row = ((wide - 1) * step + reach) * channels
    if wide < g.out_size[2]:
        return (row, rows, wide), g.out_size[2]
    return (row, rows, high * wide), g.out_size[1] * g.out_size[2]


def cycles(p: Products) -> float:
    """Roughly, on one thread; constants measured."""
    g = p.geometry
    time = BLOCK_TIME[p.lanes]
    kinds = list(zip(p.vectors, p.panels, strict=True))
    # Per pixel: the sums, addresses per tap and panel, the way to y; and the table itself.
    sums = p.taps * sum(n * (p.depth * v * time[v] / 2 + 1) for v, n in kinds)
    sums += 4 * sum(n * v for v, n in kinds)
    return g.batch * prod(g.out_size) * (g.groups * sums + 2 * p.taps)


def pack(weights: np.ndarray, p: Products) -> np.ndarray:
    """w (K, C / G, *kernel) -> for every group its panels [taps][depth][vectors * lanes]."""
    g = p.geometry
    per_group = np.asarray(weights, np.float32).reshape(
        g.groups, g.out_channels // g.groups, g.in_channels // g.groups, g.taps
    )
    # (G, taps, C / G, K / G) -> (G, taps * C / G, K / G); joined or not, the order is the same
    b = per_group.transpose(0, 3, 2, 1).reshape(g.groups, -1, g.out_channels // g.groups)
    return pack_split(b, p.vectors, p.panels)
