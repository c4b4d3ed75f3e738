"""F(m, r) of several groups (csrc/winograd_lanes.h): output pixels in lanes, rows of W direct."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..geometry import Geometry
from ..plan import Plan
from ..transforms import Transform, apply_along, transform
from . import grouped, launch, strips
from .strips import Strips


def refuses_geometry(geometry: Geometry) -> str | None:
    """None, or the reason against a geometry of several groups."""
    outputs = geometry.out_channels // geometry.groups
    if geometry.is_depthwise:
        return "winograd with one input channel per group has no kernel"
    if outputs > grouped.MOST_OUTPUTS:
        return (
            f"winograd with several groups is for up to {grouped.MOST_OUTPUTS} output channels "
            f"per group, not {outputs}"
        )
    if max(geometry.stride) > 1:
        return f"winograd with several groups is for stride 1, not {geometry.stride}"
    if max(geometry.kernel[:-1], default=1) == 1:
        return "winograd with several groups sums the last axis directly; no other has taps"
    return None


def refuses(plan: Plan) -> str | None:
    """None, or the reason against the tile of a plan with several groups."""
    assert isinstance(plan.geometry, Geometry)
    if plan.tile[-1] > 1:
        return f"with several groups the last axis has tile 1, not {plan.tile[-1]}"
    if plan.config:
        return f"with several groups there is nothing to configure, got {plan.options}"
    if max(t.m for t in _transforms(plan)) == 1:
        return "with several groups a tile of ones is the direct sum"
    return None


def _transforms(plan: Plan) -> tuple[Transform, ...]:
    """Of three axes, where a kernel of one tap has no tiles."""
    front = (transform(1, 1),) * (3 - len(plan.transforms))
    return front + tuple(t if t.r > 1 else transform(1, 1) for t in plan.transforms)


@lru_cache(maxsize=1024)
def _cut(plan: Plan, lanes: int) -> Strips:
    assert isinstance(plan.geometry, Geometry)
    time, down, _ = _transforms(plan)
    return strips.cut(plan.geometry, lanes, (time.m, down.m))


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return launch.workspace_elements(plan, 0, _cut(plan, launch.lanes()).each)


def prepack(weights: np.ndarray, plan: Plan) -> launch.Packed:
    """U = G g along T and H, computed in float64 and rounded once, in the order of `strips.pack`
    with points in front of taps."""
    cut = _cut(plan, launch.lanes())
    u = np.reshape(weights, cut.geometry.w_shape).astype(np.float64)
    for axis, t in enumerate(_transforms(plan), 2):
        u = apply_along(t.filter_program, u, axis)
    if cut.tile[0] == 1:
        u = u.swapaxes(2, 3)
    lanes, keep = grouped.parameters(plan, cut)
    params = launch.ffi.new("fc_winograd *", {"lanes": lanes})
    return launch.Packed(plan, strips.pack(u, cut), params, each=cut.each, keep=(lanes, keep))
