"""The hybrid fast algorithm of a separable block: F(m1, K) in time, F(m2 x m2, R x R) in space.

The temporal stage is a dense Winograd convolution along T; the depthwise stage multiplies point by
point without a sum over channels; the pointwise stage stays direct. Stages follow each other per
tile in fast backends, here as a whole.
"""

from __future__ import annotations

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry, SeparableGeometry
from ..plan import Plan
from ..transforms import Transform, transform
from . import direct, winograd

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(
    geometry: SeparableGeometry, dtype: str, epilogue: tuple[Epilogue, Epilogue, Epilogue]
) -> str | None:
    """None, or the reason against."""
    return direct.refuse_dtype(dtype)


def stage_transforms(
    transforms: tuple[Transform, ...],
) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
    """The (T, H, W) transforms of the temporal and the depthwise stage, F(1, 1) on one-tap axes."""
    one = transform(1, 1)
    return (transforms[0], one, one), (one, transforms[1], transforms[2])


def prepack(
    weights: tuple[np.ndarray, np.ndarray, np.ndarray], plan: Plan
) -> tuple[np.ndarray, ...]:
    """U of the temporal and depthwise weights; the pointwise ones as they are, (K, M).

    weights: (M, C, KT, 1, 1), (M, 1, 1, KH, KW) and (K, M, 1, 1, 1)
    """
    wt, wd, wp = map(direct.exact, weights)
    in_time, in_space = stage_transforms(plan.transforms)
    geometry = plan.geometry
    return (
        winograd.filter_transform(wt, in_time, geometry.temporal),
        winograd.filter_transform(wd, in_space, geometry.depthwise),
        wp[:, :, 0, 0, 0],
    )


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return 0


def multiply_depthwise(u: np.ndarray, v: np.ndarray, geometry: Geometry) -> np.ndarray:
    """M = sum over phases of U V, channel by channel.

    u (S, M, 1, *alpha), v (S, N, M, *tiles, *alpha), returns (N, M, *tiles, *alpha).
    """
    grid = u[:, None, :, 0].reshape(u.shape[0], 1, u.shape[1], *(1,) * geometry.n, *u.shape[3:])
    parts = list(grid * v)
    return sum(parts[1:], parts[0])


def run(plan, x, packed, biases, residual, y, workspace) -> None:
    """Write the block of x, each stage with its epilogue, to y.

    x         (N, C, T, H, W)
    packed    what `prepack` returned for the same plan
    biases    three entries, (M,), (M,), (K,) or None
    residual  (N, K, OT, OH, OW) or None, added in the last epilogue
    y         (N, K, OT, OH, OW), written

    Equivalent to three `F.conv3d` in sequence: weights (M, C, KT, 1, 1), then (M, 1, 1, KH, KW)
    with groups = M, then (K, M, 1, 1, 1).
    """
    geometry = plan.geometry
    in_time, in_space = stage_transforms(plan.transforms)
    ut, ud, wp = packed
    v = winograd.input_transform(direct.exact(x), in_time, geometry.temporal)
    z = winograd.output_transform(winograd.multiply(ut, v, 3), in_time, geometry.temporal)
    z = direct.finish(z, biases[0], None, plan.epilogue[0])
    v = winograd.input_transform(z, in_space, geometry.depthwise)
    m = multiply_depthwise(ud, v, geometry.depthwise)
    z = winograd.output_transform(m, in_space, geometry.depthwise)
    z = direct.finish(z, biases[1], None, plan.epilogue[1])
    y[...] = direct.finish(direct.contract(wp, z), biases[2], residual, plan.epilogue[2])
