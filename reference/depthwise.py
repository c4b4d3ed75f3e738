"""Depthwise convolution: no sum over channels, every output channel reads one input channel."""

from __future__ import annotations

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import direct

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if not geometry.is_depthwise:
        return f"not depthwise: {geometry.groups} groups for {geometry.in_channels} input channels"
    return direct.refuse_dtype(dtype)


def prepack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, 1, *kernel) in float64."""
    return direct.exact(weights)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return 0


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the depthwise convolution of x, and its epilogue, to y.

    x (N, C, *in_size), packed w (K, 1, *kernel) with K a multiple of C, bias (K,) or None,
    residual (N, K, *out_size) or None, y (N, K, *out_size) written.

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups=C)`.
    """
    geometry = plan.geometry
    # Output channel k reads input channel k // multiplier.
    multiplier = geometry.out_channels // geometry.in_channels
    padded = np.repeat(direct.pad(direct.exact(x), geometry), multiplier, axis=1)
    per_channel = (-1, *(1,) * geometry.n)
    parts = [
        view * packed[(slice(None), 0, *tap)].reshape(per_channel)
        for tap, view in direct.taps(padded, geometry)
    ]
    y[...] = direct.finish(sum(parts[1:], parts[0]), bias, residual, plan.epilogue)
