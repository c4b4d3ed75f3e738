"""Minimal filtering F(m, r) per axis in C; a strided axis by the polyphase split.

Tiles go through three stages (Lavin and Gray 2016, section 4.1): V = BT d for every channel,
M = V U as one matrix product per point, y = AT M with the epilogue. A thread takes a block of few
tiles through all of them ("fused"), or all threads go through one stage after the other ("phased");
csrc/winograd.c. What follows from the plan is worked out here.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np

from ..epilogue import Epilogue
from ..errors import UnsupportedError
from ..geometry import Geometry
from ..plan import Plan
from ..transforms import apply_along, transform
from . import launch, winograd_lanes
from .winograd_schedule import Schedule

CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"tiles": 14},
    {"tiles": 28},
    {"tiles": 56},
    {"phased": 1},
)

# Of the compiled programs: F(m, r) in csrc/programs.h.
MOST_OUTPUTS, MOST_TAPS = 6, 7


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if geometry.groups > 1 and (reason := winograd_lanes.refuses_geometry(geometry)):
        return reason
    if any(d != 1 for d in geometry.dilation):
        return f"winograd is for dilation 1, not {geometry.dilation}"
    taps = _taps(geometry)
    if max(taps) == 1:
        return f"no axis of kernel {geometry.kernel} has more than one tap per phase"
    if max(taps) > MOST_TAPS:
        return (
            f"kernel {geometry.kernel} has more than {MOST_TAPS} taps per phase on an axis, for "
            "which no transform is compiled"
        )
    return launch.refuse_dtype(dtype)


def _taps(geometry: Geometry) -> list[int]:
    """Taps per phase of the polyphase split."""
    return [-(-k // s) for k, s in zip(geometry.kernel, geometry.stride, strict=True)]


def refuses(plan: Plan) -> str | None:
    """None, or the reason against the transforms of a plan: they are compiled beforehand."""
    if plan.geometry.groups > 1 and (reason := winograd_lanes.refuses(plan)):
        return reason
    for t in plan.transforms:
        if t.r == 1:
            continue
        if t.m > MOST_OUTPUTS or t.r > MOST_TAPS:
            return (
                f"F({t.m}, {t.r}) is not compiled; it has F(m, r) for "
                f"m up to {MOST_OUTPUTS} and r up to {MOST_TAPS}"
            )
        if t != transform(t.m, t.r):
            points = ", ".join(map(str, t.points))
            return f"F({t.m}, {t.r}) is compiled for the default points only, not for {points}"
    return None


@lru_cache(maxsize=4096)
def _sizes(plan: Plan, lanes: int) -> tuple[int, int]:
    schedule = Schedule(plan, lanes)
    return schedule.shared, schedule.each


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch, with as many threads as now at most."""
    if plan.geometry.groups > 1:
        return winograd_lanes.workspace_size(plan)
    return launch.workspace_elements(plan, *_sizes(plan, launch.lanes()))


def prepack(weights: np.ndarray, plan: Plan) -> launch.Packed:
    """U = G g along every axis, computed in float64 and rounded once: (panels, points,
    phases * channels, width), or with points first if phased; for several groups as in
    `winograd_lanes`.

    Raises UnsupportedError for transforms that are not compiled: other than the default points, or
    more outputs or taps than the largest.
    """
    reason = refuses(plan)
    if reason is not None:
        raise UnsupportedError(f"winograd on the C backend: {reason}")
    if plan.geometry.groups > 1:
        return winograd_lanes.prepack(weights, plan)
    schedule = Schedule(plan, launch.lanes())
    w = np.reshape(weights, schedule.geometry.lifted().w_shape)
    # A product more behind the last: products ask for what follows the one they use.
    points, panels, chunk = schedule.points, schedule.panels, schedule.depth * schedule.width
    outer = (points, panels) if schedule.phased else (panels, points)
    store = launch.aligned((prod(outer) + 1) * chunk)
    u = store[:-chunk].reshape(*outer, schedule.depth, schedule.width)
    by_panel = u.swapaxes(0, 1) if schedule.phased else u
    for panel in range(panels):
        part = w[panel * schedule.width : (panel + 1) * schedule.width]
        by_panel[panel, :, :, : part.shape[0]] = _transformed(part, schedule)
    params = launch.ffi.new("fc_winograd *", schedule.params(plan))
    return launch.Packed(plan, store, params, schedule.shared, schedule.each)


def _transformed(w: np.ndarray, schedule: Schedule) -> np.ndarray:
    """w (K, C, T, H, W) -> U (points, phases * C, K) in float64; phases run as the axes do."""
    w = w.astype(np.float64).transpose(1, 0, *(2 + axis for axis in schedule.axes))
    found = []
    for phase in np.ndindex(*schedule.phases):
        taps = tuple(slice(p, None, s) for p, s in zip(phase, schedule.split, strict=True))
        part = w[(slice(None), slice(None), *taps)]
        for axis, t in enumerate(schedule.transforms, 2):
            missing = [(0, 0)] * 5
            missing[axis] = (0, t.r - part.shape[axis])
            part = apply_along(t.filter_program, np.pad(part, missing), axis)
        found.append(part.reshape(*part.shape[:2], -1).transpose(2, 0, 1))
    return np.concatenate(found, axis=1)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x by F(m, r) on every axis, and its epilogue, to y.

    x (N, C, *in_size), packed from `prepack` for the same plan, bias (K,) or None,
    residual (N, K, *out_size) or None, y (N, K, *out_size) written; memory as plan.layout says.
    plan.transforms has one F(m, ceil(kernel / stride)) per axis.

    Equivalent to `F.conv3d(x, w, bias, stride, padding, groups=groups)`.
    """
    packed.run(x, bias, residual, y, workspace)
