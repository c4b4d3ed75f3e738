"""The tensor side of `ops`: the operators `fastconv::conv` and `fastconv::separable_block`.

Each has a fake, gradients to any order, a rule for autocast and one for vmap; torch_autograd.py
has the operators that their gradients are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, ops, planner, winners
from .epilogue import Epilogue
from .errors import GeometryError, UnsupportedError
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
from .torch_ops_packed import ON_TENSORS as ON_TENSORS
from .torch_ops_packed import PackedWeights as PackedWeights
from .torch_ops_packed import _packed as _packed
from .torch_ops_packed import held_weights
from .torch_ops_packed import view as _view
from .torch_ops_register import register
from .torch_ops_runner import FLOAT32 as _FLOAT32
from .torch_ops_runner import (
    Runner,
    dense,
    device_workspace,
    dtype_of,
    is_plain,
    new_dense,
    packed_weights,
    precision_of,
    runner,
)
from .torch_ops_runner import execute as execute
from .torch_ops_runner import follow_threads as _follow_threads

_library = torch.library.Library("fastconv", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation='none', Tensor? residual=None, str algorithm='auto', "
    "str backend='auto', float tolerance=4.0, int? max_workspace_bytes=None) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "separable_block(Tensor input, Tensor temporal_weight, Tensor depthwise_weight, "
    "Tensor pointwise_weight, Tensor? temporal_bias, Tensor? depthwise_bias, "
    "Tensor? pointwise_bias, int[] stride, int[] padding, str[] activations, "
    "Tensor? residual=None, str backend='auto', float tolerance=4.0, "
    "int? max_workspace_bytes=None) -> Tensor",
    tags=_TAGS,
)
_ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
}
MAX_ROUTES = 4096  # calls whose plan is remembered
_routes: dict[Any, Runner] = {}


def key_of(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
    """What tells a call of `ops` from others of the same function; None where it needs more than a
    plan: a gradient, a trace, a refusal.

    tensors  input, weights, biases, residual
    """
    if not is_plain(*tensors):
        return None
    input, *rest = tensors
    assert input is not None
    shapes = tuple(None if t is None else t.shape for t in rest)
    of_input = (input.shape, input.stride(), input.dtype, input.device)
    try:
        hash(options)
    except TypeError:  # lists of numbers, or of pairs
        options = tuple(map(repr, options))
    return of_input, shapes, options, winners.generation(), precision_of(input)


def again(
    key: Any, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor | None:
    """The convolution whose key was seen before; None if it was not."""
    found = _routes.get(key)
    if found is None:
        return None
    return found(input, held_weights(weight).form(found, weight), bias, residual)


def remember(key: Any, plan: Plan) -> Runner:
    """The plan's Runner, which `_routes` finds by the key from now on."""
    if len(_routes) >= MAX_ROUTES:
        _routes.clear()
    found = _routes[key] = runner(plan)
    return found


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    residual: Tensor | None,
    key: Any = None,
    **choice: Any,
) -> Tensor:
    """`ops.conv3d` and its kin on tensors that the door has checked; differentiable.

    key     from `key_of`
    choice  algorithm, backend, tolerance, max_workspace_bytes
    """
    if key is not None:
        found = remember(key, _plan(geometry, input, epilogue, **choice))
        return found(input, held_weights(weight).form(found, weight), bias, residual)
    padding = [p for pair in geometry.padding for p in pair]
    arguments = (input, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
    given = [t for t in (input, weight, bias, residual) if t is not None]
    fused = epilogue.activation != "none" or residual is not None
    if fused and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        # What the fused operator's gradient would compute again is kept instead.
        z = torch.ops.fastconv.conv(*arguments, **choice)
        return _ACTIVATIONS[epilogue.activation](z if residual is None else z + residual)
    return torch.ops.fastconv.conv(
        *arguments, activation=epilogue.activation, residual=residual, **choice
    )


def _plan(
    geometry: Geometry | SeparableGeometry,
    input: Tensor,
    epilogue: Epilogue | tuple[Epilogue, Epilogue, Epilogue],
    **choice: Any,
) -> Plan:
    return planner.plan(
        geometry,
        dtype=dtype_of(input),
        device=input.device.type,
        precision=precision_of(input),
        epilogue=epilogue,
        layout=ops.layout_of(input),
        **choice,
    )


def _groups(input: Tensor, weight: Tensor, groups: int) -> int:
    """0 stands for the number that the channels tell: shards of whole groups are served alike."""
    return groups or input.shape[1] // weight.shape[1]


def _conv_impl(
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
) -> Tensor:
    refuse_tangents(input, weight, bias, residual)
    if input.layout is not torch.strided or weight.layout is not torch.strided:
        ops.check_arrays("conv", input=input, weight=weight)
    key = (
        (input.shape, input.stride(), input.dtype, input.device, precision_of(input)),
        (weight.shape, weight.dtype, weight.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        None if residual is None else (residual.shape, residual.dtype, residual.device),
        (*stride, *padding, *dilation, groups),
        (activation, algorithm, backend, tolerance, max_workspace_bytes, winners.generation()),
    )
    found = _routes.get(key)
    if found is None:
        ops.check_arrays("conv", input=input, weight=weight, bias=bias, residual=residual)
        geometry = Geometry.of(
            input.shape,
            weight.shape,
            tuple(stride),
            pairs(padding),
            tuple(dilation),
            _groups(input, weight, groups),
            op="conv",
        )
        ops.check_extras("conv", geometry.out_channels, geometry.y_shape, bias, residual)
        plan = _plan(
            geometry,
            input,
            Epilogue(bias is not None, activation, residual is not None),
            algorithm=algorithm,
            backend=backend,
            tolerance=tolerance,
            max_workspace_bytes=max_workspace_bytes,
        )
        found = remember(key, plan)
    return found(input, held_weights(weight).form(found, weight), bias, residual)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise UnsupportedError for a tensor with a forward gradient, which would be lost."""
    forward = torch.autograd.forward_ad
    if forward._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError(
                "fastconv has no forward-mode gradients; use torch.autograd.grad or backward()"
            )


def _conv_fake(
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


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
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


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, residual, output = ctx.saved_tensors
    arguments, needs = (*ctx.arguments, ctx.backend, ctx.tolerance), ctx.needs
    before = None
    if ctx.activation not in FROM_OUTPUT:
        before = convolution(input, weight, *arguments, bias=bias)
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


def separable_block(
    input: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: Sequence[Tensor | None],
    geometry: SeparableGeometry,
    epilogue: tuple[Epilogue, Epilogue, Epilogue],
    residual: Tensor | None,
    **choice: Any,
) -> Tensor:
    """`ops.separable_block` on tensors; three convolutions where a gradient is asked for."""
    given = [t for t in (input, *weights, *biases, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        # What the block's gradient would compute again is kept instead.
        for i, stage in enumerate(geometry.stages):
            rest = residual if i == 2 else None
            input = conv(input, weights[i], biases[i], stage, epilogue[i], rest, **choice)
        return input
    temporal, depthwise, _ = geometry.stages
    stride = (temporal.stride[0], *depthwise.stride[1:])
    paddings = (temporal.padding[0], *depthwise.padding[1:])
    return torch.ops.fastconv.separable_block(
        input,
        *weights,
        *biases,
        stride,
        [p for pair in paddings for p in pair],
        [e.activation for e in epilogue],
        residual,
        **choice,
    )


def _block_geometry(
    input: Tensor, weights: Sequence[Tensor], stride: Sequence[int], padding: Sequence[int]
) -> SeparableGeometry:
    return SeparableGeometry.of(
        input.shape, *(w.shape for w in weights), tuple(stride), pairs(padding)
    )


def _block_impl(
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
    refuse_tangents(input, *weights, *biases, residual)
    key = (
        (input.shape, input.stride(), input.dtype, input.device, precision_of(input)),
        tuple((w.shape, w.dtype, w.device) for w in weights),
        tuple(None if b is None else (b.shape, b.dtype, b.device) for b in biases),
        None if residual is None else (residual.shape, residual.dtype, residual.device),
        (*stride, *padding, *activations),
        (backend, tolerance, max_workspace_bytes, winners.generation()),
    )
    found = _routes.get(key)
    if found is None:
        plan = _block_plan(
            input, weights, biases, stride, padding, activations, residual,
            backend=backend, tolerance=tolerance, max_workspace_bytes=max_workspace_bytes,
        )  # fmt: skip
        found = remember(key, plan)
    return found(input, held_together(weights, found), biases, residual)


def held_together(weights: tuple[Tensor, Tensor, Tensor], runner: Runner) -> Any:
    """The packed form of three weights, kept with the first; packed anew if any was written."""
    first, others = held_weights(weights[0]), tuple(map(held_weights, weights[1:]))
    return first.form_with(runner, weights, others)


def _block_plan(
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
    geometry = _block_geometry(input, weights, stride, padding)
    for stage, bias in zip(geometry.stages, biases, strict=True):
        last = stage is geometry.pointwise
        ops.check_extras(op, stage.out_channels, stage.y_shape, bias, residual if last else None)
    first, second, third = (b is not None for b in biases)
    epilogue = (
        Epilogue(first, activations[0]),
        Epilogue(second, activations[1]),
        Epilogue(third, activations[2], residual is not None),
    )
    return _plan(geometry, input, epilogue, **choice)


_STAGES = ("temporal", "depthwise", "pointwise")


def _block_fake(
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


def _block_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, (stride, padding, activations, residual, *choice) = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, residual)
    ctx.stages, ctx.activations = stages_of(stride, padding), activations
    ctx.choice = choice[:2]


def _block_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The stages once more, of tensors that know where they come from, and backwards."""
    input, *rest, residual = ctx.saved_tensors
    weights, biases, needs = rest[:3], rest[3:], ctx.needs
    inputs, before = [input], []
    for i, (stage, activation) in enumerate(zip(ctx.stages, ctx.activations, strict=True)):
        z = convolution(inputs[i], weights[i], *stage, *ctx.choice, bias=biases[i])
        before.append(z if i < 2 or residual is None else z + residual)
        inputs.append(_ACTIVATIONS[activation](before[i]))
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


register(_library, "conv", _conv_impl, _conv_fake, _conv_context, _conv_backward, autocast=True)
register(
    _library,
    "separable_block",
    _block_impl,
    _block_fake,
    _block_context,
    _block_backward,
    autocast=True,
)


def new_state(shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Zero frames of this shape in the layout, precision and device of `like`, and zero steps."""
    frames = new_dense(shape, like, ops.layout_of(like)).zero_()
    return frames, torch.zeros(shape[0], dtype=torch.int64, device=like.device)


def continual_step(
    plan: Plan,
    input: Tensor,
    state: ops.State,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`ops.continual_step` on tensors; no gradient is kept."""
    with torch.no_grad():
        shape = (*plan.geometry.y_shape[:2], *plan.geometry.y_shape[3:])
        y = new_dense(shape, input, plan.layout)
        packed = packed_weights(plan, weight)
        if plan.backend in ON_TENSORS:
            if y.numel():
                module = backends.kernel("continual", plan.backend)
                x, r = dense(input, plan.layout), dense(residual, plan.layout)
                scratch = device_workspace(module.workspace_size(plan), y)
                module.run(plan, x, packed, bias, r, state.frames, state.steps, y, scratch)
        elif plan.backend == "c":
            if y.numel():
                x, r = dense(input, plan.layout), dense(residual, plan.layout)
                workspace = ops.workspace(packed.workspace_size(), _FLOAT32)
                packed.step(x, bias, r, state.frames, state.steps, y, workspace)
        else:
            if plan.backend == "numba":
                _follow_threads()
            x, b, r = map(_view, (input, bias, residual))
            views = ops.State(_view(state.frames), _view(state.steps))
            ops.run_step(plan, x, packed, b, r, views, _view(y))
    return y
