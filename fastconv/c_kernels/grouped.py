"""Grouped convolution, dense included (one group): the form that suits the channels per group."""

from __future__ import annotations

import functools

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import launch, products, strips
from .launch import Packed, ffi, lib

CONFIGS: tuple[dict[str, int], ...] = ({},)
MOST_OUTPUTS = 64  # of a group that pixels in lanes are considered for


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


@functools.lru_cache(maxsize=1024)
def _cut(geometry: Geometry, lanes: int) -> strips.Strips | products.Products:
    """The form of a geometry with fewer cycles by its own count."""
    rows = products.cut(geometry, lanes)
    if geometry.out_channels // geometry.groups > MOST_OUTPUTS:
        return rows
    pixels = strips.cut(geometry, lanes)
    return pixels if _cycles(pixels) < _cycles(rows) else rows


def _cycles(cut: strips.Strips | products.Products) -> int:
    """Of one call on one thread, roughly."""
    module = strips if isinstance(cut, strips.Strips) else products
    return int(module.cycles(cut))


def prepack(weights: np.ndarray, plan: Plan) -> Packed:
    """w (K, C / G, *kernel) in the order in which the kernel reads it."""
    cut = _cut(plan.geometry, launch.lanes())
    values = {
        "geometry": launch.c_geometry(cut.geometry),
        "activation": launch.activation_of(plan.epilogue),
        "work": _cycles(cut),
        "each": launch.lines(cut.each),
    }
    if isinstance(cut, strips.Strips):
        fields, keep = cut.fields()
        values |= {"form": lib.FC_PIXEL_LANES, "lanes": fields}
        packed = strips.pack(weights, cut)
    else:
        keep = []
        values |= {"form": lib.FC_PIXEL_ROWS, "rows": cut.fields()}
        packed = products.pack(weights, cut)
    params = ffi.new("fc_grouped *", values)
    return Packed(plan, packed, params, each=cut.each, keep=keep)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return launch.workspace_elements(plan, 0, _cut(plan.geometry, launch.lanes()).each)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x with the packed weights, and its epilogue, to y.

    x         (N, C, *in_size)
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_size) or None
    y         (N, K, *out_size), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups)`.
    """
    packed.run(x, bias, residual, y, workspace)
