"""Depthwise convolution: along one axis by lines, otherwise by tiles of outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import launch

# looped: 1 for loops over the taps even where a kernel was compiled for them.
CONFIGS: tuple[dict[str, int], ...] = ({}, {"looped": 1})
MOST_LINE_TAPS = 7  # csrc/depthwise_lines.h


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if not geometry.is_depthwise:
        return f"not depthwise: {geometry.groups} groups for {geometry.in_channels} input channels"
    return launch.refuse_dtype(dtype)


def line_axis(geometry: Geometry) -> int | None:
    """The only axis of a lifted geometry on which anything happens, if its lines are served."""
    busy = [
        axis
        for axis in range(3)
        if (geometry.kernel[axis], geometry.stride[axis], geometry.padding[axis]) != (1, 1, (0, 0))
    ]
    if len(busy) > 1 or geometry.out_channels != geometry.in_channels:
        return None
    axis = (busy or [0])[0]
    served = geometry.stride[axis] == 1 and geometry.kernel[axis] <= MOST_LINE_TAPS
    return axis if served else None


def params(plan: Plan) -> Any:
    """The C structure fc_depthwise of a plan."""
    looped = plan.options.get("looped", 0)
    axis = None if looped else line_axis(plan.geometry.lifted())
    fields = {
        "geometry": launch.c_geometry(plan.geometry),
        "activation": launch.activation_of(plan.epilogue),
        "form": launch.lib.FC_DEPTHWISE_TILES if axis is None else launch.lib.FC_DEPTHWISE_LINES,
        "looped": looped,
        "axis": axis or 0,
    }
    return launch.ffi.new("fc_depthwise *", fields)


def pack(weights: np.ndarray, plan: Plan, form: int) -> np.ndarray:
    """w (K, 1, *kernel) in float32 as csrc/depthwise.h describes."""
    geometry, lanes = plan.geometry, launch.lanes()
    outs, taps = geometry.out_channels, geometry.taps
    w = np.asarray(weights, np.float32).reshape(outs, taps)
    if form == launch.lib.FC_DEPTHWISE_LINES:
        packed = launch.aligned(taps * (outs + lanes) + launch.lib.FC_LINE_CHUNK)
        lines = packed[: taps * (outs + lanes)].reshape(taps, outs + lanes)
        lines[...] = w.T[:, np.arange(outs + lanes) % outs]
        return packed
    vectors = -(-outs // lanes)
    # (vectors, lanes): the last vector ends with the channels.
    first = np.maximum(0, np.minimum(np.arange(vectors) * lanes, outs - lanes))
    channel = np.minimum(first[:, None] + np.arange(lanes), outs - 1)
    size = vectors * taps * lanes
    packed = launch.aligned(size + vectors * lanes)
    # (vectors, lanes, taps) -> (vectors, taps, lanes)
    packed[:size].reshape(vectors, taps, lanes)[...] = w[channel].swapaxes(1, 2)
    multiplier = outs // geometry.in_channels
    lane_of = channel // multiplier - first[:, None] // multiplier
    packed[size:].view(np.int32)[...] = lane_of.ravel()
    return packed


def prepack(weights: np.ndarray, plan: Plan) -> launch.Packed:
    """w (K, 1, *kernel) in the order in which the kernel reads it."""
    fields = params(plan)
    return launch.Packed(plan, pack(weights, plan, fields.form), fields, *scratch(plan))


def scratch(plan: Plan) -> tuple[int, int]:
    """Floats of workspace for all threads: a bias; and for every thread: addresses of frames."""
    geometry = plan.geometry.lifted()
    return geometry.in_channels + launch.LINE, 2 * geometry.kernel[0]


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return launch.workspace_elements(plan, *scratch(plan))


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the depthwise convolution of x, and its epilogue, to y.

    x         (N, C, *in_size)
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_size) or None
    y         (N, K, *out_size), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups=C)`.
    """
    packed.run(x, bias, residual, y, workspace)
