"""Which calls of our C kernels a step of a network is made of; `continual_play` plays them.

Operations without a kernel stay steps of Python, and the list of calls is cut there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastconv import ops, torch_ops, torch_ops_runner
from fastconv.plan import CHANNELS_LAST

from . import continual_rules as rules
from .continual_conv import Convolution
from .continual_elementwise import REDUCTIONS, Blend, Pool, means_shape, spatial_mean
from .continual_ops import Delay, Framewise, Op, Retime, State, Window

if TYPE_CHECKING:
    from .continual_network import Program

Shape = tuple[int, ...]


def is_turned(frame: Tensor) -> bool:
    """Whether the channels of frames (N, C, 1, *size) are planes in memory."""
    return frame.is_contiguous() and frame.shape[1] > 1 and prod(frame.shape[2:]) > 1


@dataclass
class Call:
    """One call of C before memory is known.

    fixed  addresses of weights and state, by field of `fc_call`
    reads, writes  values: numbers of nodes, and negative ones between the calls of one node
    behind  bytes between the beginning of the written value and what this call writes
    """

    kind: str
    params: Any
    fixed: dict[str, int]
    reads: dict[str, int]
    writes: dict[str, int]
    behind: int = 0
    scratch: int = 0


@dataclass
class Segment:
    """Calls between two steps of Python."""

    calls: list[Call] = field(default_factory=list)


@dataclass
class Step:
    """A step of Python."""

    number: int
    name: str
    op: Op
    inputs: tuple[int, ...]
    ons: list[bool]
    on: bool


class Recorder:
    """Goes through a program and finds the calls for frames that bring some of its columns.

    columns  an example of every value, without memory of its own
    frame    (N, C, 1, *size)
    ons      for every clock, whether a column comes
    """

    def __init__(
        self,
        program: Program,
        states: dict[str, State],
        columns: Sequence[Tensor | None],
        frame: Tensor,
        ons: Sequence[bool],
    ) -> None:
        from fastconv.c_kernels import elementwise, launch

        self.small, self.launch = elementwise, launch
        self.program, self.states, self.ons = program, states, ons
        self.columns: dict[int, Tensor] = {i: c for i, c in enumerate(columns) if c is not None}
        self.parts: list[Segment | Step] = []
        self.keep: list[Any] = []
        self._same: dict[int, int] = {}
        self._spare = -1
        self.columns[0] = frame
        shape = tuple(frame.shape)
        self.turned = is_turned(frame)
        if self.turned:  # on the way in, by our kernel
            params = self.small.turn(shape[0], shape[1], prod(shape[2:]))
            self._frame = self.value(shape)
            self.call("TURN", params, {}, {"x": 0}, {"y": self._frame})

    def record(self) -> bool:
        """Find the calls; whether there are any."""
        for number, node in self.program.nodes:
            ons = [self.ons[self.program.clock_of[i]] for i in node.inputs]
            on = self.ons[self.program.clock_of[number]]
            inputs = tuple(self._same.get(i, i) for i in node.inputs)
            if not (on or any(ons)):
                continue
            if not self._recorded(number, node.op, node.name, inputs, ons, on):
                self.parts.append(Step(number, node.name, node.op, inputs, ons, on))
        output = self.program.output
        self.output = self._same.get(output, output)
        calls = (call for part in self.parts if isinstance(part, Segment) for call in part.calls)
        return any(call.kind != "TURN" for call in calls)

    # For the rules of operations.

    def value(self, shape: Shape) -> int:
        """A value between the calls of one operation."""
        self._spare -= 1
        self.columns[self._spare] = torch.empty(1).expand(shape)
        return self._spare

    def state(self, name: str) -> State:
        return self.states.get(name, {})

    def call(
        self,
        kind: str,
        params: Any,
        fixed: dict[str, int],
        reads: dict[str, int],
        writes: dict[str, int],
        **more: int,
    ) -> None:
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, Segment):
            last = Segment()
            self.parts.append(last)
        if self.turned and kind != "TURN":
            reads = {f: self._frame if value == 0 else value for f, value in reads.items()}
        last.calls.append(Call(kind, params, fixed, reads, writes, **more))

    def same(self, number: int, value: int) -> None:
        """A node whose value is another's."""
        self._same[number] = value

    def _recorded(
        self, number: int, op: Op, name: str, inputs: Sequence[int], ons: list[bool], on: bool
    ) -> bool:
        rule = _RULES.get(type(op))
        wanted = [*inputs, *([number] if on else ())]
        plain = all(self.columns[i].dtype == torch.float32 for i in wanted)
        return plain and rule is not None and rule(self, number, op, name, inputs, ons[0], on)


