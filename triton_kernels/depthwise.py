"""Depthwise convolution: lanes are tiles of outputs, a program walks along time."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import launch
from .depthwise_launch import Pass, kernel_launch

# What `depthwise_launch.blocks` and `structure` choose themselves where an entry is silent.
CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"vector": 4},
    {"vector": 4, "rows": 1, "columns": 1},
    {"vector": 2, "rows": 4, "columns": 2},
    {"rows": 4, "columns": 1},
    {"rows": 7, "columns": 1},
    {"elements": 2},
    {"warps": 8},
)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if not geometry.is_depthwise:
        return f"not depthwise: {geometry.groups} groups for {geometry.in_channels} input channels"
    return launch.refuse_dtype(dtype)


def prepack(weights: Any, plan: Plan) -> torch.Tensor:
    """w (K, 1, *kernel) as (taps, K) for channels that lie next to each other, else (K, taps)."""
    w = launch.on_device(weights, plan).reshape(plan.geometry.out_channels, -1)
    return (w.t() if plan.layout == CHANNELS_LAST else w).contiguous()


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return 0


@lru_cache(maxsize=4096)
def launches(plan: Plan) -> tuple[launch.Launch, ...]:
    """The kernel start of `run`; none for an empty result."""
    g = plan.geometry
    if not prod(g.y_shape):
        return ()
    return (
        kernel_launch(Pass(plan, options=plan.options), ("x", "packed", "bias", "residual", "y")),
    )


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the depthwise convolution of x, and its epilogue, to y.

    x         (N, C, *in_size)
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_size) or None
    y         (N, K, *out_size), written

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups=C)`.
    """
    arrays = {"x": x, "packed": packed, "bias": bias, "residual": residual, "y": y}
    with launch.device_of(x):
        for start in launches(plan):
            start(arrays)
