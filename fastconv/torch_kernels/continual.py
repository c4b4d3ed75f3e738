"""A convolution fed one frame at a time, the input-ring form, on PyTorch's own convolution."""

from __future__ import annotations

from typing import Any

import torch

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import arrays, grouped

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if geometry.stride[0] != 1:
        return (
            f"a step emits one column per frame; temporal stride {geometry.stride[0]} is not served"
        )
    return arrays.refuse_dtype(dtype)


def prepack(weights: Any, plan: Plan) -> torch.Tensor:
    """w (K, C / G, *kernel) on the plan's device, in its dtype and memory format."""
    return grouped.prepack(weights, plan)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch; PyTorch allocates its own."""
    return 0


@torch.no_grad()
def run(plan, x, packed, bias, residual, state, steps, y, workspace) -> None:
    """Write the output column that the frame x completes to y, and the frame itself to the state.

    x         (N, C, *frame)
    bias      (K,) or None;  residual (N, K, *out_frame) or None
    state     (N, C, L, *frame), the ring; the oldest frame of each stream is overwritten by x
    steps     (N,) int64, incremented
    y         (N, K, *out_frame), written; each of these a tensor or a NumPy array

    Equivalent to column t of `F.conv3d(stream, w, bias, ...)` over the stream padded in front
    with L zero frames.
    """
    x, state, steps, y = arrays.read(x), *map(arrays.written, (state, steps, y))
    bias, residual = (a if a is None else arrays.read(a) for a in (bias, residual))
    ring = state.shape[2]
    window = _empty_window(plan, state.device)
    window[:, :, ring] = x
    if ring:
        # Oldest frame first: slot (steps + j) mod L holds the frame of age L - j.
        stream = torch.arange(state.shape[0], device=state.device)
        slots = (steps[:, None] + torch.arange(ring, device=state.device)) % ring
        # (N, L, C, *frame): the indexed axes come first
        window[:, :, :ring] = state[stream[:, None], :, slots].movedim(1, 2)
        state[stream, :, steps % ring] = x
    steps += 1
    z = grouped.convolve(window, packed, bias, plan.geometry)[:, :, 0]
    grouped.finish(z, residual, plan.epilogue.activation, y)


def _empty_window(plan: Plan, device: torch.device) -> torch.Tensor:
    """The window (N, C, L + 1, *frame) of the plan's geometry, in the plan's layout."""
    n, c, *size = plan.geometry.x_shape
    dtype = getattr(torch, plan.dtype)
    if plan.layout == CHANNELS_LAST:
        return torch.empty(n, *size, c, dtype=dtype, device=device).movedim(-1, 1)
    return torch.empty(n, c, *size, dtype=dtype, device=device)
