"""Input and weight gradients of a convolution on tensors: whose kernel, and the way to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd, prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends, costs, ops, planner
from .errors import UnsupportedError
from .geometry import Geometry
from .plan import Plan
from .torch_ops_packed import ON_TENSORS, pack, view
from .torch_ops_runner import (
    FLOAT32,
    Runner,
    dense,
    device_workspace,
    dtype_of,
    new_dense,
    precision_of,
    runner,
)

PACKING_NS = 15.0  # for every element of transformed weights, as measured


def plan_of_fresh_weights(geometry: Geometry, *, algorithm: str = "auto", **options: Any) -> Plan:
    """`planner.plan` for weights that are packed for a single call, as in every step of training:
    minimal filtering has to win back the time that its filters take.
    """
    plan = planner.plan(geometry, algorithm=algorithm, **options)
    if algorithm != "auto" or plan.family != "winograd" or plan.device != "cpu":
        return plan
    try:
        direct = planner.plan(geometry, algorithm="direct", **options)
    except UnsupportedError:
        return plan
    elements = prod(geometry.w_shape[:2]) * prod(t.alpha for t in plan.transforms)
    elements *= prod(map(min, geometry.stride, geometry.kernel))
    packing_ms = elements * PACKING_NS * 1e-6
    worth = costs.estimate_ms(plan) + packing_ms < costs.estimate_ms(direct)
    return plan if worth else direct


def input_gradient(
    grad: Tensor, weight: Tensor, geometry: Geometry, layout: str, backend: str, tolerance: float
) -> Tensor:
    """gx (N, C, *in_size) of y = conv(x, weight) for grad = gy (N, K, *out_size).

    geometry: of the forward convolution
    """
    found = _kernels(geometry, dtype_of(grad), grad.device.type, backend, "input_gradient")
    if found is not None:
        module, name, family = found
        plan = _forward(family, name, geometry, layout, grad)
        gx = new_dense(geometry.x_shape, grad, layout)
        _run(module.input_gradient, module, plan, dense(grad, layout), weight.contiguous(), gx)
        return gx
    parts = _convolutions(
        geometry, dtype_of(grad), grad.device.type, precision_of(grad), layout, backend, tolerance
    )
    if parts is None or not grad.numel():
        return _framework(grad, None, weight, geometry, layout, 0)
    if len(parts) == 1 and parts[0].runner is not None:
        return parts[0](grad, weight, geometry.groups)
    gx = new_dense(geometry.x_shape, grad, layout)
    for part in parts:
        some = gx
        for axis, (first, step) in enumerate(zip(part.start, geometry.stride, strict=True), 2):
            some = some[(slice(None),) * axis + (slice(first, None, step),)]
        if part.runner is None:
            some.zero_()
        else:
            some.copy_(part(grad, weight, geometry.groups))
    return gx


def weight_gradient(
    grad: Tensor, input: Tensor, geometry: Geometry, layout: str, backend: str
) -> Tensor:
    """gw (K, C / G, *kernel) of y = conv(input, w) for grad = gy (N, K, *out_size)."""
    found = _kernels(geometry, dtype_of(grad), grad.device.type, backend, "weight_gradient")
    if found is None:
        return _framework(grad, input, None, geometry, layout, 1)
    module, name, family = found
    plan = _forward(family, name, geometry, layout, grad)
    gw = grad.new_empty(geometry.w_shape)
    _run(module.weight_gradient, module, plan, dense(input, layout), dense(grad, layout), gw)
    return gw


def _forward(family: str, backend: str, geometry: Geometry, layout: str, grad: Tensor) -> Plan:
    """The plan that tells a gradient kernel what the convolution was."""
    return Plan(
        family,
        backend,
        geometry,
        dtype_of(grad),
        layout=layout,
        device=grad.device.type,
        precision=precision_of(grad),
    )


def _run(function: Any, module: ModuleType, plan: Plan, a: Tensor, b: Tensor, out: Tensor) -> None:
    size = module.workspace_size(plan)
    if plan.backend in ON_TENSORS:
        function(plan, a, b, out, device_workspace(size, out))
    elif plan.backend == "c":  # sees addresses only
        function(plan, a, b, out, ops.workspace(size, FLOAT32))
    else:
        result = view(out)
        function(plan, view(a), view(b), result, ops.workspace(size, result.dtype))


@lru_cache(maxsize=4096)
def _kernels(
    geometry: Geometry, dtype: str, device: str, backend: str, gradient: str
) -> tuple[ModuleType, str, str] | None:
    """The gradient kernels that serve a convolution: module, backend, family; None for nobody's.

    On a CPU the input gradient is left to convolutions, which have more kernels, but for strided
    depthwise ones.
    """
    families = ("depthwise", "grouped") if geometry.is_depthwise else ("grouped",)
    if gradient == "input_gradient" and device == "cpu" and backend != "reference":
        if max(geometry.stride) == 1 or not geometry.is_depthwise or geometry.groups == 1:
            return None
        families = ("depthwise",)
    names = (("c",) if device == "cpu" else ("triton",)) if backend == "auto" else (backend,)
    for name, family in product(names, families):
        if device not in backends.devices(name) or (name == "triton" and geometry.groups == 1):
            continue  # one group is cuDNN's
        half = dtype != "float32"
        if name == "triton" and family == "grouped" and gradient == "weight_gradient" and half:
            continue  # so is this
        module = backends.gradients(family, name)
        if module is not None and module.supports(geometry, dtype) is None:
            return module, name, family
    return None


@dataclass(frozen=True)
class Part:
    """A convolution of gy that gives the inputs start, start + stride, ... of every axis.

    runner  of its plan; None where no output reads these inputs
    crop    what is cut off gy in front and behind, per axis
    taps    of the weights, per axis; in the order in which they are read backwards
    """

    start: tuple[int, ...]
    runner: Runner | None = None
    crop: tuple[tuple[int, int], ...] = ()
    taps: tuple[slice, ...] = ()

    def __call__(self, grad: Tensor, weight: Tensor, groups: int) -> Tensor:
        assert self.runner is not None
        for axis, (before, after) in enumerate(self.crop, 2):
            if before or after:
                grad = grad.narrow(axis, before, grad.shape[axis] - before - after)
        plan = self.runner.plan
        weight = weight.detach()
        for axis, taps in enumerate(self.taps, 2):
            weight = weight[(slice(None),) * axis + (taps,)]
        turned = turn(weight, groups)
        return self.runner(grad, pack(plan, turned), None)


def turn(weight: Tensor, groups: int) -> Tensor:
    """w (K, C / G, *kernel) -> (C, K / G, *kernel), inputs and outputs exchanged, taps reversed."""
    k, c, *kernel = weight.shape
    w = weight.reshape(groups, k // groups, c, *kernel).transpose(1, 2)
    return w.flip(list(range(3, w.dim()))).reshape(groups * c, k // groups, *kernel)


@lru_cache(maxsize=4096)
def _convolutions(
    geometry: Geometry,
    dtype: str,
    device: str,
    precision: str,
    layout: str,
    backend: str,
    tolerance: float,
) -> tuple[Part, ...] | None:
    """The input gradient as convolutions of gy; None where PyTorch's own is as good.

    Inputs that lie a stride apart read gy under the same taps: one convolution of stride 1 for each
    of the stride's remainders.
    """
    if backend in ("torch", "reference") or (backend == "auto" and dtype == "float64"):
        return None  # float64 is for checks: it is not worth compiling kernels for
    if device != "cpu":
        return None  # there the gradient kernels serve every stride, and cuDNN the rest
    parts = []
    for start in product(*(range(min(s, n)) for s, n in _strides_and_sizes(geometry))):
        axes = [_axis(geometry, axis, first) for axis, first in enumerate(start)]
        if any(a is None for a in axes):
            parts.append(Part(start))
            continue
        taps, paddings, dilation = zip(*axes, strict=True)
        crop = tuple((max(-a, 0), max(-b, 0)) for a, b in paddings)
        kept = [o - sum(c) for o, c in zip(geometry.out_size, crop, strict=True)]
        if min(kept) < 1:
            parts.append(Part(start))
            continue
        k, c = geometry.out_channels, geometry.in_channels
        kernel = tuple(len(range(n)[t]) for n, t in zip(geometry.kernel, taps, strict=True))
        convolution = Geometry.of(
            (geometry.batch, k, *kept),
            (c, k // geometry.groups, *kernel),
            1,
            tuple((max(a, 0), max(b, 0)) for a, b in paddings),
            dilation,
            geometry.groups,
        )
        try:
            plan = plan_of_fresh_weights(
                convolution,
                dtype=dtype,
                device=device,
                precision=precision,
                layout=layout,
                backend=backend,
                tolerance=tolerance,
            )
        except UnsupportedError:
            return None
        if plan.backend == "torch":
            return None
        parts.append(Part(start, runner(plan), crop, taps))
    return tuple(parts)


def _strides_and_sizes(geometry: Geometry) -> list[tuple[int, int]]:
    return list(zip(geometry.stride, geometry.in_size, strict=True))


def _axis(geometry: Geometry, axis: int, first: int) -> tuple[slice, tuple[int, int], int] | None:
    """Of the inputs first, first + stride, ...: their taps, the padding of gy, and its dilation.

    Input i reads output o under tap k where o * stride + k * dilation - padding = i. Taps that
    share a remainder are `every` apart, and their outputs `step`.
    """
    s, d, (before, _) = geometry.stride[axis], geometry.dilation[axis], geometry.padding[axis]
    taps = [k for k in range(geometry.kernel[axis]) if (first + before - k * d) % s == 0]
    if not taps:
        return None
    every = s // gcd(s, d)
    step = every * d // s
    newest = (first + before - taps[0] * d) // s  # the output that the first input reads first
    count = -(-(geometry.in_size[axis] - first) // s)
    pads = ((len(taps) - 1) * step - newest, count + newest - geometry.out_size[axis])
    return slice(taps[0], None, every), pads, step


def _framework(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    geometry: Geometry,
    layout: str,
    which: int,
) -> Tensor:
    """PyTorch's own gradient; an asymmetric padding is undone by padding the input."""
    common = [min(pair) for pair in geometry.padding]
    rest = [(a - p, b - p) for (a, b), p in zip(geometry.padding, common, strict=True)]
    widths = [side for pair in reversed(rest) for side in pair]
    padded = [n + a + b for n, (a, b) in zip(geometry.in_size, rest, strict=True)]
    if not prod(geometry.y_shape):
        shape = geometry.x_shape if which == 0 else geometry.w_shape
        return grad.new_zeros(shape) if which else new_dense(shape, grad, layout).zero_()
    if input is None:
        x_shape = (geometry.batch, geometry.in_channels, *padded)
        input = grad.new_empty(1).expand(x_shape)
    elif any(widths):
        input = torch.nn.functional.pad(input, widths)
    if weight is None:
        weight = grad.new_empty(1).expand(geometry.w_shape)
    result = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        None,
        geometry.stride,
        common,
        geometry.dilation,
        False,
        [0] * geometry.n,
        geometry.groups,
        [which == 0, which == 1, False],
    )[which]
    if which == 1:
        return result.contiguous()
    for axis, ((before, _), size) in enumerate(zip(rest, geometry.in_size, strict=True), 2):
        result = result.narrow(axis, before, size)
    return dense(result, layout)
