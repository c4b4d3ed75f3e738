"""PyTorch's `Conv1d`, `Conv2d` and `Conv3d` with our kernels: same arguments, same state dict."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastconv import ops, planner, torch_ops
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, Plan

Module = TypeVar("Module", bound="_Conv")
MAX_PLANS = 256  # input shapes remembered per module


class _Conv(nn.modules.conv._ConvNd):
    """What the three share: PyTorch's constructor and four keywords more.

    algorithm, backend, tolerance: as for `fastconv.conv3d`
    channels_last: compute and return channels last; by default in the input's layout
    """

    def __init__(
        self,
        *args: Any,
        algorithm: str = "auto",
        backend: str = "auto",
        tolerance: float = planner.DEFAULT_TOLERANCE,
        channels_last: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._configure(algorithm, backend, tolerance, channels_last)

    def _configure(
        self,
        algorithm: str = "auto",
        backend: str = "auto",
        tolerance: float = planner.DEFAULT_TOLERANCE,
        channels_last: bool = False,
    ) -> None:
        self.algorithm, self.backend, self.tolerance = algorithm, backend, float(tolerance)
        self.channels_last = channels_last
        self._plans: dict[Any, Plan] = {}

    @classmethod
    def convert(cls: type[Module], module: nn.Module, **kernel_options: Any) -> Module:
        """This class with the parameters (not copies), buffers and hooks of PyTorch's module."""
        new = cls.__new__(cls)
        new.__dict__.update(module.__dict__)
        new._configure(**kernel_options)
        return new

    def plan_for(self, x: Tensor, padding: Any = None) -> Plan:
        """The plan that an input would run; `padding` replaces the module's own."""
        key = (x.shape, x.stride(), x.dtype, x.device.type, padding)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            pad = self.padding if padding is None else padding
            options = (self.stride, pad, self.dilation, self.groups)
            geometry = Geometry.of(
                x.shape, self.weight.shape, *options, op=f"conv{len(self.kernel_size)}d"
            )
            plan = self._plans[key] = planner.plan(
                geometry,
                dtype=str(x.dtype).removeprefix("torch."),
                device=x.device.type,
                epilogue=Epilogue(bias=self.bias is not None),
                layout=CHANNELS_LAST if self.channels_last else ops.layout_of(x),
                algorithm=self.algorithm,
                backend=self.backend,
                tolerance=self.tolerance,
            )
        return plan

    def plan_of(self, x_shape: tuple[int, ...]) -> Plan | None:
        """The plan that the last input of this shape (with its batch axis) ran; None if none."""
        plans = [p for p in self._plans.values() if p.geometry.x_shape == tuple(x_shape)]
        return plans[-1] if plans else None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            widths = self._reversed_padding_repeated_twice
            input = nn.functional.pad(input, widths, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        if self._is_plain(input, weight, bias):
            plan = self.plan_for(input, padding)
            return torch_ops.execute(
                plan, input, torch_ops.packed_weights(plan, weight), bias, None
            )
        if self.channels_last and input.dim() == len(self.kernel_size) + 2:
            input = torch_ops.dense(input, CHANNELS_LAST)
        function = (ops.conv1d, ops.conv2d, ops.conv3d)[len(self.kernel_size) - 1]
        return function(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            algorithm=self.algorithm,
            backend=self.backend,
            tolerance=self.tolerance,
        )

    def _is_plain(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """An ordinary batch, no gradient, nobody tracing: may skip the operator and its checks."""
        if (
            torch.compiler.is_compiling()
            or type(input) is not Tensor
            or input.dim() != weight.dim()
        ):
            return False
        given = (input, weight) if bias is None else (input, weight, bias)
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            return False
        same = all(t.dtype == input.dtype and t.device == input.device for t in given)
        return (
            same
            and input.device.type != "meta"
            and not torch.is_autocast_enabled(input.device.type)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d` and the keywords algorithm, backend, tolerance, channels_last."""


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d` and the keywords algorithm, backend, tolerance, channels_last."""


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d` and the keywords algorithm, backend, tolerance, channels_last."""