def _convolution(
    r: Recorder, number: int, op: Any, name: str, inputs: Sequence[int], came: bool, on: bool
) -> bool:
    if came is not on and op.form == "sum":
        return False
    x, state = r.columns[inputs[0]], r.state(name)
    stepper, packed, bias = op.packed(x)
    plan = stepper.plan
    if plan.backend != "c" or plan.layout != CHANNELS_LAST:
        return False
    r.keep += [packed, bias]
    fixed = {"state": state["frames"].data_ptr(), "steps": state["steps"].data_ptr()}
    if not on:
        shape = (*x.shape[:2], *x.shape[3:])
        ring = r.small.ring(shape, op.reach, streams_first=True)
        r.call("RING", ring, fixed, {"x": inputs[0]}, {})
        return True
    size = packed.workspace_size()
    c_plan, weights, _ = packed.constants(ops.workspace(size, torch_ops_runner.FLOAT32))
    fixed |= {"weights": weights, "bias": 0 if bias is None else bias.data_ptr()}
    reads = {"x": inputs[0]}
    if op.epilogue.residual:
        reads["residual"] = inputs[1]
    r.call("STEP", c_plan, fixed, reads, {"y": number}, scratch=size)
    return True


def _delay(
    r: Recorder, number: int, op: Any, name: str, inputs: Sequence[int], came: bool, on: bool
) -> bool:
    ring = _ring(r, name, inputs[0])
    if ring is None:
        return False
    reads, writes = {"x": inputs[0]} if came else {}, {"y": number} if on else {}
    r.call("RING", ring, _memory(r.state(name)), reads, writes)
    return True


def _window(
    r: Recorder, number: int, op: Any, name: str, inputs: Sequence[int], came: bool, on: bool
) -> bool:
    x, reduce = inputs[0], REDUCTIONS.get(op.reduce)
    shape = tuple(r.columns[x].shape)
    of_each = shape if op.each is None else _small_shape(op.each, shape)
    if reduce is None or of_each is None or _ring(r, name, None) is None:
        return False
    if op.each is not None:
        each = r.value(of_each)
        _small(r, op.each, x, each)
        x = each
    fixed = _memory(r.state(name))
    if on:
        taps = op.reach // op.dilation + 1
        params = r.small.window(of_each, taps, reduce, op.dilation)
        r.call("WINDOW", params, fixed, {"x": x}, {"y": number})
    r.call("RING", _ring(r, name, None), fixed, {"x": x}, {})
    return True


def _framewise(
    r: Recorder, number: int, op: Any, name: str, inputs: Sequence[int], came: bool, on: bool
) -> bool:
    function = op.function
    shapes = [tuple(r.columns[i].shape) for i in inputs]
    if isinstance(function, Blend):
        parts = function.parts(*(_Shaped(shapes[k], i) for k, i in enumerate(inputs)))
        if parts is None:
            return False
        x, *others = parts
        named = zip(("weights", "residual"), others, strict=True)
        reads = {"x": x.value} | {f: part.value for f, part in named if part is not None}
        params = r.small.blend(x.shape, function.activation, per_image=function.scaled)
        r.call("BLEND", params, {}, reads, {"y": number})
        return True
    if function is rules.concatenated:
        channels, at = sum(shape[1] for shape in shapes), 0
        for value, shape in zip(inputs, shapes, strict=True):
            params = r.small.blend(shape, y_step=channels)
            r.call("BLEND", params, {}, {"x": value}, {"y": number}, behind=4 * at)
            at += shape[1]
        return True
    if _small_shape(function, shapes[0]) is None:
        return False
    _small(r, function, inputs[0], number)
    return True


def _retime(
    r: Recorder, number: int, op: Any, name: str, inputs: Sequence[int], came: bool, on: bool
) -> bool:
    if on:
        r.same(number, inputs[0])
    return True


_RULES: dict[type[Op], Callable[..., bool]] = {
    Convolution: _convolution,
    Delay: _delay,
    Window: _window,
    Framewise: _framewise,
    Retime: _retime,
}


@dataclass
class _Shaped:
    shape: Shape
    value: int


def _small_shape(function: Any, shape: Shape) -> Shape | None:
    """Of a mean or pooling in C; None if there is none."""
    if function is spatial_mean and len(shape) > 3:
        return means_shape(shape)
    geometry = function.geometry(shape) if isinstance(function, Pool) else None
    return None if geometry is None else geometry.y_shape


def _small(r: Recorder, function: Any, x: int, y: int) -> None:
    shape = tuple(r.columns[x].shape)
    if isinstance(function, Pool):
        params = r.small.pool(
            function.geometry(shape), mean=function.mean, counted=function.counted
        )
        r.call("POOL", params, {}, {"x": x}, {"y": y})
        return
    params = r.small.means(shape)
    r.call("MEANS", params, {}, {"x": x}, {"y": y}, scratch=r.small.means_size(params))


def _memory(state: State) -> dict[str, int]:
    return {"state": state["columns"].data_ptr(), "steps": state["steps"].data_ptr()}


def _ring(r: Recorder, name: str, value: int | None) -> Any:
    """The ring of a delay or a window; None if its columns are not dense with channels last."""
    ring = r.state(name)["columns"]
    held = torch_ops.dense(ring[0], CHANNELS_LAST).data_ptr() == ring.data_ptr()
    if not held or ring.stride(0) != ring[0].numel():
        return None
    return r.small.ring(tuple(ring.shape[1:]), len(ring))
