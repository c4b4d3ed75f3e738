"""Minimal filtering F(m, r) per axis, stride 1: transforms and products in vector registers.

Tiles go through three stages (Lavin and Gray 2016, section 4.1): V = BT d for every channel, M = V U
as one matrix product per point, y = AT M with the epilogue. Few tiles at a time keep V and M in the
second-level cache; where the transformed weights are large, the stages run over many tiles instead.

The three axes are permuted so that trivial ones, F(1, 1), come first: "axis 0" below is a loop over
planes, axes 1 and 2 are transformed in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from ..transforms import Transform, apply_along, transform
from .gemm import block_rows, epilogue_words, gemm_rows, pack_panels, panel_vectors
from .layout import channels_last_views, pieces, pieces_size, views_size
from .simd import Kernel, address, call, kernel, parallel_for, peek, threads, vector_width
from .tiles import input_tile, output_tile, spec_of

CONFIGS: tuple[dict[str, int], ...] = ({}, {"tiles": 14}, {"tiles": 28}, {"tiles": 56})

DTYPES = ("float32", "float64")
_CACHE_BYTES = 1 << 20  # what a thread's V and M should fit
_PHASED_BYTES = 48 << 20  # V and M of all threads together, when the stages run one by one


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(DTYPES)}"
    if geometry.groups != 1:
        return f"winograd is for one group, not {geometry.groups}"
    if any(d != 1 for d in geometry.dilation):
        return f"winograd is for dilation 1, not {geometry.dilation}"
    if all(r == 1 for r in geometry.kernel):
        return f"no axis of kernel {geometry.kernel} has more than one tap"
    if any(s != 1 for s in geometry.stride):
        return (
            f"stride {geometry.stride} needs the polyphase split, which the numba backend does not have"
        )
    return None


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
_AXIS = 7


def _input_kernel(DTYPE, SPEC, ITEM, M0, M1, M2):
    """V of the tiles of one item; V (points, rows, channels) starts at row item * ROW_STEP."""

    def kernel(params, item, thread):
        first = peek(params, FIRST_TILE) + item * peek(params, TILES_PER_ITEM)
        last = min(first + peek(params, TILES_PER_ITEM), peek(params, TILES))
        stride = peek(params, V_STRIDE)
        v = peek(params, V) + thread * peek(params, THREAD_STEP)
        v += ITEM * item * peek(params, ROW_STEP) * stride
        b0, b1, b2 = AXES, AXES + _AXIS, AXES + 2 * _AXIS
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
                DTYPE, SPEC, peek(params, X) + ITEM * origin, peek(params, CHANNELS),
                -p0, peek(params, b0 + SIZE) - p0, x0,
                -p1, peek(params, b1 + SIZE) - p1, x1,
                -p2, peek(params, b2 + SIZE) - p2, x2,
                v + ITEM * (tile - first) * stride, peek(params, V_POINT),
            )  # fmt: skip

    return kernel


def _multiply_kernel(DTYPE, ROWS, VECTORS, ITEM, WIDTH, POINTS):
    """M = V U for the points of one group and one panel: item = (block, panel, point group)."""

    def kernel(params, item, thread):
        groups, panels = peek(params, POINT_GROUPS), peek(params, PANELS)
        group, panel = item % groups, item // groups % panels
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


def _output_kernel(DTYPE, SPEC, EPILOGUE, VECTORS, ITEM, WIDTH, M0, M1, M2):
    """y of the tiles of one item and one panel: item = (block, panel)."""

    def kernel(params, item, thread):
        panel, item = item % peek(params, PANELS), item // peek(params, PANELS)
        first = peek(params, FIRST_TILE) + item * peek(params, TILES_PER_ITEM)
        last = min(first + peek(params, TILES_PER_ITEM), peek(params, TILES))
        m = peek(params, M) + thread * peek(params, THREAD_STEP)
        m += ITEM * (panel * peek(params, M_PANEL) + item * peek(params, ROW_STEP) * WIDTH)
        column = panel * WIDTH
        b0, b1, b2 = AXES, AXES + _AXIS, AXES + 2 * _AXIS
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


def _fused_kernel():
    """All stages for one block of tiles, panel by panel."""

    def kernel(params, item, thread):
        call(peek(params, INPUT_STAGE), params, item, thread)
        panels = peek(params, PANELS)
        for panel in range(panels):
            call(peek(params, MULTIPLY_STAGE), params, item * panels + panel, thread)
            call(peek(params, OUTPUT_STAGE), params, item * panels + panel, thread)

    return kernel


@dataclass(frozen=True)
class Packed:
    """Transformed weights and everything that is decided before arrays are there.

    u        (panels, points, channels, columns of a panel)
    order    the permuted axes of the lifted geometry, trivial transforms first
    stages   input, multiply, output, fused
    tiles    at most so many per block
    phased   whether the stages run one after the other, over blocks of all threads
    """

    u: np.ndarray
    order: tuple[int, ...]
    stages: tuple[Kernel, Kernel, Kernel, Kernel]
    tiles: int
    phased: bool
    v_stride: int
    width: int


def _lifted(transforms: tuple[Transform, ...]) -> tuple[Transform, ...]:
    return (transform(1, 1),) * (3 - len(transforms)) + transforms


def _permuted(plan: Plan) -> tuple[tuple[int, ...], tuple[Transform, ...]]:
    """Axes of the lifted geometry and their transforms, those with one point first."""
    lifted = _lifted(plan.transforms)
    order = tuple(sorted(range(3), key=lambda axis: lifted[axis].alpha > 1))
    return order, tuple(lifted[axis] for axis in order)


def _tile_counts(plan: Plan) -> tuple[int, ...]:
    """Tiles per axis of the lifted geometry."""
    out = plan.geometry.lifted().out_size
    return tuple(-(-o // t.m) for o, t in zip(out, _lifted(plan.transforms), strict=True))


def _widths(plan: Plan) -> tuple[int, int, int]:
    """Vectors of a panel, columns of a panel, and channels of a row of V, padded to registers."""
    lanes = vector_width(plan.dtype)
    vectors = panel_vectors(plan.geometry.out_channels, plan.dtype)
    return vectors, vectors * lanes, -(-plan.geometry.in_channels // lanes) * lanes


def _schedule(plan: Plan) -> tuple[int, bool]:
    """Tiles per block, and whether stages run one by one over all tiles."""
    points = prod(t.alpha for t in plan.transforms)
    vectors, width, depth = _widths(plan)
    rows = block_rows(vectors)
    item = np.dtype(plan.dtype).itemsize
    total = plan.geometry.batch * prod(_tile_counts(plan))
    columns = -(-plan.geometry.out_channels // width) * width
    weights = points * depth * columns * item
    per_tile = points * (depth + width) * item
    fitting = max(1, _CACHE_BYTES // per_tile // rows) * rows
    tiles = plan.options.get("tiles", min(fitting, 2 * rows))
    phased = weights > 16 << 20
    if phased:
        tiles = max(rows, _PHASED_BYTES // (points * (depth + columns) * item))
    return min(tiles, max(total, 1)), phased


def _scratch(plan: Plan, packed_threads: int) -> tuple[int, int, int]:
    """Elements of V per point, of M per point, and of V and M per thread (all of them if phased)."""
    tiles, phased = _schedule(plan)
    points = prod(t.alpha for t in plan.transforms)
    _, width, depth = _widths(plan)
    lanes = vector_width(plan.dtype)
    panels = -(-plan.geometry.out_channels // width) if phased else 1
    # A register more between points, so that they do not fall on the same cache set.
    v_point, m_point = tiles * depth + lanes, tiles * width + lanes
    return v_point, m_point, points * (v_point + panels * m_point)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    _, phased = _schedule(plan)
    *_, each = _scratch(plan, 0)
    columns = -(-plan.geometry.out_channels // _widths(plan)[1]) * _widths(plan)[1]
    own = pieces_size([each * (1 if phased else threads()), columns], plan.dtype)
    return views_size(plan) + own


def prepack(weights: np.ndarray, plan: Plan) -> Packed:
    """U = G g along every axis, in float64 and rounded once, in panels; and the compiled stages."""
    order, transforms = _permuted(plan)
    geometry = plan.geometry.lifted()
    u = np.asarray(weights, np.float64).reshape(geometry.w_shape)
    u = u.transpose(1, 0, *(2 + axis for axis in order))  # (C, K, *kernel)
    for axis, t in enumerate(transforms, 2):
        u = apply_along(t.filter_program, u, axis)
    channels, outs = u.shape[:2]
    u = u.reshape(channels, outs, -1).transpose(2, 0, 1).astype(plan.dtype)  # (points, C, K)
    vectors, width, depth = _widths(plan)
    panels = pack_panels(u, vectors).swapaxes(0, 1)  # (panels, points, C, width)
    spec, item = spec_of(transforms), u.itemsize
    ms, alphas = [t.m for t in transforms], [t.alpha for t in transforms]
    words = epilogue_words(plan.epilogue)
    stages = (
        kernel(_input_kernel, plan.dtype, spec, item, *ms),
        kernel(_multiply_kernel, plan.dtype, block_rows(vectors), vectors, item, width, prod(alphas)),
        kernel(_output_kernel, plan.dtype, spec, words, vectors, item, width, *ms),
        kernel(_fused_kernel),
    )
    tiles, phased = _schedule(plan)
    return Packed(np.ascontiguousarray(panels), order, stages, tiles, phased, depth, width)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x by F(m, r) on every axis, and its epilogue, to y.

    x (N, C, *in_size), packed from `prepack` for the same plan, bias (K,) or None,
    residual (N, K, *out_size) or None, y (N, K, *out_size) written; memory as plan.layout says.

    Equivalent to `F.conv3d(x, w, bias, 1, padding)`.
    """
    if not y.size:
        return
    views = channels_last_views(plan, x, residual, y, workspace)
    params = _params(plan, packed, views, bias)
    total, stages = params[TILES], packed.stages
    if packed.phased:
        _run_phased(params, stages, packed, total)
    else:
        # As many blocks for every thread, of equal size.
        blocks = -(-total // packed.tiles)
        blocks = -(-blocks // threads()) * threads()
        params[TILES_PER_ITEM] = -(-total // blocks)
        parallel_for(stages[3], params, -(-total // params[TILES_PER_ITEM]))
    views.finish()


def _run_phased(params: list[int], stages, packed: Packed, total: int) -> None:
    """Transform, multiply, transform back: packed.tiles tiles at a time, shared by all threads."""
    end = 0
    while end < total:
        params[FIRST_TILE], end = end, min(end + packed.tiles, total)
        params[TILES] = end
        count = end - params[FIRST_TILE]
        each = -(-count // (4 * threads()))
        params[TILES_PER_ITEM] = params[ROW_STEP] = each
        parallel_for(stages[0], params, -(-count // each))
        params[TILES_PER_ITEM], params[ROW_STEP] = count, 0
        parallel_for(stages[1], params, params[PANELS] * params[POINT_GROUPS])
        params[TILES_PER_ITEM] = params[ROW_STEP] = each
        parallel_for(stages[2], params, -(-count // each) * params[PANELS])


def _params(plan: Plan, packed: Packed, views, bias: np.ndarray | None) -> list[int]:
    """The parameter block for one call."""
    geometry = plan.geometry.lifted()
    v_point, m_point, each = _scratch(plan, 0)
    points = prod(t.alpha for t in plan.transforms)
    panels, _, channels, width = packed.u.shape
    scratch, shift, _ = pieces(
        views.workspace, [each * (1 if packed.phased else threads()), panels * width]
    )
    if bias is not None:
        shift[: geometry.out_channels] = bias
        shift[geometry.out_channels :] = 0
    item = packed.u.itemsize
    params = [0] * (AXES + 3 * _AXIS)
    params[X], params[Y], params[U] = address(views.x), address(views.y), address(packed.u)
    params[V] = address(scratch)
    params[M] = params[V] + item * points * v_point
    params[BIAS], params[RESIDUAL] = address(shift), address(views.residual)
    params[CHANNELS], params[OUT_CHANNELS] = channels, geometry.out_channels
    params[PANELS] = panels
    params[THREAD_STEP] = 0 if packed.phased else item * each
    params[V_STRIDE], params[V_POINT], params[M_POINT] = packed.v_stride, v_point, m_point
    params[M_PANEL] = points * m_point if packed.phased else 0
    params[POINT_GROUPS] = points if packed.phased else 1
    params[X_IMAGE] = channels * prod(geometry.in_size)
    params[Y_IMAGE] = geometry.out_channels * prod(geometry.out_size)
    counts = _tile_counts(plan)
    params[TILES_PER_IMAGE] = prod(counts)
    params[TILES] = geometry.batch * prod(counts)
    for stage, compiled in zip((INPUT_STAGE, MULTIPLY_STAGE, OUTPUT_STAGE), packed.stages, strict=False):
        params[stage] = compiled.address
    for i, axis in enumerate(packed.order):
        after = slice(axis + 1, 3)
        params[AXES + i * _AXIS : AXES + (i + 1) * _AXIS] = (
            prod(counts[after]),
            counts[axis],
            geometry.padding[axis][0],
            geometry.in_size[axis],
            geometry.out_size[axis],
            channels * prod(geometry.in_size[after]),
            geometry.out_channels * prod(geometry.out_size[after]),
        )
    return params
