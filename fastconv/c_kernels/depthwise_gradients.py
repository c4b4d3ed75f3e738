"""Gradients of depthwise convolution: one tap of one channel at a time, channels in lanes."""

from __future__ import annotations

from ..geometry import Geometry
from . import gradients, launch
from .gradients import weight_gradient, workspace_size

__all__ = ["input_gradient", "supports", "weight_gradient", "workspace_size"]


def supports(geometry: Geometry, dtype: str) -> str | None:
    """None, or the reason against."""
    if not geometry.is_depthwise:
        return f"not depthwise: {geometry.groups} groups for {geometry.in_channels} input channels"
    if geometry.out_channels != geometry.in_channels:
        return f"a multiplier of {geometry.out_channels // geometry.in_channels} is not served"
    if geometry.taps // geometry.kernel[-1] > gradients.MOST_ROW_TAPS:
        return f"kernel {geometry.kernel} has too many rows of taps"
    return launch.refuse_dtype(dtype)


def input_gradient(plan, gy, w, gx, workspace) -> None:
    """Write the gradient of the input to gx (N, C, *in_size).

    plan      of the forward convolution
    gy        (N, C, *out_size);  w (C, 1, *kernel)
    workspace `workspace_size(plan)` elements, overwritten
    """
    gradients.depthwise_input_gradient(plan, gy, w, gx, workspace)
