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


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


@functools.lru_cache(maxsize=1024)
def _cut(geometry: Geometry, lanes: int) -> strips.Strips | products.Products:
    """The form of a geometry with fewer cycles by its own count."""
    rows = products.cut(geometry, lanes)
    if geometry.groups == 1:
        return rows
    pixels = strips.cut(geometry, lanes)
    return pixels if strips.cycles(pixels) < products.cycles(rows, lanes) else rows


def prepack(weights: np.ndarray, plan: Plan) -> Packed:
    """w (K, C / G, *kernel) in the order in which the kernel reads it."""
    lanes = launch.lanes()
    cut = _cut(plan.geometry, lanes)
    values = {
        "geometry": launch.c_geometry(cut.geometry),
        "activation": launch.activation_of(plan.epilogue),
        "each": launch.lines(cut.each),
    }
    if isinstance(cut, strips.Strips):
        fields, keep = cut.fields()
        values |= {"form": lib.FC_PIXEL_LANES, "lanes": fields, "work": int(strips.cycles(cut))}
        packed = strips.pack(weights, plan.geometry, lanes)
    else:
        keep = []
        values |= {
            "form": lib.FC_PIXEL_ROWS,
            "rows": cut.fields(),
            "work": int(products.cycles(cut, lanes)),
        }
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
