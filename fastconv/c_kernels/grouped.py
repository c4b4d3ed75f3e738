"""Grouped convolution, dense included (one group): the form that suits the channels per group."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from ..epilogue import ACTIVATIONS, Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import launch, products, strips
from .launch import Packed, ffi, lib

CONFIGS: tuple[dict[str, int], ...] = ({},)
MOST_OUTPUTS = 64  # of a group that pixels in lanes are considered for
COLUMNS = {1: 1024, 3: 16}  # of the clip that stands for all of its kind, by its axes


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


@functools.lru_cache(maxsize=1024)
def _cut(
    geometry: Geometry, lanes: int, clip: Geometry | None = None
) -> strips.Strips | products.Products:
    """How a geometry is cut, in the form of its clip's kind; it may be that clip itself."""
    cut: strips.Strips | products.Products = _form(_kind(clip or geometry), lanes).cut(
        geometry, lanes
    )
    return cut


@functools.lru_cache(maxsize=1024)
def _form(kind: Geometry, lanes: int) -> ModuleType:
    """The form with fewer cycles by its own count."""
    if kind.out_channels // kind.groups > MOST_OUTPUTS:
        return products
    cuts = strips.cut(kind, lanes), products.cut(kind, lanes)
    return strips if _cycles(cuts[0]) < _cycles(cuts[1]) else products


def _kind(g: Geometry) -> Geometry:
    """One clip for all that differ in batch, length and what is in front: the form has the order of
    a sum, and a stream has the bits of its clip.
    """
    columns = COLUMNS.get(g.n) or g.out_size[1]  # an image is as high as it is wide
    length = (columns - 1) * g.stride[0] + g.span[0]
    padding = ((0, 0), *g.padding[1:])
    return replace(g, batch=1, in_size=(length, *g.in_size[1:]), padding=padding)


def _cycles(cut: strips.Strips | products.Products) -> int:
    """Of one call on one thread, roughly."""
    module = strips if isinstance(cut, strips.Strips) else products
    return int(module.cycles(cut))


def prepack(weights: np.ndarray, plan: Plan) -> Packed:
    """w (K, C / G, *kernel) in the order in which the kernel reads it."""
    return _packed(weights, plan, _cut(plan.geometry, launch.lanes()))


def prepack_window(weights: np.ndarray, plan: Plan, clip: Geometry) -> Packed:
    """`prepack` for the window of one column, whose bits are those in a clip."""
    return _packed(weights, plan, _cut(plan.geometry, launch.lanes(), clip))


def prepack_scaled(weights: np.ndarray, plan: Plan, activation: str) -> Packed:
    """`prepack` for a convolution of one tap of activation(x * scale), in one pass over x.

    What it returns runs as packed.run(x, (bias, scale, None), residual, y, workspace) with scale
    (N, C) and `workspace_size_scaled(plan)` elements.
    """
    cut = products.cut(plan.geometry, launch.lanes(), scaled=True)
    return _packed(weights, plan, cut, ACTIVATIONS.index(activation))


def _packed(
    weights: np.ndarray,
    plan: Plan,
    cut: strips.Strips | products.Products,
    input_activation: int = 0,
) -> Packed:
    params, keep = parameters(plan, cut, input_activation)
    form = strips if isinstance(cut, strips.Strips) else products
    return Packed(plan, form.pack(weights, cut), params, each=cut.each, keep=keep)


def parameters(
    plan: Plan, cut: strips.Strips | products.Products, input_activation: int = 0
) -> tuple[Any, list[Any]]:
    """A C structure fc_grouped, and the memory that it points to."""
    assert isinstance(plan.epilogue, Epilogue)
    values = {
        "geometry": launch.c_geometry(cut.geometry),
        "activation": launch.activation_of(plan.epilogue),
        "work": _cycles(cut),
        "each": launch.lines(cut.each),
        "input_activation": input_activation,
    }
    keep: list[Any] = []
    if isinstance(cut, strips.Strips):
        fields, keep = cut.fields()
        values |= {"form": lib.FC_PIXEL_LANES, "lanes": fields}
    else:
        values |= {"form": lib.FC_PIXEL_ROWS, "rows": cut.fields(), "scaled": cut.scaled}
    return ffi.new("fc_grouped *", values), keep


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return launch.workspace_elements(plan, 0, _cut(plan.geometry, launch.lanes()).each)


def workspace_size_window(plan: Plan, clip: Geometry) -> int:
    """`workspace_size` of what `prepack_window` packs."""
    return launch.workspace_elements(plan, 0, _cut(plan.geometry, launch.lanes(), clip).each)


def workspace_size_scaled(plan: Plan) -> int:
    """Elements of plan.dtype that what `prepack_scaled` returned needs as scratch."""
    cut = products.cut(plan.geometry, launch.lanes(), scaled=True)
    return launch.workspace_elements(plan, 0, cut.each)


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
