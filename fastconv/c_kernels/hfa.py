"""The fully separable block in one pass, row by row: nothing of its inner stages leaves the cache.

The kernel is csrc/hfa.c; here is how a plan is cut for it, and how the weights are laid out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry, SeparableGeometry
from ..plan import Plan
from ..transforms import Transform, apply_along, transform
from . import launch
from .launch import Packed, ffi
from .panels import block_rows, pack_panels, panel_vectors

CONFIGS: tuple[dict[str, int], ...] = ({},)

# F(m, r) with compiled programs, in their order: csrc/build_ffi.py.
TILES, TAPS = range(1, 7), range(2, 8)
STEP_PIXELS = 224  # of output rows per step
CHUNK_PIXELS = 28  # of the temporal stage at a time
CHUNK_BYTES = 1 << 20  # of V
RING_BYTES, BAND_BYTES = 1 << 20, 4 << 20  # fewer rows, then bands of columns, beyond
LEAST_BAND = 28
DIRECT_TILES = (8, 7, 4)  # columns that the direct depthwise stage computes together


def supports(
    geometry: SeparableGeometry, dtype: str, epilogue: tuple[Epilogue, Epilogue, Epilogue]
) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


@dataclass(frozen=True)
class _Axis:
    """An axis of a stage: F(m, r) for each of `phases` interleaved inputs."""

    t: Transform
    phases: int

    @property
    def program(self) -> int:
        """Its index among the compiled ones, or -1."""
        m, r = self.t.m, self.t.r
        if m not in TILES or r not in TAPS or self.t != transform(m, r):
            return -1
        return (r - TAPS.start) * len(TILES) + m - TILES.start

    def filters(self, w: np.ndarray, stride: int) -> np.ndarray:
        """G g of the last axis of w: (..., taps) -> (..., phases, alpha)."""
        padded = np.zeros((*w.shape[:-1], self.t.r * stride))
        padded[..., : w.shape[-1]] = w
        by_phase = padded.reshape(*w.shape[:-1], self.t.r, stride)[..., : self.phases]
        return apply_along(self.t.filter_program, np.moveaxis(by_phase, -1, -2), w.ndim)


def _axis(t: Transform, geometry: Geometry, axis: int) -> _Axis:
    """Without a saving (one output, or one tap per phase) the axis is F(1, r)."""
    if t.m == 1 or t.r == 1:
        t = transform(1, t.r)
    return _Axis(t, min(geometry.stride[axis], geometry.kernel[axis]))


@dataclass(frozen=True)
class _Cut:
    """How a plan is cut, in the names of csrc/hfa.h; sizes in elements."""

    time: _Axis
    high: _Axis
    wide: _Axis
    fast: bool
    rows: int
    band: int
    tile: int
    window: tuple[int, int]
    channels: int
    slots: int
    columns: int
    chunk: int
    v_point: int
    m_point: int
    parts: tuple[int, ...]  # tables, ring, V, M, depthwise output, spare


def _whole(channels: int, lanes: int) -> int:
    return -(-channels // lanes) * lanes


@lru_cache(maxsize=256)
def _cut(plan: Plan, lanes: int) -> _Cut:
    temporal, depthwise, _ = plan.geometry.stages
    time = _axis(plan.transforms[0], temporal, 0)
    high, wide = (_axis(plan.transforms[i], depthwise, i) for i in (1, 2))
    fast = max(high.t.m, wide.t.m) > 1
    _, out_h, out_w = depthwise.out_size
    _, down, across = depthwise.stride
    in_w = depthwise.in_size[2]
    # What one tile of outputs reads: by phases and points, or the taps.
    window = tuple(
        (a.t.alpha - 1) * s + a.phases if fast else k
        for a, s, k in zip((high, wide), (down, across), depthwise.kernel[1:], strict=True)
    )
    tile = min(DIRECT_TILES, key=lambda c: (-(-out_w // c) * c, -c))
    if not fast:
        high, wide = (_Axis(transform(1, 1), 1) for _ in range(2))
    channels = _whole(temporal.out_channels, lanes)
    step = wide.t.m if fast else tile

    def ring_columns(band: int) -> int:
        needed = (-(-band // step) - 1) * step * across + window[1]
        needed += 0 if fast else (tile - 1) * across
        return max(needed, depthwise.padding[2][0] + in_w) if band == out_w else needed

    def ring_rows(rows: int) -> int:
        return (rows - high.t.m) * down + window[0]

    most_rows = _whole(min(-(-STEP_PIXELS // out_w), out_h), high.t.m)
    fitting = RING_BYTES // (time.t.m * ring_columns(out_w) * channels * 4)  # rows of the ring
    rows = high.t.m * max(1, min(most_rows, (fitting - window[0]) // down + high.t.m) // high.t.m)
    per_column = time.t.m * ring_rows(rows) * channels * 4
    most = max(LEAST_BAND, BAND_BYTES // (per_column * across))
    band = out_w if out_w <= most else _whole(-(-out_w // -(-out_w // most)), step)
    band = min(band, out_w)
    vectors = panel_vectors(temporal.out_channels)
    width, depth = vectors * lanes, time.phases * temporal.in_channels
    points = time.t.alpha if time.t.m > 1 else 1
    chunk = _chunk(points * depth, vectors)
    v_point = launch.lines(chunk * depth + lanes) + launch.LINE
    m_point = launch.lines(chunk * width) + launch.LINE
    parts = (
        2 * max(temporal.kernel[0], time.phases),
        time.t.m * ring_rows(rows) * ring_columns(band) * channels,
        points * v_point if time.t.m > 1 else 0,
        points * m_point,
        (rows * band + tile) * channels,
        3 * high.t.alpha * wide.t.alpha * lanes if fast else 0,
    )
    return _Cut(
        time, high, wide, fast, rows, band, tile, window, channels, ring_rows(rows),
        ring_columns(band), chunk, v_point, m_point, tuple(map(launch.lines, parts)),
    )  # fmt: skip


def _chunk(per_pixel: int, vectors: int) -> int:
    """Pixels whose V, of so many elements each, is kept at a time: whole register blocks."""
    block = block_rows(vectors)
    fitting = CHUNK_BYTES // (4 * per_pixel)
    return max(1, round(min(CHUNK_PIXELS, fitting) / block)) * block


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return launch.workspace_elements(plan, 0, sum(_cut(plan, launch.lanes()).parts))


def prepack(weights: tuple[np.ndarray, np.ndarray, np.ndarray], plan: Plan) -> Packed:
    """U = G g of the temporal (M, C, KT, 1, 1) and depthwise (M, 1, 1, KH, KW) weights, in panels.

    The pointwise weights (K, M, 1, 1, 1) stay what they are, in panels too.
    """
    lanes = launch.lanes()
    cut = _cut(plan, lanes)
    temporal, depthwise, pointwise = plan.geometry.stages
    wt, wd, wp = (np.asarray(w, np.float64) for w in weights)
    ut = wt[..., 0, 0].transpose(2, 1, 0)[None]  # (points, taps, C, M)
    if cut.time.t.m > 1:
        # (M, C, phases, alpha) -> (alpha, phases, C, M)
        ut = cut.time.filters(wt[..., 0, 0], temporal.stride[0]).transpose(3, 2, 1, 0)
    ud = wd[:, 0, 0].reshape(depthwise.out_channels, -1)
    if cut.fast:
        # (M, KH, KW) -> (M, KH, phases, alpha) -> (M, phases, alpha, phases, alpha)
        _, down, across = depthwise.stride
        ud = np.moveaxis(cut.wide.filters(wd[:, 0, 0], across), 1, -1)
        ud = cut.high.filters(ud, down).transpose(0, 3, 1, 4, 2).reshape(len(ud), -1)
    padded = np.zeros((ud.shape[1], cut.channels), np.float32)
    padded[:, : len(ud)] = ud.T
    vectors = [panel_vectors(g.out_channels) for g in (temporal, pointwise)]
    parts = pack_panels(ut, vectors[0]), padded, pack_panels(wp[:, :, 0, 0, 0].T, vectors[1])
    starts = list(accumulate((launch.lines(p.size) for p in parts), initial=0))
    # Products ask for the panel behind the last one.
    packed = launch.aligned(starts[-1] + parts[2][0].size)
    for start, part in zip(starts, parts, strict=False):
        packed[start : start + part.size] = part.ravel()
    keep: list[Any] = []
    params = ffi.new("fc_hfa *", _params(plan, cut, vectors, starts, keep))
    return Packed(plan, packed, params, 0, sum(cut.parts), keep)


def _params(
    plan: Plan, cut: _Cut, vectors: list[int], starts: list[int], keep: list[Any]
) -> dict[str, Any]:
    """An initialiser of fc_hfa; what it points to goes to `keep`."""

    def matrix(rows: tuple[tuple[Any, ...], ...]) -> Any:
        keep.append(ffi.new("float[]", [float(c) for row in rows for c in row]))
        return keep[-1]

    def axis(a: _Axis) -> dict[str, Any]:
        return {
            "outputs": a.t.m,
            "alpha": a.t.alpha,
            "phases": a.phases,
            "program": a.program,
            "bt": matrix(a.t.BT),
            "at": matrix(a.t.AT),
        }

    names = ("tables", "ring", "v", "m", "d", "spare")
    same = ("fast", "rows", "band", "tile", "window", "channels", "slots", "columns", "chunk")
    temporal, depthwise, pointwise = stages = plan.geometry.stages
    products = cut.time.t.alpha * temporal.in_channels * temporal.out_channels
    return {
        **{name: launch.c_geometry(g) for name, g in zip(_STAGES, stages, strict=True)},
        **{name: axis(getattr(cut, name)) for name in ("time", "high", "wide")},
        **{name: getattr(cut, name) for name in (*same, "v_point", "m_point")},
        **dict(zip(names, accumulate(cut.parts, initial=0), strict=False)),
        "each": sum(cut.parts),
        "activation": [launch.activation_of(e) for e in plan.epilogue],
        "vectors_t": vectors[0],
        "vectors_p": vectors[1],
        "depthwise_at": starts[1],
        "pointwise_at": starts[2],
        "row_cost": [
            products * temporal.in_size[2],
            cut.time.t.m * pointwise.in_channels * pointwise.out_channels * depthwise.out_size[2],
        ],
    }


_STAGES = ("temporal", "depthwise", "pointwise")


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
    packed.run(x, biases, residual, y, workspace)
