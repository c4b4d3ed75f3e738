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
from numba import njit

from ..epilogue import ACTIVATIONS
from ..geometry import Geometry
from ..plan import Plan
from .emit import LINE_BYTES
from .finish import activation_number, bias_vectors, write_rows
from .gemm import block_rows, pack_panels, panel_vectors
from .layout import Views
from .memory import clear, int_at, poke
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
    line = 64 // item
    return tuple(-(-size // line) * line for size in (g.in_channels, table, sums))  # type: ignore[return-value]


def _pixels(rows: int) -> int:
    """Output pixels of an address table: whole register blocks."""
    return -(-BLOCK_PIXELS // rows) * rows


def scratch_size(plan: Plan) -> int:
    """Elements of plan.dtype that all threads need."""
    return sum(_sizes(plan)) * threads()


@block
def dense_tile(
    code: Code, dtype: str, rows: int, vectors: int,
    table: Int, table_stride: Int, taps: Int, shift: Int, depth: Int, panel: Int,
    ahead: Int, ahead_step: Int, sums: Int,
    count: Int, y: Int, y_stride: Int, columns: Int, bias: Int, residual: Int, activation: Int,
) -> None:  # fmt: skip
    """y (count, columns) = activation(inputs under the table @ panel + bias + residual).

    table (taps, table_stride) int64: addresses of inputs, `rows` valid per tap
    shift: elements from there to the group's first channel;  depth: channels per group
    panel (taps * depth, vectors * lanes)
    ahead, ahead_step: memory to ask for meanwhile, elements from channel to channel
    sums (rows, vectors * lanes): scratch
    The rest as in `finish_rows`; at most `rows` are written.
    """
    lanes = code.lanes
    for i in range(rows):
        for j in range(vectors):
            code.prefetch(y, i * y_stride + j * lanes, write=True)
    first = bias_vectors(code, vectors, bias, columns, panel)
    totals = _product(
        code, rows, first, table, table_stride, taps, shift, depth, panel, ahead, ahead_step
    )

    # No activation and relu end in registers: a lower bound, -Inf or 0, that NaN passes.
    simple = code.both(count >= rows, activation <= ACTIVATIONS.index("relu"))
    with code.builder.if_else(simple) as (yes, no):
        with yes:
            relu = activation.is_(ACTIVATIONS.index("relu"))
            bound = code.zero().like(
                code.builder.select(relu, code.zero().value, code.splat(float("-inf")).value)
            )
            masks = [code.first(columns - j * lanes) for j in range(vectors)]

            def end(add: bool) -> None:
                for n, z in enumerate(totals):
                    i, j = divmod(n, vectors)
                    at = y_stride * i + j * lanes
                    if add:
                        z = z + code.load(residual, at, masks[j])
                    code.store(bound.where(z < bound, z), y, at, masks[j])

            with code.builder.if_else(residual.is_(0)) as (alone, added):
                with alone:
                    end(add=False)
                with added:
                    end(add=True)
        with no:
            for n, total in enumerate(totals):
                code.store(total, sums, n * lanes)
            none = code.int(0)
            write_rows(code, vectors, sums, count, y, y_stride, columns, none, residual, activation)


def _product(
    code: Code, rows: int, first: list[Vec], table: Int, table_stride: Int, taps: Int, shift: Int,
    depth: Int, panel: Int, ahead: Int, ahead_step: Int,
) -> list[Vec]:  # fmt: skip
    """`first` in every row, plus the sums over taps and channels, row by row."""
    vectors = len(first)
    width = vectors * code.lanes

    def tap(t: Int, sums: list[Vec]) -> list[Vec]:
        entries = table + t * table_stride * 8
        inputs = [int_at(code, entries, i) + shift * code.item for i in range(rows)]
        under = panel + t * depth * (width * code.item)

        def channel(c: Int, sums: list[Vec]) -> list[Vec]:
            code.prefetch(ahead, c * ahead_step)
            w = [code.load(under, c * width + j * code.lanes) for j in range(vectors)]
            following = []
            for i in range(rows):
                value = code.broadcast(inputs[i], c)
                following += [fma(value, w[j], sums[i * vectors + j]) for j in range(vectors)]
            return following

        return code.loop(depth, channel, sums)

    return code.loop(taps, tap, first * rows)


# What `_prepared` puts where: addresses of the call, then what is known before it.
(
    X, Y, BIAS, RESIDUAL, SCRATCH, PANELS, ACTIVATION, THREAD_STEP, TABLE, SUMS,
    T, H, W, C, PIXELS, OT, OH, OW, K, DEPTH, GROUP, KT, KH, KW, ST, SH, SW,
    PAD_T, PAD_H, PAD_W, DT, DH, DW, SIZE, BLOCKS, SHARE, PANELS_PER_GROUP, PANEL_COUNT,
    AHEAD_STEP,
) = range(39)  # fmt: skip


@njit(error_model="numpy")
def _fill_table(params, table, zeros, first, last, item):
    """table (taps, SIZE): where each tap of the output pixels first .. last - 1 begins."""
    t, h, w = peek(params, T), peek(params, H), peek(params, W)
    ot, oh, ow = peek(params, OT), peek(params, OH), peek(params, OW)
    step, pixel = peek(params, SW), peek(params, C) * item
    p = first
    while p < last:
        # A run: the pixels of this block in one row of the output.
        row, start = p // ow, p % ow
        stop = min(start + last - p, ow)
        image, out_t, out_h = row // (ot * oh), row // oh % ot, row % oh
        entry = table + (p - first - start) * 8
        for i in range(peek(params, KT)):
            in_t = out_t * peek(params, ST) - peek(params, PAD_T) + i * peek(params, DT)
            for j in range(peek(params, KH)):
                in_h = out_h * peek(params, SH) - peek(params, PAD_H) + j * peek(params, DH)
                inside = 0 <= in_t < t and 0 <= in_h < h
                for q in range(peek(params, KW)):
                    in_w = q * peek(params, DW) - peek(params, PAD_W)
                    low, high = start, start
                    if inside:
                        # Outputs o whose column in_w + o * step lies in 0 .. w - 1.
                        low = min(max((step - 1 - in_w) // step, start), stop)
                        high = max(min((w - 1 - in_w) // step + 1, stop), low)
                    source = peek(params, X) + (((image * t + in_t) * h + in_h) * w + in_w) * pixel
                    for o in range(start, low):
                        poke(entry, o, zeros)
                    for o in range(low, high):
                        poke(entry, o, source + o * step * pixel)
                    for o in range(high, stop):
                        poke(entry, o, zeros)
                    entry += peek(params, SIZE) * 8
        p += stop - start


def _dense_kernel(DTYPE, ITEM, ROWS, VECTORS, WIDTH):
    """One item is a block of output pixels times a share of the panels."""

    def kernel(params, item, thread):
        zeros = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        table, sums = zeros + peek(params, TABLE), zeros + peek(params, SUMS)
        size, blocks, share = peek(params, SIZE), peek(params, BLOCKS), peek(params, SHARE)
        taps = peek(params, KT) * peek(params, KH) * peek(params, KW)
        depth, k, group = peek(params, DEPTH), peek(params, K), peek(params, GROUP)
        x, bias, residual = peek(params, X), peek(params, BIAS), peek(params, RESIDUAL)

        clear(DTYPE, zeros, peek(params, C))
        first = item % blocks * size
        last = min(first + size, peek(params, PIXELS))
        _fill_table(params, table, zeros, first, last, ITEM)
        for i in range(taps):  # the register block reaches beyond the last pixel
            for o in range(last - first, min(last - first + ROWS, size)):
                poke(table, i * size + o, zeros)

        first_panel = item // blocks * share
        for n in range(first_panel, min(first_panel + share, peek(params, PANEL_COUNT))):
            g = n // peek(params, PANELS_PER_GROUP)
            column = n % peek(params, PANELS_PER_GROUP) * WIDTH
            channel = g * group + column
            for p in range(0, last - first, ROWS):
                at = ((first + p) * k + channel) * ITEM
                ahead = x + ((first + p + ROWS) * peek(params, C) + g * depth) * ITEM
                dense_tile(
                    DTYPE, ROWS, VECTORS, table + p * 8, size, taps, g * depth, depth,
                    peek(params, PANELS) + n * taps * depth * WIDTH * ITEM,
                    ahead, peek(params, AHEAD_STEP), sums,
                    last - first - p, peek(params, Y) + at, k, min(group - column, WIDTH),
                    bias + channel * ITEM * (bias != 0), residual + at * (residual != 0),
                    peek(params, ACTIVATION),
                )  # fmt: skip

    return kernel


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
        ahead_step,
    )  # fmt: skip
    compiled = kernel(_dense_kernel, plan.dtype, item, rows, vectors, width)
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
