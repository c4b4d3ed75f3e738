"""The convolution of a stream: our step kernels under a module's weights, batch norm folded in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastconv import continual, ops, torch_continual, torch_ops, winners
from fastconv.continual import State as Memory
from fastconv.epilogue import Epilogue
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, Plan
from fastconv.torch_continual import Stepper

from .continual_clock import On
from .continual_ops import Columns, Moment, Op, State, rows

Convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorms = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_FUNCTIONS = {1: ops.conv1d, 2: ops.conv2d, 3: ops.conv3d}


def paddings(module: Convolutions) -> list[tuple[int, int]]:
    """Zeros before and behind, per axis.

    Raises UnsupportedError for padding with other values than zeros.
    """
    if module.padding_mode != "zeros" and any(module._reversed_padding_repeated_twice):
        raise UnsupportedError(f"pads with {module.padding_mode!r}; only zeros are served")
    if not isinstance(module.padding, str):
        return [(int(p), int(p)) for p in module.padding]
    total = [
        d * (k - 1) if module.padding == "same" else 0
        for k, d in zip(module.kernel_size, module.dilation, strict=True)
    ]
    return [(n // 2, n - n // 2) for n in total]


class Convolution(Op):
    """A convolution over the newest frame and the ring of those before it.

    norm        a batch norm in eval mode behind it, folded into the weights
    activation  by the name that `fastconv.conv3d` knows
    residual    whether a second value is added before the activation
    form        of the memory, see `fastconv.continual_state`; convolutions with a temporal stride
                keep frames, 'ring', in any case
    start       'replicate' where the first frame stands for all before it
    """

    slot_axis = 0

    def __init__(
        self,
        module: Convolutions,
        *,
        norm: BatchNorms | None = None,
        activation: str = "none",
        residual: bool = False,
        backend: str = "auto",
        form: str = "ring",
        start: str = "zeros",
    ) -> None:
        self.module, self.norm, self.backend = module, norm, backend
        self.epilogue = Epilogue(module.bias is not None or norm is not None, activation, residual)
        self.padding = paddings(module)
        self.reach = module.dilation[0] * (module.kernel_size[0] - 1)
        self._form: str | None = None
        self._before = "zeros"
        self._wanted, self._replicate = form, start == "replicate"
        self._plans: dict[Any, Plan] = {}
        self._folded: tuple[Tensor, Tensor | None] | None = None
        self._ready: tuple[Any, Any, Callable[..., Tensor] | None] = (None, None, None)

    @property
    def plan(self) -> Plan | None:
        """The plan of the last kind of frames; None before the first."""
        return next(reversed(self._plans.values()), None)

    def forget(self) -> None:
        """The weights were written: fold anew."""
        self._folded = None
        self._ready = None, None, None

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, those of the batch norm included."""
        m, norm = self.module, self.norm
        if norm is None:
            return m.weight, m.bias
        if self._folded is None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            # In float64: the folded network rounds once where the module rounds twice.
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            shift = -norm.running_mean.double() * scale
            if norm.weight is not None:
                scale, shift = scale * norm.weight.double(), shift * norm.weight.double()
                shift = shift + norm.bias.double()
            if m.bias is not None:
                shift = shift + m.bias.double() * scale
            w = m.weight.double() * scale.view(-1, *(1,) * (m.weight.dim() - 1))
            folded = w.to(m.weight.dtype).detach(), shift.to(m.weight.dtype).detach()
            self._folded = folded
        return self._folded

    def allocate(self, xs: Sequence[Tensor]) -> State:
        window = self._window(xs[0].select(2, 0))
        form, dtype = self._form_of(xs[0]), xs[0].dtype
        if form == "sum" and dtype != torch.float64:
            dtype = torch.float32
        n, c, ring, *frame = continual.state_shape(window, form)
        memory = torch.zeros((n, ring, *frame, c), dtype=dtype, device=xs[0].device)
        steps = torch.zeros(n, dtype=torch.int64, device=xs[0].device)
        return {"frames": memory.movedim(-1, 1), "steps": steps}

    def _form_of(self, x: Tensor) -> str:
        """The form of the memory for columns like x (N, C, 1, *frame), decided once."""
        if self._form is None:
            self._form = "ring" if self.module.stride[0] > 1 or not self.reach else self._wanted
            if self._form == "auto":
                window = self._window(x.select(2, 0))
                sums, frames = (prod(continual.state_shape(window, f)) for f in ("sum", "ring"))
                self._form = "sum" if 4 * sums < frames * x.element_size() else "ring"
            # The ring is filled by the network, sums only the kernel can fill.
            self._before = "replicate" if self._form == "sum" and self._replicate else "zeros"
        return self._form

    @property
    def form(self) -> str:
        """The form of the memory, once there was a frame."""
        return self._form or "ring"

    def clear(self, state: State, slots: Tensor | None = None) -> None:
        for tensor in state.values():
            if slots is None:
                tensor.zero_()
            else:
                tensor[slots] = 0

    def fill(self, state: State, xs: Sequence[Tensor], slots: On) -> None:
        frames = state["frames"]
        if self.form == "sum":
            return  # the kernel's own start
        if slots is True:
            frames.copy_(xs[0].expand_as(frames))
        elif slots is not False:
            index = rows(slots)
            frames[index] = xs[0][index].expand_as(frames[index])

    def step(
        self, state: State, xs: Sequence[Any], ons: Sequence[On], on: On, at: Moment
    ) -> Tensor | None:
        came = ons[0]
        if on is True and came is True and at.update and not torch.is_grad_enabled():
            x = xs[0].select(2, 0)
            residual = xs[1].select(2, 0) if self.epilogue.residual else None
            return self._ready_for(xs[0])(x, state, residual).unsqueeze(2)
        if came is False:
            return None
        self._form_of(xs[0])
        x = xs[0].select(2, 0)
        if on is False:
            if at.update:
                self._push(state, x, came)
            return None
        residual = xs[1].select(2, 0) if self.epilogue.residual else None
        w, b = self.weights()
        if torch.is_grad_enabled() and (xs[0].requires_grad or w.requires_grad):
            return self._differentiable(state, x, came, residual, at.update)
        mask = None if came is True else torch.from_numpy(came).to(x.device)
        memory, plan = self._memory(state), self._plan(x)
        y = torch_continual.step(plan, x, memory, w, b, residual, mask, at.update)
        return y.unsqueeze(2)

    def packed(self, column: Tensor) -> tuple[Stepper, Any, Tensor | None]:
        """What runs a step of columns like this (N, C, 1, *frame): weights in its form, bias."""
        self._form_of(column)
        w, b = self.weights()
        stepper = torch_continual.stepper(self._plan(column.select(2, 0)))
        return stepper, torch_ops.held_weights(w).form(stepper.runner, w), b

    def _ready_for(self, column: Tensor) -> Callable[..., Tensor]:
        """A step of all slots together; its plan and packed weights are looked up once."""
        shape, generation, step = self._ready
        if step is None or shape != column.shape or generation != winners.generation():
            stepper, packed, b = self.packed(column)

            def step(x: Tensor, state: State, residual: Tensor | None) -> Tensor:
                return stepper(x, state["frames"], state["steps"], packed, b, residual)

            self._ready = column.shape, winners.generation(), step
        return step

    def _memory(self, state: State) -> Memory:
        """The state as the kernels take it; columns are asked for when they are there."""
        return Memory(state["frames"], state["steps"], self.form, self._before)

    def _push(self, state: State, x: Tensor, slots: On) -> None:
        """The frame goes into the memory, and no column is needed."""
        if self.form == "sum":  # whose columns have had their share of every frame
            mask = None if slots is True else torch.from_numpy(np.asarray(slots)).to(x.device)
            plan = replace(self._plan(x), epilogue=Epilogue())
            torch_continual.step(plan, x, self._memory(state), self.weights()[0], None, None, mask)
            return
        frames, steps = state["frames"], state["steps"]
        index = torch.arange(x.shape[0]) if slots is True else rows(slots)
        if self.reach:
            frames[index, :, steps[index] % self.reach] = x[index].detach()
        steps[index] += 1

    def _differentiable(
        self, state: State, x: Tensor, came: On, residual: Tensor | None, update: bool
    ) -> Tensor:
        """The same with a gradient for weights and newest frame; the memory is constant."""
        w, b = self.weights()
        y, memory = continual.continual_step_functional(
            x,
            self._memory(state),
            w,
            b,
            (1, *self.module.stride[1:]),
            ((0, 0), *self.padding[1:]),
            tuple(self.module.dilation),
            self.module.groups,
            activation=self.epilogue.activation,
            residual=residual,
            active=None if came is True else torch.from_numpy(came),
            algorithm="direct",
            backend=self.backend,
        )
        if update:
            # Not written in place: the gradient still reads what was there.
            state["frames"], state["steps"] = memory.frames.detach(), memory.steps
        return y.unsqueeze(2)

    def _convolve(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """A clip without temporal padding, on the backend of the steps."""
        m, (w, b) = self.module, self.weights()
        plan = self._plan(x.select(2, 0))
        differentiable = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
        if plan.transforms and not differentiable:
            geometry = Geometry.of(
                x.shape, w.shape, m.stride, ((0, 0), *self.padding[1:]), m.dilation, m.groups
            )
            clip = replace(plan, family="winograd", geometry=geometry, config=())
            return torch_ops.execute(clip, x, torch_ops.packed_weights(clip, w), b, residual)
        return _FUNCTIONS[len(m.kernel_size)](
            x,
            w,
            b,
            m.stride,
            ((0, 0), *self.padding[1:]),
            m.dilation,
            m.groups,
            activation=self.epilogue.activation,
            residual=residual,
            algorithm="direct",
            backend=plan.backend,
        )

    def clip(self, xs: Sequence[Columns], first: int, end: int) -> list[Tensor]:
        if end <= first:
            return []
        x, stride, padding = xs[0], self.module.stride[0], self.padding[0][0]
        start, stop = first * stride - padding, (end - 1) * stride - padding + self.reach + 1
        frames = x.slice(max(start, x.first), stop)
        zeros = [torch.zeros_like(frames[0])] * (x.first - start)
        whole = torch.cat([*zeros, *frames], dim=2)
        residual = torch.cat(xs[1].slice(first, end), dim=2) if self.epilogue.residual else None
        y = self._convolve(whole, residual)
        # Each in memory of its own, as steps have it: what follows may sum in the order of memory.
        return [torch_ops.dense(column.clone(), CHANNELS_LAST) for column in y.split(1, dim=2)]

    def last(self, ends: Sequence[int]) -> int:
        own = (ends[0] + self.padding[0][0] - self.reach - 1) // self.module.stride[0] + 1
        return min(own, *ends[1:]) if len(ends) > 1 else own

    def _window(self, x: Tensor) -> Geometry:
        """The geometry of one column of frames like x (N, C, *frame)."""
        m = self.module
        return continual.window_geometry(
            "continual_step",
            x.shape,
            m.weight.shape,
            (1, *m.stride[1:]),
            ((0, 0), *self.padding[1:]),
            tuple(m.dilation),
            m.groups,
        )

    def sum_shape(self, state: State, slots: int) -> tuple[int, ...]:
        """(slots, K, L, *out_frame): of a memory of incomplete columns, whichever this one is."""
        frames = state["frames"]
        if self.form == "sum":
            return tuple(frames.shape)
        return continual.state_shape(self._window(frames.select(2, 0)), "sum")

    def _plan(self, x: Tensor) -> Plan:
        """The plan of one step."""
        key = (x.shape, x.dtype, x.device.type, winners.generation())
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = continual.step_plan(
                self._window(x),
                self.form,
                self._before,
                dtype=str(x.dtype).removeprefix("torch."),
                device=x.device.type,
                precision=torch_ops.precision_of(x),
                epilogue=self.epilogue,
                layout=CHANNELS_LAST,
                backend=self.backend,
            )
        return plan
