"""The operator `fastconv::separable_block`: three convolutions, each with its epilogue, in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, winners
from .epilogue import Epilogue
from .geometry import SeparableGeometry
from .plan import Plan
from .torch_autograd import (
    convolution,
    gradient_of_bias,
    gradient_of_input,
    gradient_of_weight,
    pairs,
    through_activation,
)
from .torch_ops_conv import known, plan_for, remember, result_shape
from .torch_ops_packed import held_weights
from .torch_ops_register import define, register
from .torch_ops_runner import Runner, new_dense, precision_of

define(
    "separable_block(Tensor input, Tensor temporal_weight, Tensor depthwise_weight, "
    "Tensor pointwise_weight, Tensor? temporal_bias, Tensor? depthwise_bias, "
    "Tensor? pointwise_bias, int[] stride, int[] padding, str[] activations, "
    "Tensor? residual=None, str backend='auto', float tolerance=4.0, "
    "int? max_workspace_bytes=None) -> Tensor"
)
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
}


def _geometry(
    input: Tensor, weights: Sequence[Tensor], stride: Sequence[int], padding: Sequence[int]
) -> SeparableGeometry:
    temporal, depthwise, pointwise = (w.shape for w in weights)
    return SeparableGeometry.of(
        input.shape, temporal, depthwise, pointwise, tuple(stride), pairs(padding)
    )


def _impl(
    input: Tensor,
    temporal_weight: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    temporal_bias: Tensor | None,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    activations: Sequence[str],
    residual: Tensor | None = None,
    backend: str = "auto",
    tolerance: float = 4.0,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    weights = (temporal_weight, depthwise_weight, pointwise_weight)
    biases = (temporal_bias, depthwise_bias, pointwise_bias)
    key = (
        (input.shape, input.stride(), input.dtype, input.device, precision_of(input)),
        tuple((w.shape, w.dtype, w.device) for w in weights),
        tuple(None if b is None else (b.shape, b.dtype, b.device) for b in biases),
        None if residual is None else (residual.shape, residual.dtype, residual.device),
        (*stride, *padding, *activations),
        (backend, tolerance, max_workspace_bytes, winners.generation()),
    )
    found = known(key)
    if found is None:
        plan = _plan(
            input, weights, biases, stride, padding, activations, residual,
            backend=backend, tolerance=tolerance, max_workspace_bytes=max_workspace_bytes,
        )  # fmt: skip
        found = remember(key, plan)
    return found(input, held_together(weights, found), biases, residual)


def held_together(weights: tuple[Tensor, Tensor, Tensor], runner: Runner) -> Any:
    """The packed form of three weights, kept with the first; packed anew if any was written."""
    first, others = held_weights(weights[0]), tuple(map(held_weights, weights[1:]))
    return first.form_with(runner, weights, others)


def _plan(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stride: Sequence[int],
    padding: Sequence[int],
    activations: Sequence[str],
    residual: Tensor | None,
    **choice: Any,
) -> Plan:
    op = "separable_block"
    named = {f"{n}_weight": w for n, w in zip(_STAGES, weights, strict=True)}
    named |= {f"{n}_bias": b for n, b in zip(_STAGES, biases, strict=True) if b is not None}
    ops.check_arrays(op, input=input, **named, residual=residual)
    geometry = _geometry(input, weights, stride, padding)
    for stage, bias in zip(geometry.stages, biases, strict=True):
        last = stage is geometry.pointwise
        ops.check_extras(op, stage.out_channels, stage.y_shape, bias, residual if last else None)
    first, second, third = (b is not None for b in biases)
    epilogue = (
        Epilogue(first, activations[0]),
        Epilogue(second, activations[1]),
        Epilogue(third, activations[2], residual is not None),
    )
    return plan_for(geometry, input, epilogue, **choice)


_STAGES = ("temporal", "depthwise", "pointwise")


def _fake(
    input: Tensor,
    temporal_weight: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    temporal_bias: Tensor | None,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    *_: Any,
    **__: Any,
) -> Tensor:
    shape: Sequence[Any] = input.shape
    for stage, weight in zip(
        stages_of(stride, padding),
        (temporal_weight, depthwise_weight, pointwise_weight),
        strict=True,
    ):
        shape = result_shape(shape, weight.shape, *stage, 0)
    return new_dense(shape, input, ops.layout_of(input))


def stages_of(
    stride: Sequence[int], padding: Sequence[int]
) -> tuple[tuple[list[int], list[int], list[int]], ...]:
    """Stride, padding and dilation of a block's three convolutions."""
    one, none = [1, 1, 1], [0] * 6
    return (
        ([stride[0], 1, 1], [*padding[:2], 0, 0, 0, 0], one),
        ([1, *stride[1:]], [0, 0, *padding[2:]], one),
        (one, none, one),
    )


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, (stride, padding, activations, residual, *choice) = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, residual)
    ctx.stages, ctx.activations = stages_of(stride, padding), activations
    ctx.choice = choice[:2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The stages once more, of tensors that know where they come from, and backwards."""
    input, *rest, residual = ctx.saved_tensors
    weights, biases, needs = rest[:3], rest[3:], ctx.needs
    inputs, before = [input], []
    for i, (stage, activation) in enumerate(zip(ctx.stages, ctx.activations, strict=True)):
        z = convolution(inputs[i], weights[i], biases[i], *stage, *ctx.choice)
        before.append(z if i < 2 or residual is None else z + residual)
        inputs.append(ACTIVATIONS[activation](before[i]))
    found: list[Tensor | None] = [None] * 14
    for i in (2, 1, 0):
        stage = (*ctx.stages[i], *ctx.choice)
        grad = through_activation(ctx.activations[i], grad, inputs[i + 1], before[i])
        if i == 2 and needs[10]:
            found[10] = grad
        if needs[1 + i]:
            found[1 + i] = gradient_of_weight(grad, inputs[i], weights[i].shape, *stage)
        if needs[4 + i]:
            found[4 + i] = gradient_of_bias(grad)
        if i or needs[0]:
            grad = gradient_of_input(grad, weights[i], inputs[i], *stage)
    if needs[0]:
        found[0] = grad
    return tuple(found)


register("separable_block", _impl, _fake, _context, _backward, autocast="lower")
