"""A convolution fed one frame at a time: the kernels of the clip read the ring where it lies."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from ..transforms import transform
from . import depthwise, grouped, launch, winograd
from .launch import Packed, ffi

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


def refuses(plan: Plan) -> str | None:
    """None, or the reason against the transforms of a plan."""
    if not plan.transforms:
        return None
    time, *space = plan.transforms
    if time.m > 1:
        return f"a stream has one column at a time, not {time.m}"
    if not any(t.m > 1 and t.r > 1 for t in space):
        return "no axis of a frame has a transform"
    assert isinstance(plan.geometry, Geometry)
    if plan.geometry.groups > 1:
        return f"streams by winograd are for one group, not {plan.geometry.groups}"
    reason = winograd.supports(plan.geometry, plan.dtype, plan.epilogue)
    return reason or winograd.refuses(_clip(plan)[1])


@functools.lru_cache(maxsize=1024)
def _clip(plan: Plan) -> tuple[ModuleType, Plan]:
    """The module and the plan that compute columns from the frames of their taps alone; for the
    option `sum`, of one tap of one stream.
    """
    g = plan.geometry
    assert isinstance(g, Geometry)
    # Three axes with time in front: fewer would be lifted with theirs behind.
    kernel, stride, padding, dilation = (
        (first, *(one,) * (3 - g.n), *values[1:])
        for first, one, values in (
            (g.kernel[0], 1, g.kernel),
            (1, 1, g.stride),
            ((0, 0), (0, 0), g.padding),
            (1, 1, g.dilation),
        )
    )
    sums = plan.options.get("sum", 0)
    if sums:
        kernel = (1, *kernel[1:])
    window = replace(
        g,
        batch=1 if sums else g.batch,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        in_size=(kernel[0], *(1,) * (3 - g.n), *g.in_size[1:]),
    )
    if plan.transforms:
        one, space = transform(1, 1), plan.transforms[1:]
        transforms = (transform(1, kernel[0]), *(one,) * (3 - g.n), *space)
        inner = replace(plan, family="winograd", transforms=transforms)
        return winograd, replace(inner, geometry=window, config=())
    single = g.is_depthwise and g.groups > 1
    module, family = (depthwise, "depthwise") if single else (grouped, "grouped")
    return module, replace(plan, family=family, geometry=window, config=())


def prepack(weights: np.ndarray, plan: Plan) -> Packed:
    """w (K, C / G, *kernel) in the order in which the kernel of the window reads it.

    With the option `sum` tap by tap.
    """
    g = plan.geometry
    module, clip = _clip(plan)
    k, c, _, *size = clip.geometry.w_shape
    if not plan.options.get("sum"):
        w = np.reshape(weights, clip.geometry.w_shape)
        of_window = module is grouped
        inner = grouped.prepack_window(w, clip, g) if of_window else module.prepack(w, clip)
        return _packed(plan, clip, inner, inner.weights, {})
    inner, *others = (
        module.prepack(np.reshape(w, (k, c, 1, *size)), clip) for w in np.moveaxis(weights, 2, 0)
    )
    taps = launch.aligned(g.kernel[0], launch.lines(inner.weights.size) + launch.LINE)
    for tap, part in zip(taps, (inner, *others), strict=True):
        tap[: part.weights.size] = part.weights.ravel().view(np.float32)
    partial = ffi.new(ffi.typeof(inner.params), inner.params[0])
    partial.activation = 0
    return _packed(plan, clip, inner, taps, {"partial": partial, "tap_size": taps.shape[1]})


def _packed(
    plan: Plan, clip: Plan, inner: Packed, weights: np.ndarray, fields: dict[str, Any]
) -> Packed:
    """What `fc_step` reads, round the C structure of the inner family."""
    g = plan.geometry
    params = ffi.new(
        "fc_continual *",
        {
            "inner": launch.FAMILIES.index(clip.family),
            "sums": plan.options.get("sum", 0),
            "replicate": plan.options.get("replicate", 0),
            "params": inner.params,
            "taps": g.kernel[0],
            "dilation": g.dilation[0],
            "stride": g.stride[0],
            "ring": g.in_size[0] - 1,
            **fields,
        },
    )
    return Packed(plan, weights, params, inner.shared, inner.each, keep=(inner, fields))


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    module, clip = _clip(replace(plan, layout=launch.CHANNELS_LAST))
    if module is grouped and not plan.options.get("sum"):
        size = grouped.workspace_size_window(clip, plan.geometry)
    else:
        size = module.workspace_size(clip)
    return size - launch.copies_size(clip) + launch.copies_size(plan)


def run(
    plan, x, packed, bias, residual, state, steps, y, workspace, active=None, update=True
) -> None:
    """Write the column that the frame x completes to y, and what later columns need to the state.

    x         (N, C, *frame), frame = the axes behind the first
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_frame) or None
    state     (N, C, L, *frame); with the option `sum` (N, K, L, *out_frame)
    steps     (N,) int64, frames seen so far; incremented
    y         (N, K, *out_frame); written where the stream has a column at this time
    workspace `workspace_size(plan)` elements, overwritten
    active    (N,) bool or None: of a stream that is not, nothing is written
    update    False: state and steps are not written

    Equivalent to column (t - L) / s of `F.conv3d(stream, w, bias, (s, ...), (0, ...), ...)`.
    """
    packed.step(x, bias, residual, state, steps, y, workspace, active, update)
