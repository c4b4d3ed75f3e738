"""Grouped convolution, dense included (one group), by `F.conv2d` and `F.conv3d`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from . import arrays

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return arrays.refuse_dtype(dtype)


def prepack(weights: Any, plan: Plan) -> torch.Tensor:
    """w (K, C / G, *kernel) on the plan's device, in its dtype and memory format.

    A kernel (k,) becomes (1, k).
    """
    return arrays.packed_weight(weights, plan, lead=int(plan.geometry.n == 1))


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch; PyTorch allocates its own."""
    return 0


def convolve(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """x (N, C, *in_size), w as `prepack` leaves it -> (N, K, *out_size)."""
    function, widths, arguments = _call(geometry)
    if geometry.n == 1:
        x = x.unsqueeze(2)
    if widths:
        x = F.pad(x, widths)
    y = function(x, w, bias, *arguments)
    return y.squeeze(2) if geometry.n == 1 else y


@lru_cache(maxsize=4096)
def _call(geometry: Geometry) -> tuple[Any, list[int], tuple[Any, ...]]:
    """PyTorch's function, the padding it cannot do, and its arguments behind the bias."""
    padding, stride, dilation = geometry.padding, geometry.stride, geometry.dilation
    if geometry.n == 1:
        # Two axes have a channels-last memory format, one axis has none.
        padding, stride, dilation = ((0, 0), *padding), (1, *stride), (1, *dilation)
    # F.conv pads both sides alike; what one side has more is padded before.
    both = [min(pair) for pair in padding]
    rest = [(a - p, b - p) for (a, b), p in zip(padding, both, strict=True)]
    widths = [side for pair in reversed(rest) for side in pair] if any(map(any, rest)) else []
    function = F.conv3d if geometry.n == 3 else F.conv2d
    return function, widths, (stride, both, dilation, geometry.groups)


def finish(
    z: torch.Tensor, residual: torch.Tensor | None, activation: str, y: torch.Tensor
) -> None:
    """Write activation(z + residual) to y; z, which already has its bias, is overwritten."""
    if residual is not None:
        z += residual
    if activation == "relu":
        torch.clamp_min(z, 0, out=y)
    elif activation == "sigmoid":
        torch.sigmoid(z, out=y)
    elif activation == "silu":
        torch.ops.aten.silu.out(z, out=y)
    elif activation == "hardswish":
        torch.ops.aten.hardswish.out(z, out=y)
    else:
        y.copy_(z)


@torch.no_grad()
def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x with the packed weights, and its epilogue, to y.

    x         (N, C, *in_size)
    bias      (K,) or None;  residual (N, K, *out_size) or None
    y         (N, K, *out_size), written; each of these a tensor or a NumPy array

    Equivalent to `F.conv3d(x, w, bias, stride, padding, dilation, groups)`.
    """
    bias, residual = (a if a is None else arrays.read(a) for a in (bias, residual))
    z = convolve(arrays.read(x), packed, bias, plan.geometry)
    finish(z, residual, plan.epilogue.activation, arrays.written(y))
