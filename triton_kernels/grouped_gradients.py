"""Gradients of the grouped convolution, from the plan of the convolution itself.

The input gradient is the gather of `grouped_gather`, made by the forward kernels from weights that
are packed on the way; the weight gradient is in `grouped_weights` and, for few channels per group,
in `grouped_weight_frames`. Both are the same bits each time.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import grouped, grouped_tiles, grouped_weight_frames, grouped_weights, launch
from .grouped_gather import Gather
from .launch import Launch


def supports(geometry: Geometry, dtype: str) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that either gradient needs as scratch."""
    size, _ = grouped.cut(Gather.backward(plan.geometry), plan).pack
    sums = _sums(plan)
    words = 1 if plan.dtype == "float32" else 2
    return max(size, words * sums.shares * sums.size)


@lru_cache(maxsize=4096)
def _sums(plan: Plan) -> grouped_weight_frames.WeightFrames | grouped_weights.WeightSums:
    precision = grouped_tiles.precision_of(plan)
    last = plan.layout == CHANNELS_LAST
    gather = Gather.forward(plan.geometry)
    few = max(gather.inputs, gather.outputs) < grouped.FEW and gather.taps > 1
    small = few and gather.kernel[0] <= grouped_weight_frames.MOST_SUMS
    module = grouped_weight_frames if small else grouped_weights
    return module.cut(gather, plan.dtype, last, precision, plan.config)


@lru_cache(maxsize=4096)
def launches_input(plan: Plan) -> tuple[Launch, ...]:
    """What `input_gradient` starts, on arrays w, packed, gy and gx."""
    gather = Gather.backward(plan.geometry)
    if not gather.pixels:
        return ()
    form = grouped.cut(gather, plan)
    return (form.pack[1], form.launch(Epilogue(), ("gy", "packed", "bias", "residual", "gx")))


def launches_weight(plan: Plan) -> tuple[Launch, ...]:
    """What `weight_gradient` starts, on arrays x, gy, sums (float32) and gw."""
    return _sums(plan).launches


def input_gradient(plan, gy, w, gx, workspace) -> None:
    """Write the gradient for the input.

    gy        (N, K, *out_size), dense in plan.layout
    w         (K, C / G, *kernel), contiguous
    gx        (N, C, *in_size), dense in plan.layout, written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to `torch.nn.grad.conv3d_input(gx.shape, w, gy, ...)`.
    """
    arrays = {"gy": gy, "w": w, "packed": workspace, "bias": None, "residual": None, "gx": gx}
    with launch.device_of(gy):
        for start in launches_input(plan):
            start(arrays)


def weight_gradient(plan, x, gy, gw, workspace) -> None:
    """Write the gradient for the weights.

    x         (N, C, *in_size), gy (N, K, *out_size), dense in plan.layout
    gw        (K, C / G, *kernel), contiguous, written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to `torch.nn.grad.conv3d_weight(x, w.shape, gy, ...)`.
    """
    sums = _sums(plan)
    words = 1 if plan.dtype == "float32" else 2
    scratch = workspace[: words * sums.shares * sums.size].view(torch.float32)
    with launch.device_of(x):
        for start in sums.launches:
            start({"x": x, "gy": gy, "gw": gw, "sums": scratch})
