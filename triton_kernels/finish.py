"""The end of every kernel: bias, residual and activation in float32, one rounding, one store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of a float32 block; NaN stays NaN, which tl.maximum would not promise."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == "hardswish":
        gate = tl.where(z < -3, 0.0, z + 3)
        z = z * tl.where(gate > 6, 6.0, gate) / 6
    elif ACTIVATION == "sigmoid":
        z = 1 / (1 + tl.exp(-z))
    return z


@triton.jit
def store(
    y_ptr, residual_ptr, offsets, z, mask, ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    """y[offsets] = activation(z + residual[offsets]) in y's precision; z already has its bias."""
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)
