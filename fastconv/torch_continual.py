"""The tensor side of `continual`: the operators `fastconv::continual_step`, which writes the state
in place, and `fastconv::continual_step_functional`, which returns a new one and has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import (
    backends,
    continual,
    ops,
    torch_memory,
    torch_ops,
    torch_ops_block,
    torch_ops_packed,
    torch_ops_runner,
    torch_ops_vmap,
    winners,
)
from .continual import State
from .counts import ELEMENT_BYTES
from .epilogue import Epilogue
from .errors import UnsupportedError
from .geometry import Geometry
from .ops import workspace_address
from .plan import DEFAULT_TOLERANCE, Plan
from .torch_ops_register import cast_by_autocast, define, register
from .torch_ops_runner import flat, is_plain

_ARGUMENTS = (
    "Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "str activation='none', Tensor? residual=None, Tensor? active=None, bool update_state=True, "
    "str form='ring', str start='zeros', str algorithm='auto', str backend='auto', "
    f"float tolerance={DEFAULT_TOLERANCE}, int? max_workspace_bytes=None"
)
define(f"continual_step(Tensor input, Tensor(a!) state, Tensor(b!) steps, {_ARGUMENTS}) -> Tensor")
define(
    f"continual_step_functional(Tensor input, Tensor state, Tensor steps, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)"
)
_APART = ("state", "steps", "active")  # tensors of a precision of their own
MAX_STEPPERS = 4096  # kinds of steps that are remembered
_steppers: dict[Any, Stepper] = {}


def new_state(shape: Sequence[int], like: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Zero maps of this shape in the layout and on the device of `like`, and zero steps."""
    # Not from recycled memory: a state may be resized or saved like any tensor.
    size = shape if ops.layout_of(like) == ops.CONTIGUOUS else (shape[0], *shape[2:], shape[1])
    memory = torch.zeros(tuple(size), dtype=getattr(torch, dtype), device=like.device)
    frames = memory if tuple(size) == tuple(shape) else memory.movedim(-1, 1)
    return frames, torch.zeros(shape[0], dtype=torch.int64, device=like.device)


def as_weights_are(weight: Tensor, *tensors: Any) -> Sequence[Any]:
    """Under autocast, what comes is brought to the precision of the weights; a state keeps its
    own."""
    device = weight.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return cast_by_autocast(device, tensors, weight.dtype)


def finder() -> Any:
    """How the door finds a geometry: what a compiler traces remembers nothing."""
    compiling = torch.compiler.is_compiling()
    return continual.window_geometry if compiling else continual.known_geometry


def key_of(
    input: Tensor,
    state: State,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    options: tuple[Any, ...],
) -> Any:
    """What tells a step from others; None where it needs more than a plan: a trace, a refusal."""
    frames, steps = state.frames, state.steps
    if weight is None or not is_plain(input, weight, bias, residual, gradients=False):
        return None
    for part in (frames, steps):
        if type(part) is not Tensor or part.layout is not torch.strided or part.is_nested:
            return None
    try:
        return (
            input.shape,
            input.stride(),
            input.dtype,
            None if input.is_cpu else (input.device, torch_ops.precision_of(input)),
            frames.shape,
            frames.stride(),
            frames.dtype,
            frames.is_cpu or frames.device,
            steps.shape,
            steps.stride(),
            steps.dtype,
            steps.is_cpu or steps.device,
            state.form,
            state.start,
            state.stride,
            weight.shape,
            None if bias is None else bias.shape,
            None if residual is None else residual.shape,
            options,
            winners.generation(),
        )
    except RuntimeError:  # a weight without a shape; the door refuses it
        return None


def known(key: Any) -> Stepper | None:
    """What ran the step with this key before."""
    try:
        return _steppers.get(key)
    except TypeError:  # lists in it
        return _steppers.get(repr(key))


def _remember(key: Any, plan: Plan) -> Stepper:
    """The plan's Stepper, `known` by the key from now on."""
    if len(_steppers) >= MAX_STEPPERS:
        _steppers.clear()
    found = stepper(plan)
    try:
        _steppers[key] = found
    except TypeError:
        _steppers[repr(key)] = found
    return found


