"""The operator `fastconv::conv`: a convolution of 1, 2 or 3 axes with its epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, planner, winners
from .epilogue import Epilogue
from .errors import GeometryError
from .geometry import Geometry, SeparableGeometry
from .plan import Plan
from .torch_autograd import (
    FROM_OUTPUT,
    convolution,
    gradient_of_bias,
    gradient_of_input,
    gradient_of_weight,
    pairs,
    through_activation,
)
from .torch_ops_gradients import plan_of_fresh_weights
from .torch_ops_packed import held_weights
from .torch_ops_register import define, register
from .torch_ops_runner import Runner, dtype_of, new_dense, precision_of, runner

define(
    "conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation='none', Tensor? residual=None, str algorithm='auto', "
    "str backend='auto', float tolerance=4.0, int? max_workspace_bytes=None) -> Tensor"
)
MAX_ROUTES = 4096  # calls whose plan is remembered
_routes: dict[Any, Runner] = {}


def known(key: Any) -> Runner | None:
    """What ran the call with this key before."""
    try:
        return _routes.get(key)
    except TypeError:  # lists in it
        return _routes.get(repr(key))


def remember(key: Any, plan: Plan) -> Runner:
    """The plan's Runner, `known` by the key from now on."""
    if len(_routes) >= MAX_ROUTES:
        _routes.clear()
    found = runner(plan)
    try:
        _routes[key] = found
    except TypeError:
        _routes[repr(key)] = found
    return found


def plan_for(
    geometry: Geometry | SeparableGeometry,
    input: Tensor,
    epilogue: Epilogue | tuple[Epilogue, Epilogue, Epilogue],
    fresh: bool = False,
    **choice: Any,
) -> Plan:
    """The plan of an epilogue and a choice of algorithm for an input like this.

    fresh: the weights are packed for a single call
    """
    return (plan_of_fresh_weights if fresh else planner.plan)(
        geometry,  # type: ignore[arg-type]  # blocks do not ask for fresh weights
        dtype=dtype_of(input),
        device=input.device.type,
        precision=precision_of(input),
        epilogue=epilogue,
        layout=ops.layout_of(input),
        **choice,
    )


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    op: str = "conv",
    frozen: Tensor | None = None,
) -> Tensor:
    """The operator's implementation; arguments are checked when they come for the first time.

    op, frozen  of another operator: its name, and what it was given in the place of the weight
    """
    fresh = weight.requires_grad and torch.is_grad_enabled()  # in the next call they are others
    key = (
        input.shape,
        input.stride(),
        input.dtype,
        None if input.is_cpu else (input.device, precision_of(input)),
        weight.shape,
        weight.dtype,
        None if weight.is_cpu else weight.device,
        fresh,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        None if residual is None else (residual.shape, residual.dtype, residual.device),
        (*stride, *padding, *dilation, groups),
        activation,
        algorithm,
        backend,
        tolerance,
        max_workspace_bytes,
        winners.generation(),
    )
    found = _routes.get(key)
    if found is None:
        plan = _checked_plan(
            input, weight, bias, stride, padding, dilation, groups, activation, residual, op, fresh,
            algorithm=algorithm, backend=backend, tolerance=tolerance,
            max_workspace_bytes=max_workspace_bytes,
        )  # fmt: skip
        found = remember(key, plan)
    held = held_weights(weight) if frozen is None else held_weights(frozen, True)
    return found(input, held.form(found, weight), bias, residual)


def _checked_plan(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None,
    op: str,
    fresh: bool,
    **choice: Any,
) -> Plan:
    ops.check_arrays(op, input=input, weight=weight, bias=bias, residual=residual)
    if input.dim() != weight.dim() or not weight.shape[1]:
        raise GeometryError(
            f"{op}: input (N, C, *size) and weight (K, C / G, *kernel) must have as many axes, "
            f"got shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    geometry = Geometry.of(
        input.shape,
        weight.shape,
        tuple(stride),
        pairs(padding),
        tuple(dilation),
        # 0 stands for what the channels tell: shards of whole groups are served alike.
        groups or max(1, input.shape[1] // weight.shape[1]),
        op=op,
    )
    ops.check_extras(op, geometry.out_channels, geometry.y_shape, bias, residual)
    epilogue = Epilogue(bias is not None, activation, residual is not None)
    return plan_for(geometry, input, epilogue, fresh, **choice)


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *_: Any,
    **__: Any,
) -> Tensor:
    shape = result_shape(input.shape, weight.shape, stride, padding, dilation, groups)
    return new_dense(shape, input, ops.layout_of(input))


def result_shape(
    x_shape: Sequence[Any],
    w_shape: Sequence[Any],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Any, ...]:
    """The shape of a convolution's result; sizes may be symbols, which cannot be refused."""
    if all(isinstance(n, int) for n in (*x_shape, *w_shape)):
        groups = groups or x_shape[1] // w_shape[1]
        return Geometry.of(
            x_shape, w_shape, tuple(stride), pairs(padding), tuple(dilation), groups, op="conv"
        ).y_shape
    if len(x_shape) != len(w_shape):
        raise GeometryError(
            f"conv: input must have {len(w_shape)} dimensions, got shape {tuple(x_shape)}"
        )
    axes = zip(x_shape[2:], w_shape[2:], stride, pairs(padding), dilation, strict=True)
    size = tuple((n + sum(pads) - d * (k - 1) - 1) // s + 1 for n, k, s, pads, d in axes)
    return (x_shape[0], w_shape[0], *size)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, stride, padding, dilation, _, activation, residual, *choice = inputs
    # What stands before these activations is computed again in the backward pass.
    again = activation not in FROM_OUTPUT
    ctx.save_for_backward(
        input,
        weight,
        bias if again else None,
        residual if again else None,
        output if activation in ("relu", "sigmoid") else None,
    )
    ctx.arguments = (stride, padding, dilation)
    ctx.activation, (_, ctx.backend, ctx.tolerance, _) = activation, choice


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, residual, output = ctx.saved_tensors
    arguments, needs = (*ctx.arguments, ctx.backend, ctx.tolerance), ctx.needs
    before = None
    if ctx.activation not in FROM_OUTPUT:
        before = convolution(input, weight, bias, *arguments)
        before = before if residual is None else before + residual
    grad = through_activation(ctx.activation, grad, output, before)
    found: list[Tensor | None] = [None] * 13
    if needs[0]:
        found[0] = gradient_of_input(grad, weight, input, *arguments)
    if needs[1]:
        found[1] = gradient_of_weight(grad, input, weight.shape, *arguments)
    if needs[2]:
        found[2] = gradient_of_bias(grad)
    if needs[8]:
        found[8] = grad
    return tuple(found)


register("conv", run, _fake, _context, _backward, autocast="lower")
