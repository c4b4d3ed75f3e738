"""A convolution fed one frame at a time (Hedegaard and Iosifidis 2022), in two forms of memory.

L = dilation * (KT - 1) maps are kept per stream; a stream that has seen t frames gets frame t.

ring  `state` holds the last L frames, that of time t in slot t mod L. A column is the convolution
      of what its taps read, summed as over a clip.
sum   `state` holds the L columns that are not complete, that of time u in slot u mod L (the paper's
      form). Every frame is multiplied by all taps at once; the first tap to reach a column
      overwrites what the slot held, so that no rounding error outlives L frames.

With temporal stride s those columns exist whose time is L modulo s: the columns of the convolution
without temporal padding, and before them those that reach in front of the stream. There, zeros in
the state are zero padding; with the option `replicate` the first frame stands there instead.
"""

from __future__ import annotations

from dataclasses import replace

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


def run(
    plan, x, packed, bias, residual, state, steps, y, workspace, active=None, update=True
) -> None:
    """Write the column that the frame x completes to y, and what later columns need to the state.

    x        (N, C, *frame), frame = the axes behind the first
    bias     (K,) or None;  residual (N, K, *out_frame) or None
    state    (N, C, L, *frame); with the option `sum` (N, K, L, *out_frame), in float32 or wider
    steps    (N,) int64, frames seen so far; incremented
    y        (N, K, *out_frame); written where the stream has a column at this time
    active   (N,) bool or None: of a stream that is not, nothing is written
    update   False: state and steps are not written

    plan.geometry is the window of one column: L + 1 frames in, no temporal padding, one out; its
    temporal stride is that of the columns. plan.options: sum, replicate.

    Equivalent to column (t - L) / s of `F.conv3d(stream, w, bias, (s, ...), (0, ...), ...)`.
    """
    of_stream = _with_sums if plan.options.get("sum") else _with_frames
    ring = plan.geometry.in_size[0] - 1
    for n in range(x.shape[0]):
        if active is not None and not active[n]:
            continue
        t, one = int(steps[n]), slice(n, n + 1)
        z = of_stream(plan, x[one], packed, state[one], t, update)
        if (t - ring) % plan.geometry.stride[0] == 0:
            added = None if residual is None else residual[one]
            y[one] = direct.finish(z, bias, added, plan.epilogue)
        if update:
            steps[n] += 1


def _with_frames(plan: Plan, x, w, state, t: int, update: bool) -> np.ndarray | None:
    """The column of frame t of one stream, or None if it has none; writes the frame."""
    g, z = replace(plan.geometry, batch=1), None
    ring = g.in_size[0] - 1
    if (t - ring) % g.stride[0] == 0:
        first = 0 if plan.options.get("replicate") else t - ring
        times = [max(time, first) for time in range(t - ring, t)]
        frames = [x if time == t else state[:, :, time % ring] for time in times]
        z = direct.correlate(np.stack([*frames, x], axis=2), w, g)[:, :, 0]
    if update and ring:
        state[:, :, t % ring] = x
    return z


def _with_sums(plan: Plan, x, w, state, t: int, update: bool) -> np.ndarray | None:
    """The column of frame t of one stream, or None if it has none; adds the frame to the others."""
    g = plan.geometry
    taps, step, ring = g.kernel[0], g.dilation[0], g.in_size[0] - 1
    single = replace(
        g,
        batch=1,
        in_size=(1, *g.in_size[1:]),
        kernel=(1, *g.kernel[1:]),
        stride=(1, *g.stride[1:]),
    )
    sums = state if update else state.copy()

    def part(tap: int) -> np.ndarray:
        return direct.correlate(x[:, :, None], w[:, :, tap : tap + 1], single)[:, :, 0]

    def add(time: int) -> None:
        for tap in range(taps - 1):
            column = time + (taps - 1 - tap) * step
            if (column - ring) % g.stride[0] == 0:
                slot = column % ring
                sums[:, :, slot] = part(tap) + (sums[:, :, slot] if tap else 0)

    if t == 0 and plan.options.get("replicate"):
        for time in range(-ring, 0):
            add(time)
    z = None
    if (t - ring) % g.stride[0] == 0:
        z = part(taps - 1) + (sums[:, :, t % ring] if ring else 0)
    if update:
        add(t)
    return z