def continual_step(
    input: Tensor,
    state: State,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    residual: Tensor | None,
    active: Tensor | None,
    update_state: bool,
    key: Any = None,
    **choice: Any,
) -> Tensor:
    """`continual.continual_step` on tensors that the door has checked; no gradient is kept.

    key     from `key_of`
    choice  algorithm, backend, tolerance, max_workspace_bytes
    """
    continual.check_state("continual_step", state, geometry, input)
    if key is not None:
        ready = _remember(key, _plan_for(input, state, geometry, epilogue, **choice))
        return ready.step(input, state, weight, bias, residual, active, update_state)
    arguments = (input, state.frames, state.steps, weight, bias, *_plain(geometry))
    options = choice | {
        "activation": epilogue.activation,
        "residual": residual,
        "active": active,
        "update_state": update_state,
        "form": state.form,
        "start": state.start,
    }
    with torch.no_grad():
        y: Tensor
        if torch.compiler.is_compiling():
            # Inductor takes a clone of the state between two steps for the state itself.
            y, frames, steps = torch.ops.fastconv.continual_step_functional(*arguments, **options)
            if update_state:
                state.frames.copy_(frames)
                state.steps.copy_(steps)
        else:
            y = torch.ops.fastconv.continual_step(*arguments, **options)
    return y


def continual_step_functional(
    input: Tensor,
    state: State,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    residual: Tensor | None,
    **options: Any,
) -> tuple[Tensor, State]:
    """`continual.continual_step_functional` on tensors that the door has checked."""
    given = [t for t in (input, state.frames, weight, bias, residual) if t is not None]
    fused = epilogue.activation != "none" or residual is not None
    apart = fused and torch.is_grad_enabled() and any(t.requires_grad for t in given)
    # The operator's gradient is that of a convolution; PyTorch differentiates the rest.
    y, frames, steps = torch.ops.fastconv.continual_step_functional(
        input,
        state.frames,
        state.steps,
        weight,
        bias,
        *_plain(geometry),
        activation="none" if apart else epilogue.activation,
        residual=None if apart else residual,
        form=state.form,
        start=state.start,
        **options,
    )
    if apart:
        z = y if residual is None else y + residual
        z = torch_ops_block.ACTIVATIONS[epilogue.activation](z)
        there = _emitting(geometry, state.steps, options.get("active"))
        y = z if there is None else torch.where(_over(there, z), z, torch.zeros_like(z))
    return y, State(frames, steps, state.form, state.start, state.stride)


def _plain(g: Geometry) -> tuple[Any, ...]:
    """stride, padding, dilation and groups as the operators take them."""
    return g.stride, [p for pair in g.padding for p in pair], g.dilation, g.groups


