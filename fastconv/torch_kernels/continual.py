"""A convolution fed one frame at a time, on PyTorch's own convolution; both forms of its memory.

Nothing here waits for a device: which slots are read and which streams have a column is computed
where `steps` is. On a CPU, where it is known, a step without a column multiplies nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import arrays, grouped

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return arrays.refuse_dtype(dtype)


def prepack(weights: Any, plan: Plan) -> Tensor:
    """w (K, C / G, *kernel) on the plan's device, in its dtype and memory format.

    With the option `sum` a kernel of one frame with KT * K / G outputs per group, tap by tap, in
    float32 at least.
    """
    if not plan.options.get("sum"):
        return grouped.prepack(weights, plan)
    w, g = arrays.read(weights).detach(), plan.geometry
    per_group = w.reshape(g.groups, g.out_channels // g.groups, *w.shape[1:])
    # (G, K / G, C / G, KT, *kernel) -> (G, KT, K / G, C / G, *kernel)
    taps = per_group.movedim(3, 1).reshape(-1, w.shape[1], 1, *w.shape[3:])
    return grouped.prepack(taps, replace(plan, dtype=_wide(plan.dtype)))


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch; PyTorch allocates its own."""
    return 0


@torch.no_grad()
def run(
    plan, x, packed, bias, residual, state, steps, y, workspace, active=None, update=True
) -> None:
    """Write the column that the frame x completes to y, and what later columns need to the state.

    x         (N, C, *frame)
    bias      (K,) or None;  residual (N, K, *out_frame) or None
    state     (N, C, L, *frame); with the option `sum` (N, K, L, *out_frame), in float32 or wider
    steps     (N,) int64, frames seen so far; incremented
    y         (N, K, *out_frame); written where the stream has a column at this time
    active    (N,) bool or None: of a stream that is not, nothing is written
    update    False: state and steps are not written; each array a tensor or a NumPy array

    Equivalent to column (t - L) / s of `F.conv3d(stream, w, bias, (s, ...), (0, ...), ...)`.
    """
    x, state, steps, y = arrays.read(x), *map(arrays.written, (state, steps, y))
    bias, residual, active = (a if a is None else arrays.read(a) for a in (bias, residual, active))
    emits = emitting(plan, steps, active)
    idle = emits is not None and emits.device.type == "cpu" and not emits.any()
    if plan.options.get("sum"):
        if not idle or update:
            z = _with_sums(plan, x, packed, state, steps, active, update)
            if bias is not None:
                z = z + bias.reshape(-1, *(1,) * (z.dim() - 2))
    elif not idle:
        z = grouped.convolve(window(plan, x, state, steps), packed, bias, plan.geometry)[:, :, 0]
    if not idle:
        _finish(z, residual, plan.epilogue.activation, y, emits)
    if update:
        if not plan.options.get("sum") and state.shape[2]:
            keep_frame(x, state, steps, active)
        steps += 1 if active is None else active


def emitting(plan: Plan, steps: Tensor, active: Tensor | None) -> Tensor | None:
    """Which streams (N,) have a column now; None for all."""
    g = plan.geometry
    if g.stride[0] == 1:
        return active
    emits = (steps - (g.in_size[0] - 1)) % g.stride[0] == 0
    return emits if active is None else emits & active


