"""What stands between convolutions, in one pass over memory: scale, shift, residual, activation."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl

from . import finish, launch

BLOCK = 1024


@triton.jit
def elementwise_blend_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    elements,
    channels,
    points,
    image,
    LAST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements in the order of memory; (points, channels) of an image, or (channels, points)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    channel = offsets % channels if LAST else offsets // points % channels
    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        at = channel
        if PER_IMAGE:
            at += offsets // image * channels
        z *= tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        z += tl.load(shift_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    finish.store(y_ptr, residual_ptr, offsets, z, mask, ACTIVATION, HAS_RESIDUAL)


def blend(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> None:
    """Write activation(x scale + shift + residual) to y.

    x, residual, y  (N, C, *size), dense in one layout, contiguous or channels last
    scale           (C,), or (N, C) for one per image
    shift           (C,)
    """
    if not y.numel():
        return
    channels, points = x.shape[1], prod(x.shape[2:])
    start = launch.Launch(
        elementwise_blend_kernel,
        -(-x.numel() // BLOCK),
        ("x", "scale", "shift", "residual", "y"),
        (x.numel(), channels, points, channels * points),
        (
            ("LAST", not x.is_contiguous() or points == 1),
            ("HAS_SCALE", scale is not None),
            ("PER_IMAGE", scale is not None and scale.dim() == 2),
            ("HAS_SHIFT", shift is not None),
            ("HAS_RESIDUAL", residual is not None),
            ("ACTIVATION", activation),
            ("BLOCK", BLOCK),
        ),
    )
    arrays = {"x": x, "scale": scale, "shift": shift, "residual": residual, "y": y}
    with launch.device_of(x):
        start(arrays)