def _window(
    input: Tensor,
    state: State,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    """The geometry of one column of what an operator is given; checks the state against it."""
    op, pairs = "continual_step", tuple(zip(padding[::2], padding[1::2], strict=True))
    g = continual.window_geometry(
        op, input.shape, weight.shape, tuple(stride), pairs, tuple(dilation), groups
    )
    continual.check_state(op, state, g, input)
    return g


def _step_impl(
    input: Tensor,
    state: Tensor,
    steps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    active: Tensor | None = None,
    update_state: bool = True,
    form: str = "ring",
    start: str = "zeros",
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    key = (
        input.shape,
        input.stride(),
        input.dtype,
        None if input.is_cpu else (input.device, torch_ops.precision_of(input)),
        (state.shape, state.stride(), state.dtype, state.is_cpu or state.device),
        (steps.shape, steps.stride(), steps.dtype, steps.is_cpu or steps.device),
        (weight.shape, weight.dtype, weight.is_cpu or weight.device),
        None if bias is None else (bias.shape, bias.dtype, bias.is_cpu or bias.device),
        None if residual is None else (residual.shape, residual.dtype, residual.device),
        (*stride, *padding, *dilation, groups),
        activation,
        form,
        start,
        algorithm,
        backend,
        tolerance,
        max_workspace_bytes,
        winners.generation(),
    )
    ready = _steppers.get(key)
    if ready is None:
        memory = State(state, steps, form, start, stride[0])
        ring = {"state": state} if form == "ring" else {}
        ops.check_arrays(
            "continual_step", input=input, **ring, weight=weight, bias=bias, residual=residual
        )
        window = _window(input, memory, weight, stride, padding, dilation, groups)
        op, last = "continual_step", continual.column_shape(window)
        ops.check_extras(op, window.out_channels, last, bias, residual)
        epilogue = Epilogue(bias is not None, activation, residual is not None)
        plan = _plan_for(
            input, memory, window, epilogue, algorithm=algorithm,
            backend=backend, tolerance=tolerance, max_workspace_bytes=max_workspace_bytes,
        )  # fmt: skip
        ready = _remember(key, plan)
    if active is not None:
        active = continual.mask_of("continual_step", active, input)
    packed = torch_ops.held_weights(weight).form(ready.runner, weight)
    return ready(input, state, steps, packed, bias, residual, active, update_state)


def _plan_for(
    input: Tensor, state: State, window: Geometry, epilogue: Epilogue, **choice: Any
) -> Plan:
    """The plan of a step that has been checked; choice as for `continual.step_plan`."""
    return continual.step_plan(
        window,
        state.form,
        state.start,
        dtype=torch_ops_runner.dtype_of(input),
        device=input.device.type,
        precision=torch_ops.precision_of(input),
        epilogue=epilogue,
        layout=continual.state_layout("continual_step", state.frames, input),
        **choice,
    )


def _step_fake(
    input: Tensor,
    state: Tensor,
    steps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    active: Tensor | None = None,
    update_state: bool = True,
    form: str = "ring",
    start: str = "zeros",
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    memory = State(state, steps, form, start, stride[0])
    window = _window(input, memory, weight, stride, padding, dilation, groups)
    layout = continual.state_layout("continual_step", state, input)
    return torch_ops.new_dense(continual.column_shape(window), input, layout)


def _functional_impl(
    input: Tensor, state: Tensor, steps: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    state, steps = state.clone(), steps.clone()
    return _step_impl(input, state, steps, *rest, **options), state, steps


def _functional_fake(
    input: Tensor, state: Tensor, steps: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y = _step_fake(input, state, steps, *rest, **options)
    return y, torch.empty_like(state), torch.empty_like(steps)


class Stepper:
    """A plan ready for many steps: what it needs besides the arrays is looked up once."""

    def __init__(self, plan: Plan) -> None:
        assert isinstance(plan.geometry, Geometry)
        self.plan = plan
        self.runner = torch_ops.runner(plan)
        self._module = backends.kernel("continual", plan.backend)
        self._layout, self._in_c = plan.layout, plan.backend == "c"
        self._shape = continual.column_shape(plan.geometry)
        self._strides = torch_ops_runner.dense_strides(self._shape, plan.layout)
        self._nothing, self._strided = 0 in self._shape, plan.geometry.stride[0] > 1
        large = prod(self._shape) * ELEMENT_BYTES[plan.dtype] >= torch_memory.SMALLEST
        self._recycled = large and plan.device == "cpu"

    def step(
        self,
        x: Tensor,
        state: State,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        active: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        """One step of tensors that the plan is right for; no gradient is kept."""
        packed = torch_ops.held_weights(weight).form(self.runner, weight)
        return self(x, state.frames, state.steps, packed, bias, residual, active, update)

    def __call__(
        self,
        x: Tensor,
        frames: Tensor,
        steps: Tensor,
        packed: Any,
        bias: Tensor | None,
        residual: Tensor | None,
        active: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        """y (N, K, *out_frame), zeros where there is no column; writes frames and steps.

        frames, steps: of the state, dense in the plan's layout; x, bias and residual: any strides
        """
        layout = self._layout
        if self._recycled:
            y = torch_ops.new_dense(self._shape, x, layout)
        else:
            y = x.new_empty_strided(self._shape, self._strides)
        if active is not None or self._strided:
            y.zero_()
        if self._nothing:
            return y
        bias = flat(bias)
        if not self._in_c:
            self._write(x, frames, steps, packed, bias, residual, y, active, update)
            return y
        x, residual = torch_ops.dense(x, layout), torch_ops.dense(residual, layout)
        packed.step_at(
            x.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            frames.data_ptr(),
            steps.data_ptr(),
            steps.stride(0),
            y.data_ptr(),
            workspace_address,
            0 if active is None else active.data_ptr(),
            update,
        )
        return y

    def _write(
        self,
        x: Tensor,
        frames: Tensor,
        steps: Tensor,
        packed: Any,
        bias: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        active: Tensor | None,
        update: bool,
    ) -> None:
        """By a kernel that takes arrays."""
        plan, layout = self.plan, self._layout
        if plan.backend in torch_ops.ON_TENSORS:
            with torch.no_grad():
                x, residual = torch_ops.dense(x, layout), torch_ops.dense(residual, layout)
                scratch = torch_ops.device_workspace(self._module.workspace_size(plan), y)
                self._module.run(
                    plan, x, packed, bias, residual, frames, steps, y, scratch, active, update
                )
            return
        if plan.backend == "numba":
            torch_ops_runner.follow_threads()
        arrays = map(torch_ops_packed.view, (x, bias, residual, frames, steps, y, active))
        x_, bias_, residual_, frames_, steps_, column, active_ = arrays
        memory = State(frames_, steps_)
        continual.run_step(plan, x_, packed, bias_, residual_, memory, column, active_, update)


@lru_cache(maxsize=4096)
def stepper(plan: Plan) -> Stepper:
    """The plan's Stepper."""
    return Stepper(plan)


def step(
    plan: Plan,
    input: Tensor,
    state: State,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    active: Tensor | None = None,
    update: bool = True,
) -> Tensor:
    """One step of a plan that is right for these tensors; no gradient is kept."""
    return stepper(plan).step(input, state, weight, bias, residual, active, update)


def _emitting(window: Geometry, steps: Tensor, active: Tensor | None) -> Tensor | None:
    """Which streams (N,) have a column at this time; None for all."""
    if window.stride[0] == 1:
        return active
    there = (steps - (window.in_size[0] - 1)) % window.stride[0] == 0
    return there if active is None else there & active


def _over(mask: Tensor, like: Tensor) -> Tensor:
    """(N,) to broadcast against (N, ...)."""
    return mask.reshape(-1, *(1,) * (like.dim() - 1))


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, state, steps, weight, bias, *geometry = inputs[:9]
    activation, residual, active, update, form, start = inputs[9:15]
    if activation != "none":
        raise UnsupportedError(
            f"continual_step_functional: no gradient of activation {activation!r} in the operator; "
            "apply it behind"
        )
    if (form, start) == ("sum", "replicate"):
        raise UnsupportedError(
            "continual_step_functional: no gradient of form 'sum' with start 'replicate'; "
            "use form 'ring' or start 'zeros'"
        )
    ctx.save_for_backward(input, state, steps, weight, active)
    ctx.geometry, ctx.update, ctx.form, ctx.start = geometry, update, form, start
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, grad_steps: Any) -> tuple[Any, ...]:
    input, state, steps, weight, active = ctx.saved_tensors
    memory = State(state, steps, ctx.form, ctx.start, ctx.geometry[0][0])
    window = _window(input, memory, weight, *ctx.geometry)
    there = _emitting(window, steps, active)
    grad = grad_y if there is None else torch.where(_over(there, grad_y), grad_y, 0)
    gradients = _gradients_of_sums if ctx.form == "sum" else _gradients_of_frames
    dx, dstate, dw = gradients(window, grad, grad_state, input, memory, weight, active, ctx.update)
    db = grad.sum((0, *range(2, grad.dim()))) if ctx.has_bias else None
    dr = grad if ctx.has_residual else None
    return dx, dstate, None, dw, db, *(None,) * 5, dr, *(None,) * 8


def _gradients_of_frames(
    window: Geometry,
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    state: State,
    weight: Tensor,
    active: Tensor | None,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, state and w in the form 'ring': grad (N, K, *out_frame), zero where no column was."""
    from .torch_kernels import continual as kernels

    plan, ring = _torch_plan(window, state, x), window.in_size[0] - 1
    frames = kernels.window(plan, x, state.frames, state.steps)
    dwindow, dw = _convolution_backward(grad[:, :, None], frames, weight, window)
    dx, dstate = dwindow[:, :, ring], grad_state.clone()
    if not ring:
        return dx, dstate, dw
    stream = torch.arange(x.shape[0], device=x.device)
    if update:
        slot = state.steps % ring
        kept = dstate[stream, :, slot]
        mask = torch.ones_like(slot, dtype=torch.bool) if active is None else active
        dx = dx + torch.where(_over(mask, kept), kept, 0)
        dstate[stream, :, slot] = torch.where(_over(mask, kept), 0, kept)
    slots, now = kernels.read_slots(plan, state.steps)
    # (N, C, L, *frame) -> (N, L, C, *frame)
    read = dwindow[:, :, :ring].movedim(2, 1)
    now = now.reshape(*now.shape, *(1,) * (x.dim() - 1))
    dx = dx + torch.where(now, read, 0).sum(1)
    dstate = dstate.movedim(2, 1).contiguous()
    dstate.index_put_((stream[:, None], slots), torch.where(now, 0, read), accumulate=True)
    return dx, dstate.movedim(1, 2), dw


def _gradients_of_sums(
    window: Geometry,
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    state: State,
    weight: Tensor,
    active: Tensor | None,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, state and w in the form 'sum': grad (N, K, *out_frame), zero where no column was."""
    from .torch_kernels import continual as kernels

    taps, ring = window.kernel[0], window.in_size[0] - 1
    wide, dstate = state.frames.dtype, grad_state.clone()
    stream = torch.arange(x.shape[0], device=x.device)
    parts = []
    for tap in range(taps - 1):
        column = state.steps + (taps - 1 - tap) * window.dilation[0]
        there, part = _emitting(window, column, active), grad_state[stream, :, column % ring]
        if there is not None:
            part = torch.where(_over(there, part), part, 0)
        parts.append(part if update else torch.zeros_like(part))
    parts.append(grad.to(wide))
    if ring:
        slot = state.steps % ring
        if update:  # the first tap overwrites what the slot held
            there, old = _emitting(window, state.steps + ring, active), dstate[stream, :, slot]
            gone = torch.ones_like(slot, dtype=torch.bool) if there is None else there
            dstate[stream, :, slot] = torch.where(_over(gone, old), 0, old)
        dstate[stream, :, slot] = dstate[stream, :, slot] + grad.to(wide)
    n, k, *out = grad.shape
    # (N, G, KT, K / G, *out): the outputs of a group, tap by tap
    stacked = torch.stack(parts, 1).reshape(n, taps, window.groups, k // window.groups, *out)
    stacked = stacked.transpose(1, 2).reshape(n, taps * k, 1, *out)
    per_group = weight.reshape(window.groups, k // window.groups, *weight.shape[1:]).to(wide)
    packed = per_group.movedim(3, 1).reshape(taps * k, weight.shape[1], 1, *weight.shape[3:])
    single = kernels.frame_geometry(window)
    dx, dw = _convolution_backward(stacked, x.to(wide)[:, :, None], packed, single)
    dw = dw.reshape(window.groups, taps, k // window.groups, weight.shape[1], *weight.shape[3:])
    dw = dw.movedim(1, 3).reshape(weight.shape)
    return dx[:, :, 0].to(x.dtype), dstate, dw.to(weight.dtype)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, g: Geometry
) -> tuple[Tensor, Tensor]:
    """Gradients of x and w; an asymmetric padding is undone by padding x."""
    common = [min(pair) for pair in g.padding]
    rest = [(a - p, b - p) for (a, b), p in zip(g.padding, common, strict=True)]
    if any(map(any, rest)):
        x = torch.nn.functional.pad(x, [side for pair in reversed(rest) for side in pair])
    forward = (g.stride, common, g.dilation, False, [0] * g.n, g.groups)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *forward, [True, True, False]
    )
    for axis, size in enumerate(g.in_size):
        dx = dx.narrow(2 + axis, rest[axis][0], size)
    return dx, dw


def _torch_plan(window: Geometry, state: State, x: Tensor) -> Plan:
    """What the helpers of the torch kernels want to know."""
    layout = continual.state_layout("continual_step", state.frames, x)
    config = (("replicate", 1),) if state.start == "replicate" else ()
    dtype = str(x.dtype).removeprefix("torch.")
    return Plan("continual", "torch", window, dtype, Epilogue(), layout, x.device.type, (), config)


register("continual_step", _step_impl, _step_fake, autocast="weight", apart=_APART)
register(
    "continual_step_functional", _functional_impl, _functional_fake, _context, _backward,
    autocast="weight", apart=_APART,
)  # fmt: skip
torch_ops_vmap.register_steps()
