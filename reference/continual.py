"""A convolution fed one frame at a time (Hedegaard and Iosifidis 2022); it keeps input frames.

`state` holds the last L = dilation * (KT - 1) frames of each stream; stream n, having seen steps[n]
frames, keeps the frame of time t in slot t mod L. A state of zeros before the first frame is zero
padding in front of the stream.
"""

from __future__ import annotations

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import direct

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if geometry.stride[0] != 1:
        return (
            f"a step emits one column per frame; temporal stride {geometry.stride[0]} is not served"
        )
    return direct.refuse_dtype(dtype)


def prepack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, C / G, *kernel) in float64."""
    return direct.exact(weights)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return 0


def run(plan, x, packed, bias, residual, state, steps, y, workspace) -> None:
    """Write the output column that the frame x completes to y, and the frame itself to the state.

    x        (N, C, *frame), frame = the axes behind the first
    bias     (K,) or None;  residual (N, K, *out_frame) or None
    state    (N, C, L, *frame), the ring; the oldest frame of each stream is overwritten by x
    steps    (N,) int64, frames seen so far; incremented
    y        (N, K, *out_frame), written

    plan.geometry is the window of one column: L + 1 frames in, no temporal padding, one out.

    Equivalent to column t of `F.conv3d(stream, w, bias, ...)` with L zero frames in front.
    """
    ring = state.shape[2]
    window = np.empty(plan.geometry.x_shape, dtype=state.dtype)
    for n in range(x.shape[0]):
        for age in range(1, ring + 1):
            window[n, :, ring - age] = state[n, :, (steps[n] - age) % ring]
        window[n, :, ring] = x[n]
        if ring:
            state[n, :, steps[n] % ring] = x[n]
        steps[n] += 1
    z = direct.correlate(window, packed, plan.geometry)[:, :, 0]
    y[...] = direct.finish(z, bias, residual, plan.epilogue)
