"""Convolution as an implicit matrix product: rows are output pixels, columns output channels.

A block of output pixels keeps a table of addresses, one per tap and pixel: where that tap's input
channels begin, or a row of zeros where the tap lies on padding. The micro-kernel broadcasts inputs
through the table and streams packed weights, so every stride, dilation and padding is one kernel.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from math import prod

import numpy as np

from ..geometry import Geometry
from ..plan import Plan
from .dense_stages import dense_kernel
from .emit import LINE_BYTES
from .finish import activation_number
from .gemm import block_rows, pack_panels, panel_vectors
from .layout import Views
from .runs import run_lengths
from .simd import Kernel, address, kernel, parallel_for, threads, vector_width

BLOCK_PIXELS = 112  # of an address table: the weights pass through L2 once per block


def pack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, C / G, *kernel) -> (G, panels, taps * C / G, vectors * lanes)."""
    g = plan.geometry
    per_group = np.asarray(weights, plan.dtype).reshape(
        g.groups, g.out_channels // g.groups, g.in_channels // g.groups, g.taps
    )
    # (G, taps, C / G, K / G) -> (G, taps * C / G, K / G)
    b = per_group.transpose(0, 3, 2, 1).reshape(g.groups, -1, g.out_channels // g.groups)
    return pack_panels(b, panel_vectors(g.out_channels // g.groups, plan.dtype))


def merged(geometry: Geometry) -> Geometry:
    """The same convolution with as few axes as possible: what nothing slides over becomes one row.

    Pixels follow each other in channels-last memory, so (N, T, H, W) of a 1 x 1 x 1 kernel is one.
    """
    g = geometry.lifted()
    axes = zip(g.kernel, g.stride, g.padding, strict=True)
    still = [k == s == 1 and p == (0, 0) for k, s, p in axes]
    batch, sizes = g.batch, list(g.in_size)
    if still[1] and still[2]:
        sizes[1:] = [1, sizes[1] * sizes[2]]
    if still[0]:
        batch, sizes[0] = batch * sizes[0], 1
        if still[1] and still[2]:
            batch, sizes[2] = 1, batch * sizes[2]
    return replace(g, batch=batch, in_size=tuple(sizes))


def _sizes(plan: Plan) -> tuple[int, int, int]:
    """Elements per thread: the zero row, the address table, the sums; whole cache lines each."""
    g, item = plan.geometry, np.dtype(plan.dtype).itemsize
    vectors = panel_vectors(g.out_channels // g.groups, plan.dtype)
    rows = block_rows(vectors)
    table = g.taps * _pixels(rows) * 8 // item
    sums = rows * vectors * vector_width(plan.dtype)
    line = LINE_BYTES // item
    return tuple(-(-size // line) * line for size in (g.in_channels, table, sums))  # type: ignore[return-value]


def _pixels(rows: int) -> int:
    """Output pixels of an address table: whole register blocks."""
    return -(-BLOCK_PIXELS // rows) * rows


def scratch_size(plan: Plan) -> int:
    """Elements of plan.dtype that all threads need."""
    return sum(_sizes(plan)) * threads()


def cycles(plan: Plan) -> float:
    """Roughly, on one thread; constants measured on 512-bit registers."""
    g = plan.geometry
    group = g.out_channels // g.groups
    vectors = panel_vectors(group, plan.dtype)
    panels = -(-group // (vectors * vector_width(plan.dtype)))
    # Per pixel: the sums, an address per tap and panel, the way to y; and the table itself.
    sums = g.taps * (g.in_channels // g.groups * vectors / 2 + 1) + 4 * vectors
    return g.batch * prod(g.out_size) * (g.groups * panels * sums + 2 * g.taps)


@functools.lru_cache(maxsize=256)
def _prepared(plan: Plan, workers: int) -> tuple[Kernel, tuple[int, ...], int]:
    """The kernel, its parameters behind the addresses of the call, and the number of items."""
    g = merged(plan.geometry)
    group, item = g.out_channels // g.groups, np.dtype(plan.dtype).itemsize
    vectors = panel_vectors(group, plan.dtype)
    rows, width = block_rows(vectors), vectors * vector_width(plan.dtype)
    per_group = -(-group // width)
    pixels, panels = g.batch * prod(g.out_size), g.groups * per_group
    size, blocks, share = _split(pixels, rows, panels, workers)
    zeros, table, sums = _sizes(plan)
    # Pixels of a 1 x 1 x 1 kernel that come next lie behind; a line for every channel suffices.
    ahead_step = LINE_BYTES // item if g.taps == 1 else 0
    known = (
        activation_number(plan.epilogue),
        (zeros + table + sums) * item, zeros * item, (zeros + table) * item,
        *g.in_size, g.in_channels, pixels, *g.out_size, g.out_channels,
        g.in_channels // g.groups, group, *g.kernel, *g.stride,
        *(before for before, _ in g.padding), *g.dilation, size, blocks, share, per_group, panels,
        ahead_step, *run_lengths(g.in_channels // g.groups),
    )  # fmt: skip
    last_vectors = -(-(group - (per_group - 1) * width) // vector_width(plan.dtype))
    short = vectors - 1 if last_vectors < vectors else 0
    compiled = kernel(dense_kernel, plan.dtype, item, rows, vectors, short, width)
    return compiled, known, blocks * -(-panels // share)


def _split(pixels: int, rows: int, panels: int, workers: int) -> tuple[int, int, int]:
    """Pixels per block, blocks, panels per item: large items, but enough for all threads."""
    wanted = 4 * workers
    size = min(_pixels(rows), max(-(-pixels // (wanted * rows)), 1) * rows)
    blocks = -(-pixels // size)
    shares = min(panels, -(-wanted // blocks))
    return size, blocks, -(-panels // shares)


def run(plan: Plan, packed: np.ndarray, bias: np.ndarray | None, views: Views) -> None:
    """views of x (N, T, H, W, C), residual and y (N, OT, OH, OW, K); packed by `pack`."""
    compiled, known, items = _prepared(plan, threads())
    arrays = (views.x, views.y, bias, views.residual, views.workspace, packed)
    parallel_for(compiled, (*map(address, arrays), *known), items)
