"""The stages of Winograd convolution as kernels over blocks of tiles.

All read one parameter block, laid out below. A block of tiles has its V (points, rows, channels)
and M (points, rows, columns) either in its thread's own scratch memory, which THREAD_STEP then
tells apart, or in memory of all blocks, where ROW_STEP rows belong to each.
"""

from __future__ import annotations

from .gemm import gemm_rows
from .simd import ITEM_BYTES, call, peek, vector_width
from .tiles import input_tile, output_tile, transforms_of

# Fields of the parameter block that all stages read.
(
    X, V, U, M, Y, BIAS, RESIDUAL,
    CHANNELS, OUT_CHANNELS, PANELS,
    TILES, FIRST_TILE, TILES_PER_ITEM, ROW_STEP, THREAD_STEP,
    V_STRIDE, V_POINT, M_POINT, M_PANEL, POINT_GROUPS,
    X_IMAGE, Y_IMAGE, TILES_PER_IMAGE,
    INPUT_STAGE, MULTIPLY_STAGE, OUTPUT_STAGE,
    AXES,
) = range(27)  # fmt: skip
# Seven numbers for each permuted axis follow at AXES.
DIVISOR, COUNT, PAD, SIZE, OUT, X_STEP, Y_STEP = range(7)
AXIS_FIELDS = 7


def input_kernel(DTYPE, SPEC, AHEAD):
    """V of the tiles of one item; V (points, rows, channels) starts at row item * ROW_STEP."""
    ITEM = ITEM_BYTES[DTYPE]
    M0, M1, M2 = (t.m for t in transforms_of(SPEC))

    def kernel(params, item, thread):
        first = peek(params, FIRST_TILE) + item * peek(params, TILES_PER_ITEM)
        last = min(first + peek(params, TILES_PER_ITEM), peek(params, TILES))
        stride = peek(params, V_STRIDE)
        v = peek(params, V) + thread * peek(params, THREAD_STEP)
        v += ITEM * item * peek(params, ROW_STEP) * stride
        b0, b1, b2 = AXES, AXES + AXIS_FIELDS, AXES + 2 * AXIS_FIELDS
        x0, x1, x2 = peek(params, b0 + X_STEP), peek(params, b1 + X_STEP), peek(params, b2 + X_STEP)
        for tile in range(first, last):
            image = tile // peek(params, TILES_PER_IMAGE)
            p0 = tile // peek(params, b0 + DIVISOR) % peek(params, b0 + COUNT) * M0
            p1 = tile // peek(params, b1 + DIVISOR) % peek(params, b1 + COUNT) * M1
            p2 = tile // peek(params, b2 + DIVISOR) % peek(params, b2 + COUNT) * M2
            p0 -= peek(params, b0 + PAD)
            p1 -= peek(params, b1 + PAD)
            p2 -= peek(params, b2 + PAD)
            origin = image * peek(params, X_IMAGE) + p0 * x0 + p1 * x1 + p2 * x2
            input_tile(
                DTYPE, SPEC, AHEAD, peek(params, X) + ITEM * origin, peek(params, CHANNELS),
                -p0, peek(params, b0 + SIZE) - p0, x0,
                -p1, peek(params, b1 + SIZE) - p1, x1,
                -p2, peek(params, b2 + SIZE) - p2, x2,
                v + ITEM * (tile - first) * stride, peek(params, V_POINT),
            )  # fmt: skip

    return kernel


def multiply_kernel(DTYPE, ROWS, VECTORS, POINTS):
    """M = V U for the points of one group and one panel: item = (block, point group, panel)."""
    ITEM, WIDTH = ITEM_BYTES[DTYPE], VECTORS * vector_width(DTYPE)

    def kernel(params, item, thread):
        groups, panels = peek(params, POINT_GROUPS), peek(params, PANELS)
        panel, group = item % panels, item // panels % groups
        first = peek(params, FIRST_TILE) + item // (groups * panels) * peek(params, TILES_PER_ITEM)
        rows = min(peek(params, TILES_PER_ITEM), peek(params, TILES) - first)
        depth, stride = peek(params, CHANNELS), peek(params, V_STRIDE)
        v = peek(params, V) + thread * peek(params, THREAD_STEP)
        m = peek(params, M) + thread * peek(params, THREAD_STEP)
        m += ITEM * panel * peek(params, M_PANEL)
        size = POINTS // groups
        for point in range(group * size, group * size + size):
            u = peek(params, U) + ITEM * (panel * POINTS + point) * depth * WIDTH
            gemm_rows(
                DTYPE, ROWS, VECTORS, "", rows,
                v + ITEM * point * peek(params, V_POINT), stride, u, depth,
                m + ITEM * point * peek(params, M_POINT), WIDTH, WIDTH, 0, 0, 0,
            )  # fmt: skip

    return kernel


def output_kernel(DTYPE, SPEC, EPILOGUE, VECTORS):
    """y of the tiles of one item and one panel: item = (block, panel)."""
    ITEM, WIDTH = ITEM_BYTES[DTYPE], VECTORS * vector_width(DTYPE)
    M0, M1, M2 = (t.m for t in transforms_of(SPEC))

    def kernel(params, item, thread):
        panel, item = item % peek(params, PANELS), item // peek(params, PANELS)
        first = peek(params, FIRST_TILE) + item * peek(params, TILES_PER_ITEM)
        last = min(first + peek(params, TILES_PER_ITEM), peek(params, TILES))
        m = peek(params, M) + thread * peek(params, THREAD_STEP)
        m += ITEM * (panel * peek(params, M_PANEL) + item * peek(params, ROW_STEP) * WIDTH)
        column = panel * WIDTH
        b0, b1, b2 = AXES, AXES + AXIS_FIELDS, AXES + 2 * AXIS_FIELDS
        y0, y1, y2 = peek(params, b0 + Y_STEP), peek(params, b1 + Y_STEP), peek(params, b2 + Y_STEP)
        for tile in range(first, last):
            image = tile // peek(params, TILES_PER_IMAGE)
            p0 = tile // peek(params, b0 + DIVISOR) % peek(params, b0 + COUNT) * M0
            p1 = tile // peek(params, b1 + DIVISOR) % peek(params, b1 + COUNT) * M1
            p2 = tile // peek(params, b2 + DIVISOR) % peek(params, b2 + COUNT) * M2
            origin = image * peek(params, Y_IMAGE) + p0 * y0 + p1 * y1 + p2 * y2 + column
            output_tile(
                DTYPE, SPEC, EPILOGUE, VECTORS,
                m + ITEM * (tile - first) * WIDTH, peek(params, M_POINT),
                peek(params, Y) + ITEM * origin,
                peek(params, RESIDUAL) + ITEM * origin,
                peek(params, BIAS) + ITEM * column,
                peek(params, OUT_CHANNELS) - column,
                peek(params, b0 + OUT) - p0, y0,
                peek(params, b1 + OUT) - p1, y1,
                peek(params, b2 + OUT) - p2, y2,
            )  # fmt: skip

    return kernel


def fused_kernel():
    """All stages for one block of tiles, panel by panel."""

    def kernel(params, item, thread):
        call(peek(params, INPUT_STAGE), params, item, thread)
        panels = peek(params, PANELS)
        for panel in range(panels):
            call(peek(params, MULTIPLY_STAGE), params, item * panels + panel, thread)
            call(peek(params, OUTPUT_STAGE), params, item * panels + panel, thread)

    return kernel
