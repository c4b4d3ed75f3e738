"""Gradients of convolutions as operators: each differentiates into the other two.

With y = conv(x, w), `fastconv::conv_input_gradient` (gy, w) -> gx and
`fastconv::conv_weight_gradient` (gy, x) -> gw are bilinear as conv is, so that the gradient of each
is made of the other two, to any order.

Groups are told by their channels, not by their number: a shard of whole groups is served alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import GeometryError
from .geometry import Geometry
from .layouts import layout_of
from .torch_ops_gradients import input_gradient, weight_gradient
from .torch_ops_register import define, register
from .torch_ops_runner import new_dense

define(
    "conv_input_gradient(Tensor grad, Tensor weight, SymInt[] input_size, int[] stride, "
    "int[] padding, int[] dilation, int group_outputs, str layout, str backend='auto', "
    "float tolerance=4.0) -> Tensor"
)
define(
    "conv_weight_gradient(Tensor grad, Tensor input, int[] weight_size, int[] stride, "
    "int[] padding, int[] dilation, str layout, str backend='auto', float tolerance=4.0) -> Tensor"
)


def pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(before, after, before, after, ...) -> one pair per axis."""
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def _checked(op: str, grad: Tensor, other: Tensor, geometry: Geometry) -> None:
    ops.check_arrays(op, grad=grad, other=other)
    if tuple(grad.shape) != geometry.y_shape:
        raise GeometryError(
            f"{op}: grad must have the result's shape {geometry.y_shape}, got {tuple(grad.shape)}"
        )


def _input_impl(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    group_outputs: int,
    layout: str,
    backend: str = "auto",
    tolerance: float = 4.0,
) -> Tensor:
    groups = max(1, grad.shape[1] // group_outputs)
    geometry = Geometry.of(
        (grad.shape[0], weight.shape[1] * groups, *input_size),
        weight.shape,
        tuple(stride),
        pairs(padding),
        tuple(dilation),
        groups,
        op="conv_input_gradient",
    )
    _checked("conv_input_gradient", grad, weight, geometry)
    return input_gradient(grad, weight, geometry, layout, backend, tolerance)


def _input_fake(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    group_outputs: int,
    layout: str,
    *_: Any,
    **__: Any,
) -> Tensor:
    groups = max(1, grad.shape[1] // group_outputs)
    return new_dense((grad.shape[0], weight.shape[1] * groups, *input_size), grad, layout)


def _weight_impl(
    grad: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    layout: str,
    backend: str = "auto",
    tolerance: float = 4.0,
) -> Tensor:
    geometry = Geometry.of(
        input.shape,
        (grad.shape[1], *weight_size),
        tuple(stride),
        pairs(padding),
        tuple(dilation),
        input.shape[1] // weight_size[0],
        op="conv_weight_gradient",
    )
    _checked("conv_weight_gradient", grad, input, geometry)
    return weight_gradient(grad, input, geometry, layout, backend)


def _weight_fake(
    grad: Tensor, input: Tensor, weight_size: Sequence[int], *_: Any, **__: Any
) -> Tensor:
    return grad.new_empty((grad.shape[1], *weight_size))


def _input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, _, stride, padding, dilation, _, _, backend, tolerance = inputs
    ctx.save_for_backward(grad, weight)
    ctx.arguments = (stride, padding, dilation)
    ctx.choice = (backend, tolerance)


def _input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad is that of gx, a tensor like x."""
    gy, weight = ctx.saved_tensors
    by_gy = by_weight = None
    if ctx.needs[0]:
        by_gy = convolution(grad, weight, None, *ctx.arguments, *ctx.choice)
    if ctx.needs[1]:
        by_weight = gradient_of_weight(gy, grad, weight.shape, *ctx.arguments, *ctx.choice)
    return by_gy, by_weight, *(None,) * 8


def _weight_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, input, _, stride, padding, dilation, _, backend, tolerance = inputs
    ctx.save_for_backward(grad, input)
    ctx.arguments = (stride, padding, dilation)
    ctx.choice = (backend, tolerance)


def _weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad is that of gw, a tensor like w."""
    gy, input = ctx.saved_tensors
    by_gy = by_input = None
    if ctx.needs[0]:
        by_gy = convolution(input, grad, None, *ctx.arguments, *ctx.choice)
    if ctx.needs[1]:
        by_input = gradient_of_input(gy, grad, input, *ctx.arguments, *ctx.choice)
    return by_gy, by_input, *(None,) * 7


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
    tolerance: float,
) -> Tensor:
    """The plain convolution by its operator."""
    return torch.ops.fastconv.conv(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        0,
        backend=backend,
        tolerance=tolerance,
    )


def gradient_of_input(
    grad: Tensor,
    weight: Tensor,
    input: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
    tolerance: float,
) -> Tensor:
    """gx in the layout of the input, by its operator."""
    groups = input.shape[1] // weight.shape[1]
    return torch.ops.fastconv.conv_input_gradient(
        grad,
        weight,
        input.shape[2:],
        stride,
        padding,
        dilation,
        weight.shape[0] // groups,
        layout_of(input),
        backend,
        tolerance,
    )


def gradient_of_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
    tolerance: float,
) -> Tensor:
    """gw by its operator."""
    return torch.ops.fastconv.conv_weight_gradient(
        grad,
        input,
        weight_shape[1:],
        stride,
        padding,
        dilation,
        layout_of(input),
        backend,
        tolerance,
    )


def gradient_of_bias(grad: Tensor) -> Tensor:
    """gy (N, K, *out_size) -> (K,)."""
    return grad.sum([0, *range(2, grad.dim())])


def through_activation(activation: str, grad: Tensor, output: Any, before: Any) -> Tensor:
    """The gradient in front of an activation.

    output, before: tensors behind and in front of the activation; of those in FROM_OUTPUT only the
    former is read, of others only the latter
    """
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, output, 0)
    if activation == "sigmoid":
        return aten.sigmoid_backward(grad, output)
    if activation == "silu":
        if torch.is_grad_enabled():  # aten's has no derivative
            sigmoid = torch.sigmoid(before)
            return grad * sigmoid * (1 + before * (1 - sigmoid))
        return aten.silu_backward(grad, before)
    if activation == "hardswish":
        return aten.hardswish_backward(grad, before)
    return grad


FROM_OUTPUT = ("none", "relu", "sigmoid")  # activations that need no recomputed input

register("conv_input_gradient", _input_impl, _input_fake, _input_context, _input_backward)
register("conv_weight_gradient", _weight_impl, _weight_fake, _weight_context, _weight_backward)
