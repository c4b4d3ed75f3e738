"""Convolution as an implicit matrix product: rows are output pixels, columns output channels.

A block of output pixels keeps a table of addresses, one per tap and pixel: where that tap's input
channels begin, or a row of zeros where the tap lies on padding. The micro-kernel broadcasts inputs
through the table and streams packed weights, so every stride, dilation and padding is one kernel.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from ..geometry import Geometry
from ..plan import Plan
from .finish import activation_number, finish_rows
from .gemm import block_rows, pack_panels, panel_vectors
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
    sizes, still = (
        list(g.in_size),
        [
            k == s == 1 and p == (0, 0)
            for k, s, p in zip(g.kernel, g.stride, g.padding, strict=True)
        ],
    )
    batch = g.batch
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
def gather_product(
    code: Code,
    dtype: str,
    rows: int,
    vectors: int,
    table: Int,
    table_stride: Int,
    taps: Int,
    shift: Int,
    depth: Int,
    panel: Int,
    sums: Int,
    y: Int,
    y_stride: Int,
) -> None:
    """sums (rows, vectors * lanes) = sum over taps of the inputs under the table times the panel.

    table (taps, table_stride) int64: addresses of inputs, `rows` valid per tap
    shift: elements from there to the group's first channel;  depth: channels per group
    panel (taps * depth, vectors * lanes)
    y, y_stride: where the rows go afterwards; their cache lines are asked for now
    """
    width = vectors * code.lanes

    def tap(t: Int, sums: list[Vec]) -> list[Vec]:
        entries = table + t * table_stride * 8
        inputs = [int_at(code, entries, i) + shift * code.item for i in range(rows)]
        under = panel + t * depth * (width * code.item)

        def channel(c: Int, sums: list[Vec]) -> list[Vec]:
            w = [code.load(under, c * width + j * code.lanes) for j in range(vectors)]
            following = []
            for i in range(rows):
                value = code.broadcast(inputs[i], c)
                following += [fma(value, w[j], sums[i * vectors + j]) for j in range(vectors)]
            return following

        return code.loop(depth, channel, sums)

    for i in range(rows):
        for j in range(vectors):
            code.prefetch(y, i * y_stride + j * code.lanes, write=True)
    totals = code.loop(taps, tap, [code.zero()] * (rows * vectors))
    for n, total in enumerate(totals):
        code.store(total, sums, n * code.lanes)


def _dense_kernel(DTYPE, ITEM, ROWS, VECTORS, WIDTH):
    """params: as `run` lists them; one item is a block of output pixels times a share of panels."""

    def kernel(params, item, thread):
        x, y, panels = peek(params, 0), peek(params, 1), peek(params, 2)
        bias, residual, activation = peek(params, 3), peek(params, 4), peek(params, 5)
        scratch = peek(params, 6) + thread * peek(params, 7)
        table, sums = scratch + peek(params, 8), scratch + peek(params, 9)
        t, h, w, c = peek(params, 10), peek(params, 11), peek(params, 12), peek(params, 13)
        pixels, ot, oh, ow = peek(params, 14), peek(params, 15), peek(params, 16), peek(params, 17)
        k, depth, group = peek(params, 18), peek(params, 19), peek(params, 20)
        kt, kh, kw = peek(params, 21), peek(params, 22), peek(params, 23)
        st, sh, sw = peek(params, 24), peek(params, 25), peek(params, 26)
        pt, ph, pw = peek(params, 27), peek(params, 28), peek(params, 29)
        dt, dh, dw = peek(params, 30), peek(params, 31), peek(params, 32)
        size, blocks, share = peek(params, 33), peek(params, 34), peek(params, 35)
        per_group, count = peek(params, 36), peek(params, 37)
        taps = kt * kh * kw

        clear(DTYPE, scratch, c)
        first = item % blocks * size
        last = min(first + size, pixels)
        row_stride = c * ITEM
        p = first
        while p < last:
            # A run: the pixels of this block in one row of the output.
            row, start = p // ow, p % ow
            stop = min(start + last - p, ow)
            b, out_t, out_h = row // (ot * oh), row // oh % ot, row % oh
            entry = table + (p - first - start) * 8
            for i in range(kt):
                in_t = out_t * st - pt + i * dt
                for j in range(kh):
                    in_h = out_h * sh - ph + j * dh
                    inside = 0 <= in_t < t and 0 <= in_h < h
                    for q in range(kw):
                        in_w = q * dw - pw
                        low, high = start, start
                        if inside:
                            # Outputs whose column in_w + o * sw lies in 0 .. w - 1.
                            low = min(max((sw - 1 - in_w) // sw, start), stop)
                            high = max(min((w - 1 - in_w) // sw + 1, stop), low)
                        source = x + (((b * t + in_t) * h + in_h) * w + in_w) * row_stride
                        for o in range(start, low):
                            poke(entry, o, scratch)
                        for o in range(low, high):
                            poke(entry, o, source + o * sw * row_stride)
                        for o in range(high, stop):
                            poke(entry, o, scratch)
                        entry += size * 8
            p += stop - start
        for i in range(taps):
            for o in range(last - first, min(-(-(last - first) // ROWS) * ROWS, size)):
                poke(table + i * size * 8, o, scratch)

        first_panel = item // blocks * share
        for n in range(first_panel, min(first_panel + share, count)):
            g, column = n // per_group, n % per_group * WIDTH
            channel = g * group + column
            for p in range(0, last - first, ROWS):
                at = ((first + p) * k + channel) * ITEM
                gather_product(
                    DTYPE, ROWS, VECTORS,
                    table + p * 8, size, taps, g * depth, depth,
                    panels + n * taps * depth * WIDTH * ITEM, sums, y + at, k,
                )  # fmt: skip
                finish_rows(
                    DTYPE, VECTORS, sums, min(ROWS, last - first - p), y + at, k,
                    min(group - column, WIDTH), bias + channel * ITEM * (bias != 0),
                    residual + at * (residual != 0), activation,
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
    g = merged(plan.geometry)
    pixels, group = g.batch * prod(g.out_size), g.out_channels // g.groups
    if not pixels:
        return
    dtype, item, lanes = plan.dtype, x.itemsize, vector_width(plan.dtype)
    vectors = panel_vectors(group, dtype)
    rows, count = block_rows(vectors), packed.shape[0] * packed.shape[1]
    size, blocks, share = _split(pixels, rows, count)
    parts = _sizes(plan)
    params = (
        address(x), address(y), address(packed),
        address(bias), address(residual), activation_number(plan.epilogue),
        address(scratch), sum(parts) * item, parts[0] * item, (parts[0] + parts[1]) * item,
        *g.in_size, g.in_channels, pixels, *g.out_size, g.out_channels,
        g.in_channels // g.groups, group,
        *g.kernel, *g.stride, *(before for before, _ in g.padding), *g.dilation,
        size, blocks, share, packed.shape[1], count,
    )  # fmt: skip
    compiled = kernel(_dense_kernel, dtype, item, rows, vectors, vectors * lanes)
    parallel_for(compiled, params, blocks * -(-count // share))


def _split(pixels: int, rows: int, panels: int) -> tuple[int, int, int]:
    """Pixels per block, blocks, panels per item: large items, but enough for all threads."""
    wanted = 4 * threads()
    size = min(_pixels(rows), max(-(-pixels // (wanted * rows)), 1) * rows)
    blocks = -(-pixels // size)
    shares = min(panels, -(-wanted // blocks))
    return size, blocks, -(-panels // shares)
