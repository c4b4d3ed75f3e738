"""Grouped convolution, dense and pointwise included: the form that suits the channels per group."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import grouped_frames, grouped_lanes, grouped_tiles, launch
from .grouped_gather import Gather
from .launch import Launch

TILES, LANES, FRAMES = 0, 1, 2  # values of the option 'form'
CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"form": TILES},
    {"form": TILES, "pixels": 64},
    {"form": TILES, "outputs": 64},
    {"form": TILES, "ieee": 1},
    {"form": LANES},
    {"form": LANES, "times": 2},
    {"form": LANES, "times": 8, "held": 2},
    {"form": LANES, "lanes": 128},
    {"form": FRAMES},
    {"form": FRAMES, "pixels": 128},
    {"form": FRAMES, "stages": 1},
)
FEW = 17  # channels per group below which tiles waste tensor cores
BUSY = 1 << 18  # outputs from which the other forms are worth it


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


Form = grouped_lanes.Lanes | grouped_frames.Frames | grouped_tiles.Tiles


@lru_cache(maxsize=4096)
def cut(gather: Gather, plan: Plan) -> Form:
    """How a plan's convolution, or its input gradient, is cut."""
    last = plan.layout == CHANNELS_LAST
    form = _form(gather, plan)
    if form == LANES:
        return grouped_lanes.cut(gather, last, plan.config)
    precision = grouped_tiles.precision_of(plan)
    module = grouped_frames if form == FRAMES else grouped_tiles
    return module.cut(gather, plan.dtype, last, precision, plan.config)


def _form(gather: Gather, plan: Plan) -> int:
    """TILES for many channels, fractions or little to do; else tensor cores in half precision."""
    wanted = plan.options.get("form")
    few = max(gather.inputs, gather.outputs) < FEW and gather.taps > 1
    if not few or max(gather.divisor) > 1 or wanted == TILES:
        return TILES
    if wanted is not None:
        return wanted
    if gather.pixels * gather.out_channels < BUSY:
        return TILES
    return LANES if plan.dtype == "float32" and plan.precision == "ieee" else FRAMES


def prepack(weights: Any, plan: Plan) -> torch.Tensor:
    """w (K, C / G, *kernel) in the order in which the kernel reads it."""
    w = launch.on_device(weights, plan).contiguous()
    size, start = cut(Gather.forward(plan.geometry), plan).pack
    packed = torch.empty(size, dtype=w.dtype, device=w.device)
    with launch.device_of(w):
        start({"w": w, "packed": packed})
    return packed


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return 0


@lru_cache(maxsize=4096)
def launches(plan: Plan) -> tuple[Launch, ...]:
    """What `run` starts."""
    form = cut(Gather.forward(plan.geometry), plan)
    return (form.launch(plan.epilogue, ("x", "packed", "bias", "residual", "y")),)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x with the packed weights, and its epilogue, to y.

    x         (N, C, *in_size)
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_size) or None
    y         (N, K, *out_size), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups)`.
    """
    arrays = {"x": x, "packed": packed, "bias": bias, "residual": residual, "y": y}
    with launch.device_of(x):
        for start in launches(plan):
            start(arrays)
