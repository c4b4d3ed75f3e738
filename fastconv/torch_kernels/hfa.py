"""The fully separable block as three PyTorch convolutions; the plan's transforms are not used."""

from __future__ import annotations

from typing import Any

import torch

from ..epilogue import Epilogue
from ..geometry import SeparableGeometry
from ..plan import Plan
from . import arrays, grouped

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(
    geometry: SeparableGeometry, dtype: str, epilogue: tuple[Epilogue, Epilogue, Epilogue]
) -> str | None:
    """None, or the reason against."""
    return arrays.refuse_dtype(dtype)


def prepack(weights: tuple[Any, Any, Any], plan: Plan) -> tuple[torch.Tensor, ...]:
    """The three weights on the plan's device, in its dtype and memory format."""
    return tuple(arrays.packed_weight(w, plan) for w in weights)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch; PyTorch allocates its own."""
    return 0


@torch.no_grad()
def run(plan, x, packed, biases, residual, y, workspace) -> None:
    """Write the block of x, each stage with its epilogue, to y.

    x         (N, C, T, H, W)
    biases    three entries, (M,), (M,), (K,) or None
    residual  (N, K, OT, OH, OW) or None
    y         (N, K, OT, OH, OW), written; each of these a tensor or a NumPy array

    Equivalent to conv3d (M, C, KT, 1, 1), conv3d (M, 1, 1, KH, KW) with groups = M,
    conv3d (K, M, 1, 1, 1) in sequence.
    """
    z = arrays.read(x)
    for stage, w, bias, epilogue in zip(
        plan.geometry.stages, packed, biases, plan.epilogue, strict=True
    ):
        z = grouped.convolve(z, w, bias if bias is None else arrays.read(bias), stage)
        if stage is not plan.geometry.pointwise:
            grouped.finish(z, None, epilogue.activation, z)
    residual = residual if residual is None else arrays.read(residual)
    grouped.finish(z, residual, plan.epilogue[-1].activation, arrays.written(y))
