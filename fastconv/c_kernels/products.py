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
# Terms of a panel that stay in a near cache while they meet a block of pixels, by lanes.
CHUNK = {16: 512, 8: 256, 4: 256}
TABLE_ENTRIES = 16 << 10
JOINED_CHANNELS = 16  # so few make too short sums per address
# Time of a multiplication in panels of so many vectors, by lanes and relative. One vector is too
# little to do per address; four, with few rows, are read again too often where sums are long.
BLOCK_TIME = {
    16: (0, 1.42, 1.0, 1.0, 1.0),
    8: (0, 1.22, 1.0, 1.0, 1.45),
    4: (0, 1.2, 1.0, 1.0, 1.4),
}
LONG_TIME = 1.05
COPIED_FLOATS = 64 << 10  # of inputs that one item copies


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
    scaled: bool = False

    @property
    def each(self) -> int:
        """Floats of a thread: zeros, the table of addresses, copied inputs."""
        copied = self.geometry.kernel[0] * self.packed_rows * self.packed_row
        copied += self.scaled * self.block * self.geometry.in_channels
        zeros = launch.lines(max(self.geometry.in_channels, self.depth))
        return zeros + launch.lines(2 * self.taps * self.block) + copied

    def fields(self) -> dict[str, Any]:
        """An initialiser of fc_pixel_rows."""
        names = set(self.__dataclass_fields__) - {"geometry", "lanes", "scaled"}
        return {name: getattr(self, name) for name in names}


@functools.lru_cache(maxsize=256)
def cut(geometry: Geometry, lanes: int, scaled: bool = False) -> Products:
    """The pieces for a geometry, for any number of threads; its inputs are scaled on the way."""
    g = merged(geometry)
    *time, four = BLOCK_TIME[lanes]
    times = (*time, four * LONG_TIME if g.taps > 1 else four)
    vectors, panels = panel_split(-(-(g.out_channels // g.groups) // lanes), times)
    joined = g.groups == 1 and g.in_channels <= JOINED_CHANNELS and g.dilation[2] == 1 < g.kernel[2]
    depth = g.in_channels // g.groups * (g.kernel[2] if joined else 1)
    taps = g.taps // g.kernel[2] if joined else g.taps
    rows = max(block_rows(v) for v in vectors if v)
    frame = g.out_size[1] * g.out_size[2]
    # A register block stays in one frame, which may lack some taps; small frames are combined.
    slides = g.padding[0] != (0, 0) and frame >= 2 * rows
    run = frame if slides else max(g.batch * g.out_size[0] * frame, 1)
    pixels = min(BLOCK_PIXELS, TABLE_ENTRIES // taps)
    if scaled:
        pixels = min(pixels, COPIED_FLOATS // g.in_channels)
    block = max(pixels // rows, 1) * rows
    chunk = CHUNK[lanes]
    chunk_taps = max(min(chunk // depth, taps), 1)
    # Whole taps where they are joined: the parts of a sum do not depend on that.
    unit = g.in_channels if joined else 1
    units, most = depth // unit, chunk // unit
    copied = 0, 0, 0
    if joined and g.padding[2] != (0, 0):
        copied, run = _copies(g)
    return Products(
        g, lanes, vectors, panels, taps, depth, joined, run, block,
        -(-taps // -(-taps // chunk_taps)), -(-units // -(-units // most)) * unit, *copied, scaled,
    )  # fmt: skip


def _copies(g: Geometry) -> tuple[tuple[int, int, int], int]:
    """Floats of a copied row, rows of a frame and output pixels of an item; the pixels it cuts."""
    step, reach, channels = g.stride[2], g.kernel[2], g.in_channels
    room = COPIED_FLOATS // g.kernel[0] // channels  # columns of all rows of a frame
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
    # Weights of few pixels come from memory.
    weights = g.groups * p.taps * p.depth * sum(n * v for v, n in kinds) * p.lanes
    return g.batch * prod(g.out_size) * (g.groups * sums + 2 * p.taps) + weights / 5


def pack(weights: np.ndarray, p: Products) -> np.ndarray:
    """w (K, C / G, *kernel) -> for every group its panels [taps][depth][vectors * lanes]."""
    g = p.geometry
    per_group = np.asarray(weights, np.float32).reshape(
        g.groups, g.out_channels // g.groups, g.in_channels // g.groups, g.taps
    )
    # (G, taps, C / G, K / G) -> (G, taps * C / G, K / G); joined or not, the order is the same
    b = per_group.transpose(0, 3, 2, 1).reshape(g.groups, -1, g.out_channels // g.groups)
    return pack_split(b, p.vectors, p.panels)
