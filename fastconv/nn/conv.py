"""PyTorch's `Conv1d`, `Conv2d` and `Conv3d` with our kernels: same arguments, same state dict."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastconv import ops, planner, torch_ops, winners
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, Plan, Request

Module = TypeVar("Module", bound="_Conv")
MAX_SHAPES = 256  # input shapes remembered per module
# What a plan depends on besides the arrays.
_OPTIONS = (
    *("stride", "padding", "dilation", "groups", "channels_last"),
    *("algorithm", "backend", "tolerance", "max_workspace_bytes"),
)


class _Conv(nn.modules.conv._ConvNd):
    """What the three share: PyTorch's constructor and five keywords more.

    algorithm, backend, tolerance, max_workspace_bytes: as for `fastconv.conv3d`
    channels_last: compute and return channels last; by default in the input's layout
    """

    def __init__(
        self,
        *args: Any,
        algorithm: str = "auto",
        backend: str = "auto",
        tolerance: float = planner.DEFAULT_TOLERANCE,
        channels_last: bool = False,
        max_workspace_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._configure(algorithm, backend, tolerance, channels_last, max_workspace_bytes)

    def _configure(
        self,
        algorithm: str = "auto",
        backend: str = "auto",
        tolerance: float = planner.DEFAULT_TOLERANCE,
        channels_last: bool = False,
        max_workspace_bytes: int | None = None,
    ) -> None:
        self.algorithm, self.backend, self.tolerance = algorithm, backend, float(tolerance)
        self.channels_last, self.max_workspace_bytes = channels_last, max_workspace_bytes
        self._runners: dict[Any, torch_ops.Runner] = {}
        self._held: torch_ops.PackedWeights | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _OPTIONS:
            self._runners = {}

    @classmethod
    def convert(cls: type[Module], module: nn.Module, **kernel_options: Any) -> Module:
        """This class with the parameters (not copies), buffers and hooks of PyTorch's module."""
        new = cls.__new__(cls)
        new.__dict__.update(module.__dict__)
        new._configure(**kernel_options)
        return new

    def plan_for(self, x: Tensor) -> Plan:
        """The plan that a batch like x would run; its padding is the module's own."""
        return self._runner_for(x, self.weight.shape, self.bias is not None).plan

    def _runner_for(self, x: Tensor, w_shape: torch.Size, has_bias: bool) -> torch_ops.Runner:
        key = (
            x.shape,
            x.stride(),
            x.dtype,
            None if x.is_cpu else (x.device.type, torch_ops.precision_of(x)),
            w_shape,
            has_bias,
            winners.generation(),
        )
        runner = self._runners.get(key)
        if runner is None:
            if len(self._runners) >= MAX_SHAPES:
                self._runners.clear()
            op = f"conv{len(self.kernel_size)}d"
            options = (self.stride, self.padding, self.dilation, self.groups)
            plan = planner.plan(
                Geometry.of(x.shape, w_shape, *options, op=op),
                dtype=str(x.dtype).removeprefix("torch."),
                device=x.device.type,
                precision=torch_ops.precision_of(x),
                epilogue=Epilogue(bias=has_bias),
                layout=CHANNELS_LAST if self.channels_last else ops.layout_of(x),
                algorithm=self.algorithm,
                backend=self.backend,
                tolerance=self.tolerance,
                max_workspace_bytes=self.max_workspace_bytes,
            )
            runner = self._runners[key] = torch_ops.runner(plan)
        return runner

    def requests(self) -> list[Request]:
        """What this module asked the planner for, in the calls so far."""
        return [
            Request.of(
                plan.geometry,
                dtype=plan.dtype,
                device=plan.device,
                epilogue=plan.epilogue,
                layout=plan.layout,
                algorithm=self.algorithm,
                backend=self.backend,
                tolerance=self.tolerance,
                max_workspace_bytes=self.max_workspace_bytes,
                precision=plan.precision,
            )
            for plan in (runner.plan for runner in self._runners.values())
        ]

    def forget_plans(self) -> None:
        """Plan anew in the next call, and drop the packed weights."""
        self._runners = {}
        if self._held is not None:
            self._held.drop()

    def plan_of(self, x_shape: tuple[int, ...]) -> Plan | None:
        """The plan that the last input of this shape (with its batch axis) ran; None if none."""
        plans = [r.plan for key, r in self._runners.items() if key[0] == tuple(x_shape)]
        return plans[-1] if plans else None

    def forward(self, input: Tensor) -> Tensor:
        own: dict[str, Any] = self._parameters
        try:  # as nn.Module looks them up, in less time
            weight, bias = own["weight"], own["bias"]
        except KeyError:  # computed, by torch.nn.utils.parametrize for one
            weight, bias = self.weight, self.bias
        return self._conv_forward(input, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        zeros = self.padding_mode == "zeros"
        if zeros and torch_ops.is_plain(input, weight, bias) and input.dim() == weight.dim():
            held = self._held
            if held is None or not held.are_of(weight):
                held = self._held = torch_ops.held_weights(weight)
            runner = self._runner_for(input, weight.shape, bias is not None)
            return runner(input, held.form(runner, weight), bias)
        ops.check_dense(f"conv{len(self.kernel_size)}d", weight=weight, input=input)
        device = input.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # Which precision a convolution gets there is PyTorch's to decide.
            return super()._conv_forward(input, weight, bias)
        padding = self.padding
        if not zeros:
            widths = self._reversed_padding_repeated_twice
            input = nn.functional.pad(input, widths, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
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
            max_workspace_bytes=self.max_workspace_bytes,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runners": {}, "_held": None}


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d` with the options of `fastconv.conv1d`, and channels_last."""


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d` with the options of `fastconv.conv2d`, and channels_last."""


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d` with the options of `fastconv.conv3d`, and channels_last."""
