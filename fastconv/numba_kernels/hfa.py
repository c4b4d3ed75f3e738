"""The fully separable block in one pass, row by row: nothing of its inner stages leaves the cache.

An item is a tile of m output frames, or a strip of rows of it. New rows of the temporal stage come
out of F(m, K) - transform, one matrix product per point, inverse - into a ring of as many rows as
the depthwise window is high; the depthwise stage reads the ring, F(m, r) or tap by tap as the plan
says; its rows are multiplied by the pointwise weights on the way to y. Padding belongs to the
output of a stage, behind its activation: rows and columns outside the image are zero in the ring.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..epilogue import Epilogue
from ..geometry import SeparableGeometry
from ..plan import Plan
from ..transforms import apply_along
from .finish import activation_number, finish_rows
from .gemm import block_rows, gemm_rows, pack_panels, panel_vectors
from .layout import channels_last_views, pieces, pieces_size, views_size
from .memory import clear, poke
from .simd import address, kernel, parallel_for, peek, threads, vector_width
from .stages import COLUMNS, depthwise_rows, frames_in, frames_out
from .tiles import spec_of

CONFIGS: tuple[dict[str, int], ...] = ({},)
DTYPES = ("float32", "float64")
ROW_PIXELS = 56  # of a matrix product: rows are taken together until there are about as many


def supports(
    geometry: SeparableGeometry, dtype: str, epilogue: tuple[Epilogue, Epilogue, Epilogue]
) -> str | None:
    """None, or the reason against."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(DTYPES)}"
    stride = (geometry.temporal.stride[0], *geometry.depthwise.stride[1:])
    if stride != (1, 1, 1):
        return f"stride {stride}: the numba block is for stride 1"
    return None


@dataclass(frozen=True)
class _Cut:
    """How a plan is cut for some threads; sizes in elements."""

    rows: int  # output rows per step
    strips: int  # of rows, per tile of frames
    ring_rows: int
    row_columns: int
    v_point: int  # elements from point to point of V and of M
    m_point: int
    parts: tuple[int, ...]  # of one thread: ring, zero row, V, M, depthwise output, pointwise sums, tables


