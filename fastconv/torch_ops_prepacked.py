"""The operator `fastconv::conv_prepacked`: a convolution whose weights are frozen.

Its weights come as one plain tensor of one axis, made by `freeze`, so that exporting, compiling and
saving keep them as they keep any buffer. What a kernel reads is packed at the first call of a plan
and kept for as long as that tensor lives: of machine, layout and shape of the input nothing is
stored. Autocast brings everything else to their precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import GeometryError, UnsupportedError
from .torch_autograd import (
    FROM_OUTPUT,
    convolution,
    gradient_of_bias,
    gradient_of_input,
    through_activation,
)
from .torch_ops_conv import result_shape, run
from .torch_ops_register import define, register
from .torch_ops_runner import new_dense

define(
    "conv_prepacked(Tensor input, Tensor packed, Tensor? bias, int[] weight_size, int[] stride, "
    "int[] padding, int[] dilation, int groups, str activation='none', Tensor? residual=None, "
    "str algorithm='auto', str backend='auto', float tolerance=4.0, "
    "int? max_workspace_bytes=None) -> Tensor"
)


def freeze(weight: Tensor) -> Tensor:
    """Weights (K, C / G, *kernel) as `conv_prepacked` takes them: (K * C / G * taps,), a copy.

    Not to be written afterwards by ways that PyTorch does not count, `.data` for one.
    """
    ops.check_arrays("freeze", weight=weight)
    if not isinstance(weight, Tensor):
        raise UnsupportedError("freeze: weight must be a PyTorch tensor, got a NumPy array")
    return weight.detach().clone(memory_format=torch.contiguous_format).reshape(-1)


def _weight(packed: Tensor, size: Sequence[int]) -> Tensor:
    if packed.dim() != 1 or packed.numel() != prod(size):
        raise GeometryError(
            f"conv_prepacked: packed must have shape ({prod(size)},) for weights of size "
            f"{tuple(size)}, got {tuple(packed.shape)}"
        )
    return packed.view(tuple(size))


def _impl(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = 4.0,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    return run(
        input, _weight(packed, weight_size), bias, stride, padding, dilation, groups, activation,
        residual, algorithm, backend, tolerance, max_workspace_bytes, "conv_prepacked", packed,
    )  # fmt: skip


def _fake(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *_: Any,
    **__: Any,
) -> Tensor:
    shape = result_shape(input.shape, weight_size, stride, padding, dilation, groups)
    return new_dense(shape, input, ops.layout_of(input))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, packed, bias, size, stride, padding, dilation, _, activation, residual = inputs[:10]
    again = activation not in FROM_OUTPUT
    ctx.save_for_backward(
        input,
        packed,
        bias if again else None,
        residual if again else None,
        output if activation in ("relu", "sigmoid") else None,
    )
    ctx.size, ctx.arguments = size, (stride, padding, dilation)
    ctx.activation, (ctx.backend, ctx.tolerance) = activation, inputs[11:13]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Frozen weights have no gradient."""
    input, packed, bias, residual, output = ctx.saved_tensors
    weight, before = packed.view(tuple(ctx.size)), None
    arguments = (*ctx.arguments, ctx.backend, ctx.tolerance)
    if ctx.activation not in FROM_OUTPUT:
        before = convolution(input, weight, bias, *arguments)
        before = before if residual is None else before + residual
    grad = through_activation(ctx.activation, grad, output, before)
    found: list[Tensor | None] = [None] * 14
    if ctx.needs[0]:
        found[0] = gradient_of_input(grad, weight, input, *arguments)
    if ctx.needs[2]:
        found[2] = gradient_of_bias(grad)
    if ctx.needs[9]:
        found[9] = grad
    return tuple(found)


register("conv_prepacked", _impl, _fake, _context, _backward, autocast="packed")
