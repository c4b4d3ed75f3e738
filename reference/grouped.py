"""Grouped convolution, dense included (one group): the definition itself."""

from __future__ import annotations

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import direct

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return direct.refuse_dtype(dtype)


def prepack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, C / G, *kernel) in float64."""
    return direct.exact(weights)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return 0


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x with the packed weights, and its epilogue, to y.

    x         (N, C, *in_size)
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_size) or None
    y         (N, K, *out_size), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups)` for any number of
    groups, one included.
    """
    y[...] = direct.finish(
        direct.correlate(x, packed, plan.geometry), bias, residual, plan.epilogue
    )