def read_slots(plan: Plan, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Slots (N, L) of the frames of a window, oldest first, and which of them are x itself."""
    ring = plan.geometry.in_size[0] - 1
    times = steps[:, None] + torch.arange(-ring, 0, device=steps.device)
    now = torch.zeros_like(times, dtype=torch.bool)
    if plan.options.get("replicate"):
        times = times.clamp(min=0)
        now = times >= steps[:, None]
    return times % max(ring, 1), now


def window(plan: Plan, x: Tensor, state: Tensor, steps: Tensor) -> Tensor:
    """(N, C, L + 1, *frame): what the column at the streams' time reads, in the plan's layout."""
    ring = state.shape[2]
    frames = _empty_window(plan, state.device)
    frames[:, :, ring] = x
    if ring:
        slots, now = read_slots(plan, steps)
        stream = torch.arange(state.shape[0], device=state.device)
        # (N, L, C, *frame): the indexed axes come first
        kept = state[stream[:, None], :, slots]
        if plan.options.get("replicate"):
            kept = torch.where(now.reshape(*now.shape, *(1,) * (x.dim() - 1)), x[:, None], kept)
        frames[:, :, :ring] = kept.movedim(1, 2)
    return frames


def keep_frame(x: Tensor, state: Tensor, steps: Tensor, active: Tensor | None) -> None:
    """x takes the slot of the oldest frame."""
    stream, slot = torch.arange(state.shape[0], device=state.device), steps % state.shape[2]
    state[stream, :, slot] = x if active is None else _where(active, x, state[stream, :, slot])


def convolve_taps(plan: Plan, x: Tensor, packed: Tensor) -> Tensor:
    """(KT, N, K, *out_frame): the frame under every temporal tap, `packed` as for `sum`."""
    g = plan.geometry
    z = grouped.convolve(x.to(packed.dtype)[:, :, None], packed, None, frame_geometry(g))[:, :, 0]
    n, _, *out = z.shape
    split = z.reshape(n, g.groups, g.kernel[0], g.out_channels // g.groups, *out)
    # (N, G, KT, K / G, *out) -> (KT, N, G, K / G, *out)
    return split.movedim(2, 0).reshape(g.kernel[0], n, g.out_channels, *out)


def _with_sums(plan, x, packed, state, steps, active, update) -> Tensor:
    """The sum of the streams' columns now (N, K, *out_frame); adds the frame to the others."""
    g = plan.geometry
    taps, ring = g.kernel[0], g.in_size[0] - 1
    parts = convolve_taps(plan, x, packed)
    if not ring:
        return parts[-1]
    stream = torch.arange(state.shape[0], device=state.device)
    z = state[stream, :, steps % ring]
    fresh = steps == 0 if plan.options.get("replicate") else None
    if fresh is not None:
        if active is not None:
            fresh = fresh & active
        before = parts.cumsum(0)  # what the taps in front of the stream's begin have added
        z = _where(fresh, before[taps - 2], z)
        for slot in range(ring if update else 0):
            primed = before[taps - 2 - slot // g.dilation[0]]
            state[:, :, slot] = _where(fresh, primed, state[:, :, slot])
    for tap in range(taps - 1 if update else 0):
        column = steps + (taps - 1 - tap) * g.dilation[0]
        slot, there = column % ring, emitting(plan, column, active)
        old = state[stream, :, slot]
        new = old + parts[tap] if tap else parts[0]
        state[stream, :, slot] = new.to(state.dtype) if there is None else _where(there, new, old)
    return z + parts[-1]


def _finish(z, residual, activation: str, y, emits: Tensor | None) -> None:
    """y = activation(z + residual) for the streams that have a column."""
    if emits is None and z.dtype == y.dtype:
        grouped.finish(z, residual, activation, y)
        return
    out = torch.empty_like(z)
    grouped.finish(z, residual, activation, out)
    y.copy_(out if emits is None else _where(emits, out.to(y.dtype), y))


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Streams of `yes` where the mask (N,) says so, else of `no`, in its precision."""
    return torch.where(mask.reshape(-1, *(1,) * (no.dim() - 1)), yes.to(no.dtype), no)


def frame_geometry(g: Geometry) -> Geometry:
    """One frame under all temporal taps of a window, each with outputs of its own."""
    return replace(
        g,
        out_channels=g.out_channels * g.kernel[0],
        in_size=(1, *g.in_size[1:]),
        kernel=(1, *g.kernel[1:]),
        stride=(1, *g.stride[1:]),
        dilation=(1, *g.dilation[1:]),
    )


def _wide(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _empty_window(plan: Plan, device: torch.device) -> Tensor:
    """The window (N, C, L + 1, *frame) of the plan's geometry, in the plan's layout."""
    n, c, *size = plan.geometry.x_shape
    dtype = getattr(torch, plan.dtype)
    if plan.layout == CHANNELS_LAST:
        return torch.empty(n, *size, c, dtype=dtype, device=device).movedim(-1, 1)
    return torch.empty(n, c, *size, dtype=dtype, device=device)
