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
from typing import NamedTuple

import numpy as np

from ..epilogue import Epilogue
from ..geometry import SeparableGeometry
from ..plan import Plan
from ..transforms import apply_along
from .emit import LINE_BYTES
from .finish import activation_number
from .gemm import block_rows, pack_panels, panel_vectors
from .hfa_stages import COLUMNS, hfa_kernel
from .layout import channels_last_views, pieces, pieces_size, views_size
from .simd import Kernel, address, kernel, parallel_for, threads, vector_width
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
    parts: tuple[
        int, ...
    ]  # of one thread: ring, zero row, V, M, depthwise output, pointwise sums, tables


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
    channels = _whole(temporal.out_channels, plan.dtype)
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
    line = LINE_BYTES // item
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


class Packed(NamedTuple):
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
    scratch, *shifts, _ = pieces(views.workspace, _pieces(plan))
    for shift, bias in zip(shifts, biases, strict=True):
        shift[...] = 0
        if bias is not None:
            shift[: bias.size] = bias
    compiled, known, items = _prepared(plan, threads())
    arrays = (views.x, views.y, views.residual, *packed, scratch, *shifts)
    parallel_for(compiled, (*map(address, arrays), *known), items)
    views.finish()


@functools.lru_cache(maxsize=256)
def _prepared(plan: Plan, workers: int) -> tuple[Kernel, tuple[int, ...], int]:
    """The kernel, its parameters behind the addresses of the call, and the number of items."""
    cut, item = _cut(plan, workers), np.dtype(plan.dtype).itemsize
    temporal, depthwise, pointwise = plan.geometry.stages
    time, high, wide = plan.transforms
    vectors_t, width_t, columns = _panel(temporal.out_channels, plan.dtype)
    vectors_p, width_p, last_columns = _panel(pointwise.out_channels, plan.dtype)
    compiled = kernel(
        hfa_kernel, plan.dtype, item, spec_of((time,)), spec_of((high, wide)),
        time.m, time.alpha, high.m, high.alpha, high.r,
        block_rows(vectors_t), vectors_t, width_t, block_rows(vectors_p), vectors_p, width_p,
    )  # fmt: skip
    known = (
        *map(activation_number, plan.epilogue),
        *(item * sum(cut.parts[: n + 1]) for n in range(len(cut.parts))), cut.v_point, cut.m_point,
        *temporal.in_size, temporal.in_channels, *pointwise.out_size, pointwise.out_channels,
        temporal.out_channels, columns, _whole(temporal.out_channels, plan.dtype),
        columns // width_t, last_columns // width_p,
        temporal.padding[0][0], depthwise.padding[1][0], depthwise.padding[2][0],
        cut.rows, cut.strips, cut.ring_rows, cut.row_columns,
    )  # fmt: skip
    tiles = temporal.batch * -(-temporal.out_size[0] // time.m)
    return compiled, known, tiles * cut.strips
