"""Batching rules for `torch.func.vmap`: the new axis goes to the batch, or, where each of its
entries has weights of its own, to the groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError
from .torch_ops_block import stages_of
from .torch_ops_register import library


def register() -> None:
    """Give the operators their rules."""
    for name, rule in (
        ("conv", _conv),
        ("conv_input_gradient", _input_gradient),
        ("conv_weight_gradient", _weight_gradient),
        ("separable_block", _block),
        ("conv_prepacked", _prepacked),
    ):
        op = getattr(torch.ops.fastconv, name).default
        torch.library.register_vmap(f"fastconv::{name}", _complete(op, rule), lib=library)


def register_steps() -> None:
    """The same for the steps of streams."""
    ops = torch.ops.fastconv
    functional = _complete(ops.continual_step_functional.default, _step)
    name = "fastconv::continual_step_functional"
    torch.library.register_vmap(name, functional, lib=library)
    torch.library.register_vmap("fastconv::continual_step", _refused_step, lib=library)


def _complete(op: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for a call whose defaults were left out."""
    defaults = [a.default_value for a in op._schema.arguments]

    def complete(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        dims = (*in_dims, *(None,) * (len(defaults) - len(given)))
        return rule(info.batch_size, dims, *given, *defaults[len(given) :])

    return complete


def _to_batch(size: int, tensor: Tensor | None, dim: int | None) -> Any:
    """(N, C, ...) -> (size * N, C, ...); None stays None."""
    return None if tensor is None else _front(size, tensor, dim).flatten(0, 1)


def _to_channels(size: int, tensor: Tensor | None, dim: int | None) -> Any:
    """(N, C, ...) -> (N, size * C, ...)."""
    return None if tensor is None else _front(size, tensor, dim).movedim(0, 1).flatten(1, 2)


def _front(size: int, tensor: Tensor, dim: int | None) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _conv(size: int, dims: Any, x: Tensor, w: Tensor, bias: Any, *rest: Any) -> tuple[Tensor, int]:
    stride, padding, dilation, groups, activation, residual, *choice = rest
    op = torch.ops.fastconv.conv
    if dims[1] is None and dims[2] is None:
        x, r = _to_batch(size, x, dims[0]), _to_batch(size, residual, dims[8])
        y = op(x, w, bias, stride, padding, dilation, groups, activation, r, *choice)
        return y.unflatten(0, (size, -1 if y.shape[0] else 0)), 0
    groups = size * (groups or x.shape[1 + (dims[0] is not None)] // _inputs(w, dims[1]))
    x, r = _to_channels(size, x, dims[0]), _to_channels(size, residual, dims[8])
    w, b = _to_batch(size, w, dims[1]), _to_batch(size, bias, dims[2])
    y = op(x, w, b, stride, padding, dilation, groups, activation, r, *choice)
    return y.unflatten(1, (size, -1)), 1


def _inputs(weight: Tensor, dim: int | None) -> int:
    """Input channels per group."""
    shape = list(weight.shape)
    if dim is not None:
        del shape[dim]
    return shape[1]


def _input_gradient(
    size: int, dims: Any, grad: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    op = torch.ops.fastconv.conv_input_gradient
    if dims[1] is None:
        gx = op(_to_batch(size, grad, dims[0]), weight, *rest)
        return gx.unflatten(0, (size, -1 if gx.shape[0] else 0)), 0
    gx = op(_to_channels(size, grad, dims[0]), _to_batch(size, weight, dims[1]), *rest)
    return gx.unflatten(1, (size, -1)), 1


def _weight_gradient(
    size: int, dims: Any, grad: Tensor, input: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    grad, input = (_to_channels(size, t, d) for t, d in zip((grad, input), dims, strict=False))
    gw = torch.ops.fastconv.conv_weight_gradient(grad, input, *rest)
    return gw.unflatten(0, (size, -1)), 0


def _block(size: int, dims: Any, *given: Any) -> tuple[Tensor, int]:
    tensors, (stride, padding, activations, residual, *choice) = given[:7], given[7:]
    if any(d is not None for d in dims[1:7]):
        return _block_by_stages(size, dims, tensors, residual, (stride, padding), activations)
    x, r = _to_batch(size, tensors[0], dims[0]), _to_batch(size, residual, dims[10])
    y = torch.ops.fastconv.separable_block(
        x, *tensors[1:], stride, padding, activations, r, *choice
    )
    return y.unflatten(0, (size, -1 if y.shape[0] else 0)), 0


def _block_by_stages(
    size: int, dims: Any, tensors: Any, residual: Any, stages: Any, activations: Any
) -> tuple[Tensor, int]:
    """Weights of each entry's own: three convolutions, by their rule."""
    x, at = tensors[0], dims[0]
    for i, (stride, padding, dilation) in enumerate(stages_of(*stages)):
        w, b = tensors[1 + i], tensors[4 + i]
        added, added_at = (residual, dims[10]) if i == 2 else (None, None)
        where = (at, dims[1 + i], dims[4 + i], *(None,) * 5, added_at)
        rest = (stride, padding, dilation, 0, activations[i], added, "auto", "auto", 4.0, None)
        x, at = _conv(size, where, x, w, b, *rest)
    return x, at


def _prepacked(
    size: int, dims: Any, x: Tensor, packed: Tensor, bias: Any, *rest: Any
) -> tuple[Tensor, int]:
    if dims[1] is not None or dims[2] is not None:
        raise UnsupportedError(
            "vmap over packed weights is not served; use fastconv::conv with the weights themselves"
        )
    size_and_steps, activation, residual, choice = rest[:5], rest[5], rest[6], rest[7:]
    x, r = _to_batch(size, x, dims[0]), _to_batch(size, residual, dims[9])
    y = torch.ops.fastconv.conv_prepacked(x, packed, bias, *size_and_steps, activation, r, *choice)
    return y.unflatten(0, (size, -1 if y.shape[0] else 0)), 0


def _step(size: int, dims: Any, x: Tensor, state: Tensor, steps: Tensor, *rest: Any) -> Any:
    weight, bias, *geometry, activation, residual, active = rest[:9]
    if dims[3] is not None or dims[4] is not None:
        raise UnsupportedError("vmap over the weights of a step is not served")
    batches = (_to_batch(size, t, d) for t, d in zip((x, state, steps), dims, strict=False))
    r, a = _to_batch(size, residual, dims[10]), _to_batch(size, active, dims[11])
    result = torch.ops.fastconv.continual_step_functional(
        *batches, weight, bias, *geometry, activation, r, a, *rest[9:]
    )
    streams = x.shape[int(dims[0] == 0)]
    return tuple(t.unflatten(0, (size, streams)) for t in result), (0, 0, 0)


def _refused_step(info: Any, in_dims: Any, *given: Any) -> Any:
    raise UnsupportedError(
        "vmap over fastconv::continual_step, which writes its state, is not served; use "
        "fastconv::continual_step_functional, or more streams in one state"
    )
