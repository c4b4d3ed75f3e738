"""The convolution of a stream: our step kernels under a module's weights, batch norm folded in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import ops, planner, torch_ops, winners
from fastconv.epilogue import Epilogue
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, Plan

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
    ) -> None:
        self.module, self.norm, self.backend = module, norm, backend
        self.epilogue = Epilogue(module.bias is not None or norm is not None, activation, residual)
        self.padding = paddings(module)
        self.reach = module.dilation[0] * (module.kernel_size[0] - 1)
        self._plans: dict[Any, Plan] = {}
        self._folded: tuple[Tensor, Tensor | None] | None = None

    def forget(self) -> None:
        """The weights were written: fold anew."""
        self._folded = None

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, those of the batch norm included."""
        m, norm = self.module, self.norm
        if norm is None:
            return m.weight, m.bias
        if self._folded is None:
            assert norm.running_mean is not None and norm.running_var is not None
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
        n, c, _, *frame = xs[0].shape
        frames = torch_ops.new_dense((n, c, self.reach, *frame), xs[0], CHANNELS_LAST)
        steps = torch.zeros(n, dtype=torch.int64, device=xs[0].device)
        return {"frames": frames.zero_(), "steps": steps}

    def clear(self, state: State, slots: Tensor | None = None) -> None:
        for tensor in state.values():
            if slots is None:
                tensor.zero_()
            else:
                tensor[slots] = 0

    def fill(self, state: State, xs: Sequence[Tensor], slots: On) -> None:
        frames = state["frames"]
        if slots is True:
            frames.copy_(xs[0].expand_as(frames))
        elif slots is not False:
            index = rows(slots)
            frames[index] = xs[0][index].expand_as(frames[index])

    def step(
        self, state: State, xs: Sequence[Any], ons: Sequence[On], on: On, at: Moment
    ) -> Tensor | None:
        came = ons[0]
        if came is False:
            return None
        x = xs[0].select(2, 0)
        if on is False:
            self._push(state, x, came)
            return None
        residual = xs[1].select(2, 0) if self.epilogue.residual else None
        w, b = self.weights()
        if torch.is_grad_enabled() and (xs[0].requires_grad or w.requires_grad):
            return self._differentiable(state, x, came, residual)
        if on is True:
            frames = ops.State(state["frames"], state["steps"])
            plan = self._plan(x)
            return torch_ops.continual_step(plan, x, frames, w, b, residual).unsqueeze(2)
        index = rows(on)
        some = {name: tensor[index] for name, tensor in state.items()}
        part = torch_ops.continual_step(
            self._plan(x[index]),
            x[index],
            ops.State(some["frames"], some["steps"]),
            w,
            b,
            None if residual is None else residual[index],
        )
        for name, tensor in some.items():
            state[name][index] = tensor
        if came is True or (came & ~on).any():
            self._push(state, x, ~on if came is True else came & ~on)
        y = torch_ops.new_dense((x.shape[0], *part.shape[1:]), x, CHANNELS_LAST).zero_()
        y[index] = part
        return y.unsqueeze(2)

    def _push(self, state: State, x: Tensor, slots: On) -> None:
        """The frame goes into the ring, and nothing is computed."""
        frames, steps = state["frames"], state["steps"]
        index = torch.arange(x.shape[0]) if slots is True else rows(slots)
        if self.reach:
            frames[index, :, steps[index] % self.reach] = x[index].detach()
        steps[index] += 1

    def _differentiable(
        self, state: State, x: Tensor, came: On, residual: Tensor | None
    ) -> Tensor:
        """The same with a gradient for the weights and the newest frame; the ring is constant."""
        frames, steps = state["frames"], state["steps"]
        n, stride = torch.arange(x.shape[0]), self.module.dilation[0]
        order = [(steps - age) % self.reach for age in range(self.reach, 0, -stride)]
        kept = [frames[n, :, places] for places in order]
        window = torch.stack([*kept, x], dim=2)  # (N, C, KT, *frame)
        self._push(state, x, came)
        return self._convolve(window, window.shape[2], residual, taps_alone=True)

    def _convolve(
        self, x: Tensor, frames: int, residual: Tensor | None, *, taps_alone: bool = False
    ) -> Tensor:
        """A clip without temporal padding; taps_alone: without the frames between the taps."""
        m, (w, b) = self.module, self.weights()
        behind = self.padding[1:]
        y = _FUNCTIONS[len(m.kernel_size)](
            x,
            w,
            b,
            (1 if taps_alone else m.stride[0], *m.stride[1:]),
            ((0, 0), *behind),
            (1 if taps_alone else m.dilation[0], *m.dilation[1:]),
            m.groups,
            activation=self.epilogue.activation,
            residual=residual,
            algorithm="direct",
            backend=self._plan(x.select(2, 0)).backend,
        )
        return y

    def clip(self, xs: Sequence[Columns], first: int, end: int) -> list[Tensor]:
        if end <= first:
            return []
        x, stride, padding = xs[0], self.module.stride[0], self.padding[0][0]
        start, stop = first * stride - padding, (end - 1) * stride - padding + self.reach + 1
        frames = x.slice(max(start, x.first), stop)
        zeros = [torch.zeros_like(frames[0])] * (x.first - start)
        whole = torch.cat([*zeros, *frames], dim=2)
        residual = torch.cat(xs[1].slice(first, end), dim=2) if self.epilogue.residual else None
        return list(self._convolve(whole, whole.shape[2], residual).split(1, dim=2))

    def last(self, ends: Sequence[int]) -> int:
        own = (ends[0] + self.padding[0][0] - self.reach - 1) // self.module.stride[0] + 1
        return min(own, *ends[1:]) if len(ends) > 1 else own

    def _plan(self, x: Tensor) -> Plan:
        """The plan of one step of frames like x (N, C, *frame)."""
        key = (x.shape, x.dtype, x.device.type, winners.generation())
        plan = self._plans.get(key)
        if plan is None:
            m = self.module
            geometry = Geometry.of(
                (*x.shape[:2], self.reach + 1, *x.shape[2:]),
                m.weight.shape,
                (1, *m.stride[1:]),
                ((0, 0), *self.padding[1:]),
                tuple(m.dilation),
                m.groups,
                op="continual_step",
            )
            plan = self._plans[key] = planner.plan(
                geometry,
                dtype=str(x.dtype).removeprefix("torch."),
                device=x.device.type,
                epilogue=self.epilogue,
                layout=CHANNELS_LAST,
                backend=self.backend,
                continual=True,
            )
        return plan
