"""Grouped convolution, dense included (one group): the form that suits the channels per group."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import dense, strips
from .layout import channels_last_views, pieces_size, views_size

CONFIGS: tuple[dict[str, int], ...] = ({},)
DTYPES = ("float32", "float64")


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return None if dtype in DTYPES else f"dtype {dtype} is not one of {', '.join(DTYPES)}"


@functools.lru_cache(maxsize=256)
def _form(plan: Plan) -> Any:
    """The module that computes a plan: the one with fewer cycles by its own count.

    On one thread, because weights stay packed when the number of threads changes.
    """
    pixels_in_lanes = strips.cycles(strips.cut(plan, workers=1), workers=1)
    return strips if pixels_in_lanes < dense.cycles(plan) else dense


def prepack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, C / G, *kernel) in the order in which the kernel reads it."""
    return _form(plan).pack(weights, plan)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return views_size(plan) + pieces_size([_form(plan).scratch_size(plan)], plan.dtype)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x with the packed weights, and its epilogue, to y.

    x         (N, C, *in_size)
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_size) or None
    y         (N, K, *out_size), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups)`.
    """
    if not y.size:
        return
    views = channels_last_views(plan, x, residual, y, workspace)
    _form(plan).run(plan, packed, bias, views)
    views.finish()
