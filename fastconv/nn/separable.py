"""The fully separable block as a module: three weights, three activations, one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import ops, planner
from fastconv.epilogue import ACTIVATIONS
from fastconv.errors import UnsupportedError


class SeparableBlock(nn.Module):
    """Temporal KT x 1 x 1, depthwise 1 x KH x KW, pointwise, each with bias and activation.

    in_channels, mid_channels, out_channels   C, M and K
    kernel_size, stride, padding   per (T, H, W): time in the first stage, space in the second;
                                   padding 'same' with a stride means k // 2
    activations                    one per stage: 'none', 'relu', 'silu', 'hardswish' or 'sigmoid'
    backend, tolerance, max_workspace_bytes   as for `fastconv.conv3d`

    Parameters: temporal.weight (M, C, KT, 1, 1), depthwise.weight (M, 1, 1, KH, KW),
    pointwise.weight (K, M, 1, 1, 1) and, with bias, temporal.bias (M,) and so on: those of three
    `torch.nn.Conv3d`, whose state dicts it takes.

    Equivalent to the three `torch.nn.Conv3d` in sequence, each with its activation. Raises
    UnsupportedError for an unknown activation.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        padding: Any = "same",
        bias: bool = True,
        activations: tuple[str, str, str] = ("none", "none", "none"),
        backend: str = "auto",
        tolerance: float = planner.DEFAULT_TOLERANCE,
        max_workspace_bytes: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        unknown = set(activations) - set(ACTIVATIONS)
        if unknown or len(activations) != 3:
            raise UnsupportedError(
                f"SeparableBlock: activations must be three of {', '.join(ACTIVATIONS)}, "
                f"got {tuple(activations)}"
            )
        kt, kh, kw = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        shapes = (
            (mid_channels, in_channels, kt, 1, 1),
            (mid_channels, 1, 1, kh, kw),
            (out_channels, mid_channels, 1, 1, 1),
        )
        for name, shape in zip(_STAGES, shapes, strict=True):
            stage = nn.Module()
            stage.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            empty = torch.empty(shape[0], device=device, dtype=dtype) if bias else None
            stage.register_parameter("bias", None if empty is None else nn.Parameter(empty))
            self.add_module(name, stage)
        self.kernel_size, self.stride, self.padding = (kt, kh, kw), stride, padding
        self.activations = tuple(activations)
        self.backend, self.tolerance = backend, float(tolerance)
        self.max_workspace_bytes = max_workspace_bytes
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Conv3d` begins."""
        for stage in self._stages():
            nn.init.kaiming_uniform_(stage.weight, a=math.sqrt(5))
            if stage.bias is not None:
                bound = 1 / math.sqrt(stage.weight[0].numel())
                nn.init.uniform_(stage.bias, -bound, bound)

    def _stages(self) -> list[Any]:
        return [getattr(self, name) for name in _STAGES]

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input (N, C, T, H, W), residual (N, K, OT, OH, OW) or None -> (N, K, OT, OH, OW)."""
        temporal, depthwise, pointwise = stages = self._stages()
        return ops.separable_block(
            input,
            temporal.weight,
            depthwise.weight,
            pointwise.weight,
            [stage.bias for stage in stages],
            self.activations,
            residual,
            self.stride,
            self.padding,
            backend=self.backend,
            tolerance=self.tolerance,
            max_workspace_bytes=self.max_workspace_bytes,
        )

    def extra_repr(self) -> str:
        temporal, _, pointwise = self._stages()
        mid, inputs = temporal.weight.shape[:2]
        channels = f"{inputs}, {mid}, {pointwise.weight.shape[0]}"
        return (
            f"{channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, activations={self.activations}"
        )


_STAGES = ("temporal", "depthwise", "pointwise")
