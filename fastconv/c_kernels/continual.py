"""A convolution fed one frame at a time: the kernels of the clip read the ring where it lies."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import depthwise, grouped, launch
from .launch import Packed, ffi

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if geometry.stride[0] != 1:
        return (
            f"a step emits one column per frame; temporal stride {geometry.stride[0]} is not served"
        )
    return launch.refuse_dtype(dtype)


@functools.lru_cache(maxsize=1024)
def _clip(plan: Plan) -> tuple[ModuleType, Plan]:
    """The module and the plan that compute the column from the frames of its taps alone."""
    g = plan.geometry
    # Three axes with time in front: fewer would be lifted with theirs behind.
    lifted = {
        name: (getattr(g, name)[0], *(one,) * (3 - g.n), *getattr(g, name)[1:])
        for name, one in (("kernel", 1), ("stride", 1), ("padding", (0, 0)), ("dilation", 1))
    }
    window = replace(
        g,
        **lifted | {"dilation": (1, *lifted["dilation"][1:])},
        in_size=(g.kernel[0], *(1,) * (3 - g.n), *g.in_size[1:]),
    )
    single = g.is_depthwise and g.groups > 1
    module, family = (depthwise, "depthwise") if single else (grouped, "grouped")
    return module, replace(plan, family=family, geometry=window)


def prepack(weights: np.ndarray, plan: Plan) -> Packed:
    """w (K, C / G, *kernel) in the order in which the kernel of the window reads it."""
    g = plan.geometry
    module, clip = _clip(plan)
    inner = module.prepack(np.reshape(weights, clip.geometry.w_shape), clip)
    params = ffi.new(
        "fc_continual *",
        {
            "inner": launch.FAMILIES.index(clip.family),
            "params": inner.params,
            "taps": g.kernel[0],
            "dilation": g.dilation[0],
            "ring": g.in_size[0] - 1,
        },
    )
    return Packed(plan, inner.weights, params, inner.shared, inner.each, keep=(inner,))


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    module, clip = _clip(replace(plan, layout=launch.CHANNELS_LAST))
    own = module.workspace_size(clip) - launch.copies_size(clip)
    return own + launch.copies_size(plan)


def run(
    plan, x, packed, bias, residual, state, steps, y, workspace, active=None, update=True
) -> None:
    """Write the output column that the frame x completes to y, and the frame itself to the state.

    x         (N, C, *frame), frame = the axes behind the first
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_frame) or None
    state     (N, C, L, *frame), the ring; the oldest frame of each stream is overwritten by x
    steps     (N,) int64, frames seen so far; incremented
    y         (N, K, *out_frame), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to column t of `F.conv3d(stream, w, bias, ...)` over the stream padded in front
    with L zero frames.
    """
    packed.step(x, bias, residual, state, steps, y, workspace)
