"""Depthwise convolution: along one axis by lines, otherwise by tiles of outputs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import depthwise_lines, depthwise_tiles
from .layout import channels_last_views, pieces_size, views_size

# unrolled: 1 to compile for these taps, 0 for loops over the taps, absent to decide by the size;
# rows, cols: outputs of a tile with unrolled taps.
CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"unrolled": 0},
    {"unrolled": 1, "rows": 1},
    {"unrolled": 1, "rows": 3},
    {"unrolled": 1, "cols": 8},
    {"unrolled": 1, "cols": 10},
)
DTYPES = ("float32", "float64")


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if not geometry.is_depthwise:
        return f"not depthwise: {geometry.groups} groups for {geometry.in_channels} input channels"
    return None if dtype in DTYPES else f"dtype {dtype} is not one of {', '.join(DTYPES)}"


@functools.lru_cache(maxsize=256)
def _form(plan: Plan) -> Any:
    """The module that computes a plan."""
    geometry = plan.geometry.lifted()
    worth = plan.options.get("unrolled", geometry.macs >= depthwise_tiles.UNROLLED_MACS)
    return depthwise_lines if worth and depthwise_lines.suits(geometry) else depthwise_tiles


def takes_frames(plan: Plan) -> bool:
    """Whether `run_frames` can compute a plan."""
    is_form = _form(plan) is depthwise_tiles and plan.layout == CHANNELS_LAST
    return is_form and plan.geometry.n == 3  # fewer axes: the first is not that of frames


def run_frames(plan, frames, packed, bias, residual, y) -> None:
    """`run` for a clip of one column along T whose frames lie anywhere.

    frames (N, KT): addresses of frames (*frame, C) in C order, on which this function relies
    y, residual     (N, K, *out_frame), channels last
    """
    depthwise_tiles.run(plan, None, packed, bias, residual, y, None, frames)


def prepack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, 1, *kernel) in the order in which the kernel reads it."""
    return _form(plan).pack(weights, plan)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return views_size(plan) + pieces_size([_form(plan).scratch_size(plan)], plan.dtype)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the depthwise convolution of x, and its epilogue, to y.

    x         (N, C, *in_size)
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_size) or None
    y         (N, K, *out_size), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups=C)`.
    """
    views = channels_last_views(plan, x, residual, y, workspace)
    _form(plan).run(plan, views.x, packed, bias, views.residual, views.y, views.workspace)
    views.finish()