def _panel(channels: int, dtype: str) -> tuple[int, int, int]:
    """Vectors of a panel, its columns, and all columns of the padded panels."""
    vectors = panel_vectors(channels, dtype)
    width = vectors * vector_width(dtype)
    return vectors, width, -(-channels // width) * width


@functools.lru_cache(maxsize=256)
def _cut(plan: Plan, workers: int) -> _Cut:
    temporal, depthwise, pointwise = plan.geometry.stages
    time, high, wide = plan.transforms
    lanes, item = vector_width(plan.dtype), np.dtype(plan.dtype).itemsize
    _, out_h, out_w = depthwise.out_size
    in_w = temporal.in_size[2]
    rows = min(-(-ROW_PIXELS // in_w), out_h)
    rows = -(-rows // high.m) * high.m
    ring_rows = rows + high.r - 1
    tile = COLUMNS if high.m == wide.m == 1 else wide.m
    row_columns = max(-(-out_w // tile) * tile + wide.r - 1, depthwise.padding[2][0] + in_w)
    _, panel, columns = _panel(temporal.out_channels, plan.dtype)
    _, last_panel, _ = _panel(pointwise.out_channels, plan.dtype)
    channels = -(-temporal.out_channels // lanes) * lanes
    # As many strips as make the busiest thread finish first, one for as many rows as it adds.
    tiles = temporal.batch * -(-temporal.out_size[0] // time.m)
    strips = min(
        range(1, min(out_h, 2 * workers) + 1),
        key=lambda s: -(-tiles * s // workers) * (-(-out_h // s) + high.r - 1),
    )
    v_point = _point(rows * in_w * temporal.in_channels, lanes)
    m_point = _point(rows * in_w * panel, lanes)
    parts = (
        time.m * ring_rows * row_columns * columns,
        row_columns * columns,
        time.alpha * v_point,
        time.alpha * m_point,
        rows * out_w * channels,
        rows * out_w * last_panel,
        (2 * time.alpha + high.alpha) * 8 // item,
    )
    line = 64 // item
    whole = tuple(-(-part // line) * line for part in parts)
    return _Cut(rows, strips, ring_rows, row_columns, v_point, m_point, whole)


def _point(size: int, lanes: int) -> int:
    """Elements from point to point of V or M: one vector more, against cache conflicts."""
    return -(-size // lanes) * lanes + lanes


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return views_size(plan) + pieces_size(_pieces(plan), plan.dtype)


def _pieces(plan: Plan) -> list[int]:
    """Elements of the scratch of all threads, and of the three biases in whole panels."""
    shifts = [_panel(g.out_channels, plan.dtype)[2] for g in plan.geometry.stages]
    return [sum(_cut(plan, threads()).parts) * threads(), *shifts]


@dataclass(frozen=True)
class Packed:
    """The weights of the three stages, channels in front of the lanes.

    temporal   (points, panels, C, columns of a panel)
    depthwise  (points of both axes, M in whole vectors)
    pointwise  (panels, M, columns of a panel)
    """

    temporal: np.ndarray
    depthwise: np.ndarray
    pointwise: np.ndarray


def prepack(weights: tuple[np.ndarray, np.ndarray, np.ndarray], plan: Plan) -> Packed:
    """U = G g of the temporal (M, C, KT, 1, 1) and depthwise (M, 1, 1, KH, KW) weights, in panels.

    The pointwise weights (K, M, 1, 1, 1) stay what they are, in panels too.
    """
    time, high, wide = plan.transforms
    wt, wd, wp = (np.asarray(w, np.float64) for w in weights)
    # (M, C, alpha) -> (alpha, C, M)
    ut = apply_along(time.filter_program, wt[..., 0, 0], 2).transpose(2, 1, 0).astype(plan.dtype)
    ud = apply_along(wide.filter_program, apply_along(high.filter_program, wd[:, 0, 0], 1), 2)
    channels = wd.shape[0]
    padded = np.zeros((high.alpha * wide.alpha, _whole(channels, plan.dtype)), plan.dtype)
    padded[:, :channels] = ud.reshape(channels, -1).T
    return Packed(
        pack_panels(ut, panel_vectors(channels, plan.dtype)),
        padded,
        pack_panels(wp[:, :, 0, 0, 0].T.astype(plan.dtype), panel_vectors(wp.shape[0], plan.dtype)),
    )


def _whole(channels: int, dtype: str) -> int:
    lanes = vector_width(dtype)
    return -(-channels // lanes) * lanes


(
    X, Y, RESIDUAL, UT, UD, UP, BIAS_T, BIAS_D, BIAS_P, ACT_T, ACT_D, ACT_P,
    SCRATCH, THREAD_STEP, ZERO_ROW, V, M, DEPTHWISE, SUMS, TABLES, V_POINT, M_POINT,
    T, H, W, C, OT, OH, OW, K, MIDDLE, COLUMNS_T, COLUMNS_D, PANELS_T, PANELS_P,
    PAD_T, PAD_H, PAD_W, ROWS, STRIPS, RING_ROWS, ROW_COLUMNS,
    FIELDS,
) = range(43)  # fmt: skip


def _hfa_kernel(
    DTYPE, ITEM, TIME, SPACE, M_TIME, ALPHA_TIME, M_HIGH, ALPHA_HIGH, TAPS_HIGH,
    ROWS_T, VECTORS_T, WIDTH_T, ROWS_P, VECTORS_P, WIDTH_P,
):  # fmt: skip
    """One item is a strip of output rows of a tile of output frames."""

    def kernel(params, item, thread):
        t, h, w, c = peek(params, T), peek(params, H), peek(params, W), peek(params, C)
        ot, oh, ow, k = peek(params, OT), peek(params, OH), peek(params, OW), peek(params, K)
        middle, step = peek(params, MIDDLE), peek(params, COLUMNS_T)
        channels, most = peek(params, COLUMNS_D), peek(params, ROWS)
        slots, row = peek(params, RING_ROWS), peek(params, ROW_COLUMNS) * step
        ring = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        zero_row, v, m = (
            ring + peek(params, ZERO_ROW),
            ring + peek(params, V),
            ring + peek(params, M),
        )
        rows_out, sums = ring + peek(params, DEPTHWISE), ring + peek(params, SUMS)
        frames, inputs = ring + peek(params, TABLES), ring + peek(params, TABLES) + ALPHA_TIME * 16
        v_point, m_point = peek(params, V_POINT), peek(params, M_POINT)
        pad_h, pad_w = peek(params, PAD_H), peek(params, PAD_W)
        residual = peek(params, RESIDUAL)

        strips = peek(params, STRIPS)
        each = -(-oh // strips)
        tiles = -(-ot // M_TIME)
        first, last = item % strips * each, min(item % strips * each + each, oh)
        tile = item // strips % tiles * M_TIME
        image = item // (strips * tiles)

        clear(DTYPE, ring, M_TIME * slots * row)
        clear(DTYPE, zero_row, row)
        done = max(first - pad_h, 0)  # rows of the temporal stage in the ring
        for top in range(first, last, most):
            rows = min(most, last - top)
            needed = -(-rows // M_HIGH) * M_HIGH + TAPS_HIGH - 1
            needed = min(top - pad_h + needed, h)
            while done < needed:
                count = min(most, needed - done)
                for f in range(ALPHA_TIME):
                    at = tile - peek(params, PAD_T) + f
                    inside = 0 <= at < t
                    source = peek(params, X) + (((image * t + at) * h + done) * w * c) * ITEM
                    poke(frames, 2 * f, source if inside else zero_row)
                    poke(frames, 2 * f + 1, 1 if inside else 0)
                frames_in(DTYPE, TIME, frames, count * w * c, v, v_point)
                for p in range(peek(params, PANELS_T)):
                    for f in range(ALPHA_TIME):
                        u = (f * peek(params, PANELS_T) + p) * c * WIDTH_T
                        gemm_rows(
                            DTYPE, ROWS_T, VECTORS_T, "", count * w, v + f * v_point * ITEM, c,
                            peek(params, UT) + u * ITEM, c, m + f * m_point * ITEM,
                            WIDTH_T, WIDTH_T, 0, 0, 0,
                        )  # fmt: skip
                    for r in range(count):
                        at = (done + r) % slots * row + pad_w * step + p * WIDTH_T
                        frames_out(
                            DTYPE, TIME, VECTORS_T, m + r * w * WIDTH_T * ITEM, m_point, w,
                            ring + at * ITEM, slots * row, step,
                            peek(params, BIAS_T) + p * WIDTH_T * ITEM, peek(params, ACT_T),
                        )  # fmt: skip
                done += count
            for f in range(min(M_TIME, ot - tile)):
                for r in range(0, rows, M_HIGH):
                    for i in range(ALPHA_HIGH):
                        at = top + r - pad_h + i
                        source = ring + ((f * slots + at % slots) * row) * ITEM
                        poke(inputs, i, source if 0 <= at < h else zero_row)
                    depthwise_rows(
                        DTYPE, SPACE, inputs, channels, step, peek(params, UD),
                        peek(params, BIAS_D), peek(params, ACT_D),
                        rows_out + r * ow * channels * ITEM, ow * channels, channels, rows - r, ow,
                    )  # fmt: skip
                pixel = ((image * ot + tile + f) * oh + top) * ow
                for p in range(peek(params, PANELS_P)):
                    gemm_rows(
                        DTYPE, ROWS_P, VECTORS_P, "", rows * ow, rows_out, channels,
                        peek(params, UP) + p * middle * WIDTH_P * ITEM, middle, sums,
                        WIDTH_P, WIDTH_P, 0, 0, 0,
                    )  # fmt: skip
                    at = (pixel * k + p * WIDTH_P) * ITEM
                    finish_rows(
                        DTYPE, VECTORS_P, sums, rows * ow, peek(params, Y) + at, k,
                        min(k - p * WIDTH_P, WIDTH_P), peek(params, BIAS_P) + p * WIDTH_P * ITEM,
                        residual + at * (residual != 0), peek(params, ACT_P),
                    )  # fmt: skip

    return kernel


def run(plan, x, packed, biases, residual, y, workspace) -> None:
    """Write the block of x, each stage with its epilogue, to y.

    x         (N, C, T, H, W)
    packed    what `prepack` returned for the same plan
    biases    three entries, (M,), (M,), (K,) or None
    residual  (N, K, OT, OH, OW) or None, added in the last epilogue
    y         (N, K, OT, OH, OW), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to conv3d (M, C, KT, 1, 1), conv3d (M, 1, 1, KH, KW) with groups = M,
    conv3d (K, M, 1, 1, 1) in sequence.
    """
    if not y.size:
        return
    views = channels_last_views(plan, x, residual, y, workspace)
    temporal, _, pointwise = plan.geometry.stages
    params = _params(plan, packed, biases, views)
    time, high, wide = plan.transforms
    (vectors_t, width_t, _), (vectors_p, width_p, _) = (
        _panel(stage.out_channels, plan.dtype) for stage in (temporal, pointwise)
    )
    compiled = kernel(
        _hfa_kernel, plan.dtype, x.itemsize, spec_of((time,)), spec_of((high, wide)),
        time.m, time.alpha, high.m, high.alpha, high.r,
        block_rows(vectors_t), vectors_t, width_t, block_rows(vectors_p), vectors_p, width_p,
    )  # fmt: skip
    tiles = temporal.batch * -(-temporal.out_size[0] // time.m)
    parallel_for(compiled, params, tiles * params[STRIPS])
    views.finish()


def _params(plan: Plan, packed: Packed, biases, views) -> list[int]:
    """The parameter block for one call."""
    geometry, cut, item = plan.geometry, _cut(plan, threads()), views.x.itemsize
    temporal, depthwise, pointwise = geometry.stages
    scratch, *shifts, _ = pieces(views.workspace, _pieces(plan))
    for shift, bias in zip(shifts, biases, strict=True):
        shift[...] = 0
        if bias is not None:
            shift[: len(bias)] = bias
    params = [0] * FIELDS
    params[X], params[Y], params[RESIDUAL] = map(address, (views.x, views.y, views.residual))
    params[UT], params[UD], params[UP] = map(
        address, (packed.temporal, packed.depthwise, packed.pointwise)
    )
    params[BIAS_T : BIAS_P + 1] = map(address, shifts)
    params[ACT_T : ACT_P + 1] = map(activation_number, plan.epilogue)
    offsets = [0, *np.cumsum(cut.parts).tolist()]
    params[SCRATCH], params[THREAD_STEP] = address(scratch), offsets[-1] * item
    params[ZERO_ROW : TABLES + 1] = [offset * item for offset in offsets[1:-1]]
    params[V_POINT : M_POINT + 1] = cut.v_point, cut.m_point
    params[T : C + 1] = *temporal.in_size, temporal.in_channels
    params[OT : K + 1] = *pointwise.out_size, pointwise.out_channels
    params[MIDDLE], params[COLUMNS_D] = temporal.out_channels, packed.depthwise.shape[1]
    params[COLUMNS_T] = packed.temporal.shape[1] * packed.temporal.shape[3]
    params[PANELS_T], params[PANELS_P] = packed.temporal.shape[1], packed.pointwise.shape[0]
    params[PAD_T], params[PAD_H] = temporal.padding[0][0], depthwise.padding[1][0]
    params[PAD_W] = depthwise.padding[2][0]
    params[ROWS], params[STRIPS] = cut.rows, cut.strips
    params[RING_ROWS], params[ROW_COLUMNS] = cut.ring_rows, cut.row_columns
    return params
