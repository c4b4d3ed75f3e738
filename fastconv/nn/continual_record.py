"""Which calls of our C kernels a step of a network is made of; `continual_play` plays them.

Operations without a kernel stay steps of Python, and the list of calls is cut there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastconv import ops, torch_ops_runner
from fastconv.plan import CHANNELS_LAST

from . import continual_rules as rules
from .continual_conv import Convolution
from .continual_elementwise import REDUCTIONS, Blend, Pool, means_shape, spatial_mean
from .continual_linear import Linear
from .continual_ops import Delay, Framewise, Op, Retime, State, Whole, Window

if TYPE_CHECKING:
    from .continual_network import Program

Shape = tuple[int, ...]
Place = tuple[int, int]  # a value, and bytes behind its beginning
# Of streams that run through several layers together: what a layer reads and writes stays in the
# cores' own caches until the next one has read it.
NEAR_BYTES = 1 << 21


def is_turned(frame: Tensor) -> bool:
    """Whether the channels of frames (N, C, 1, *size) are planes in memory."""
    return frame.is_contiguous() and frame.shape[1] > 1 and prod(frame.shape[2:]) > 1


@dataclass
class Call:
    """One call of C before memory is known.

    fixed   addresses of weights and state, by field of `fc_call`
    reads, writes  fields that take addresses of values
    stream  number of the first stream that it is for
    """

    kind: str
    params: Any
    fixed: dict[str, int]
    reads: dict[str, Place]
    y: Place | None
    stream: int
    scratch: int


@dataclass
class Segment:
    """Calls between two steps of Python."""

    calls: list[Call] = field(default_factory=list)


@dataclass
class Step:
    """An operation on columns, of those inputs that come (`ons`), to one of output or none (`on`);
    where it stays so, a step of Python.
    """

    number: int
    name: str
    op: Op
    inputs: tuple[int, ...]
    ons: list[bool]
    on: bool


class Recorder:
    """Goes through a program and finds the calls for frames that bring some of its columns.

    Values are known by number: those of the program, and negative ones that it does not have.

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
        self.columns[0] = frame.new_empty(1).expand(frame.shape)
        self.slots, self.turned = frame.shape[0], is_turned(frame)
        self.parts: list[Segment | Step] = []
        self.keep: list[Any] = []
        self.guards: list[Callable[[], bool]] = []  # what has to stay true, and nobody follows

    def record(self) -> bool:
        """Find the calls; whether there are any."""
        steps = self._steps()
        self._run(steps, 0, self.slots, set())
        whole, python = self.parts, _python(self.parts)
        if self.slots > 1:
            self.parts = []
            for count, together in self._runs(steps, python):
                inside = self._inside(together, steps) if count < self.slots else set()
                for first in range(0, self.slots, count):
                    self._run(together, first, min(count, self.slots - first), inside)
            if _python(self.parts) != python:  # fewer streams have another backend
                self.parts = whole
        return any(isinstance(part, Segment) for part in self.parts)

    def _steps(self) -> list[Step]:
        """What happens with such frames; what only has another number is resolved."""
        same: dict[int, int] = {}
        steps = []
        for number, node in self.program.nodes:
            ons = [self.ons[self.program.clock_of[i]] for i in node.inputs]
            on = self.ons[self.program.clock_of[number]]
            inputs = tuple(same.get(i, i) for i in node.inputs)
            if isinstance(node.op, Retime):
                if on:
                    same[number] = inputs[0]
            elif on or any(ons):
                steps.append(Step(number, node.name, node.op, inputs, ons, on))
        self.output = same.get(self.program.output, self.program.output)
        return steps

    def _runs(self, steps: list[Step], python: set[int]) -> list[tuple[int, list[Step]]]:
        """Consecutive steps, and how many streams go through them before the next ones do."""
        least, counts = self.slots, []
        for step in reversed(steps):
            if step.number in python:
                counts.append(self.slots)
                continue
            values = [*step.inputs, *([step.number] if step.on else ())]
            nbytes = sum(4 * prod(self.columns[value].shape[1:]) for value in values)
            fitting = max(NEAR_BYTES // max(nbytes, 1), 1)
            least = min(least, 1 << (fitting.bit_length() - 1))
            counts.append(least)
        pairs = zip(reversed(counts), steps, strict=True)
        return [(n, [step for _, step in run]) for n, run in groupby(pairs, lambda pair: pair[0])]

    def _inside(self, run: list[Step], steps: list[Step]) -> set[int]:
        """Values that no step outside of a run sees."""
        own = {step.number for step in run}
        seen = {i for step in steps if step.number not in own for i in step.inputs}
        return own - seen - {self.output}

    def _run(self, steps: list[Step], first: int, count: int, inside: set[int]) -> None:
        """Some streams through some steps; values inside are of these streams alone."""
        self._first, self._count = first, count
        self._local: dict[int, int | None] = dict.fromkeys(inside)
        self._frame: int | None = None
        for step in steps:
            rule = _RULES.get(type(step.op))
            values = [*step.inputs, *([step.number] if step.on else ())]
            examples = [self.columns[i] for i in values]
            plain = all(x.dtype == torch.float32 and x.dim() > 1 for x in examples)
            if not plain or rule is None or not rule(self, step):
                self.parts.append(step)

    # For the rules of operations.

    def shape(self, value: int) -> Shape:
        """Of the streams of now."""
        return (self._count, *self.columns[value].shape[1:])

    def example(self, value: int) -> Tensor:
        """A tensor of this shape, without memory of its own."""
        return self.columns[value][:1].expand(self.shape(value))

    def spare(self, shape: Shape) -> Place:
        """A value that the program does not have."""
        number = min(self.columns) - 1
        self.columns[number] = torch.empty(1).expand(shape)
        return number, 0

    def place(self, value: int) -> Place:
        """Where a value of the streams of now is."""
        if value == 0 and self.turned:
            return self._turned_frame()
        if value not in self._local:
            return value, 4 * self._first * prod(self.columns[value].shape[1:])
        own = self._local[value]
        if own is None:
            own, _ = self.spare(self.shape(value))
            self._local[value] = own
        return own, 0

    def _turned_frame(self) -> Place:
        """The frame with channels last, by our kernel."""
        if self._frame is None:
            shape = self.shape(0)
            self._frame, _ = place = self.spare(shape)
            begin = 0, 4 * self._first * prod(shape[1:])
            params = self.small.turn(shape[0], shape[1], prod(shape[2:]))
            self.call("TURN", params, {"x": begin}, place)
        return self._frame, 0

    def state(self, step: Step) -> dict[str, int]:
        """Addresses of an operation's state."""
        state, axis = self.states[step.name], step.op.slot_axis
        own = {key: t.narrow(axis, self._first, self._count) for key, t in state.items()}
        steps = own.pop("steps").data_ptr()
        (memory,) = own.values()
        return {"state": memory.data_ptr(), "steps": steps}

    def call(
        self,
        kind: str,
        params: Any,
        reads: dict[str, Place],
        y: Place | None,
        fixed: dict[str, int] | None = None,
        scratch: int = 0,
    ) -> None:
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, Segment):
            last = Segment()
            self.parts.append(last)
        last.calls.append(Call(kind, params, fixed or {}, reads, y, self._first, scratch))

    def kernel(
        self,
        kind: str,
        packed: Any,
        bias: Tensor | None,
        reads: dict[str, Place],
        y: Place,
        fixed: dict[str, int] | None = None,
    ) -> None:
        """A call of a convolution's kernel."""
        bias = None if bias is None else bias.contiguous()
        self.keep += [packed, bias]
        size = packed.workspace_size()
        params, weights, _ = packed.constants(ops.workspace(size, torch_ops_runner.FLOAT32))
        own = {"weights": weights, "bias": 0 if bias is None else bias.data_ptr()}
        self.call(kind, params, reads, y, own | (fixed or {}), size)


def _python(parts: Sequence[Segment | Step]) -> set[int]:
    return {part.number for part in parts if isinstance(part, Step)}


# Rules: the calls of an operation, or False and none.


def _convolution(r: Recorder, step: Step) -> bool:
    op: Any = step.op
    if not step.ons[0]:
        return not step.on
    if not step.on and op.form == "sum":
        return False
    x = step.inputs[0]
    stepper, packed, bias = op.packed(r.example(x))
    if stepper.plan.backend != "c" or stepper.plan.layout != CHANNELS_LAST:
        return False
    reads = {"x": r.place(x)}
    if not step.on:
        r.call("RING", r.small.ring(r.shape(x), op.reach), reads, None, r.state(step))
        return True
    if op.epilogue.residual:
        reads["residual"] = r.place(step.inputs[1])
    r.kernel("STEP", packed, bias, reads, r.place(step.number), r.state(step))
    return True


def _delay(r: Recorder, step: Step) -> bool:
    op: Any = step.op
    x = step.inputs[0]
    params = r.small.ring(r.shape(x), op.count, slots=r.slots)
    reads = {"x": r.place(x)} if step.ons[0] else {}
    r.call("RING", params, reads, r.place(step.number) if step.on else None, r.state(step))
    return True


def _window(r: Recorder, step: Step) -> bool:
    op: Any = step.op
    shape, x = r.shape(step.inputs[0]), r.place(step.inputs[0])
    reduce = REDUCTIONS.get(op.reduce)
    each = None if op.each is spatial_mean and len(shape) == 3 else op.each
    of_each = shape if each is None else _small_shape(each, shape)
    if reduce is None or of_each is None:
        return False
    if each is not None:
        place = r.spare(of_each)
        _small(r, each, shape, x, place)
        x = place
    if step.on:
        params = r.small.window(of_each, op.reach, reduce, op.dilation, slots=r.slots)
        r.call("WINDOW", params, {"x": x}, r.place(step.number), r.state(step))
    ring = r.small.ring(of_each, op.reach, slots=r.slots)
    r.call("RING", ring, {"x": x}, None, r.state(step))
    return True


@dataclass
class _Shaped:
    shape: Shape
    place: Place


def _framewise(r: Recorder, step: Step) -> bool:
    function: Any = step.op.function  # type: ignore[attr-defined]
    if not step.on:
        return True
    x, y, shape = step.inputs[0], step.number, r.shape(step.inputs[0])
    if isinstance(function, Blend):
        return _blend(r, step, function)
    if isinstance(function, Linear):
        return _linear(r, step, function)
    if function is rules.concatenated:
        channels, (value, at) = r.shape(y)[1], r.place(y)
        for x in step.inputs:
            params = r.small.blend(r.shape(x), y_step=channels)
            r.call("BLEND", params, {"x": r.place(x)}, (value, at))
            at += 4 * r.shape(x)[1]
    elif _is_point(shape) and _is_point(r.shape(y)) and _only_reshapes(r, function, shape):
        r.call("BLEND", r.small.blend(shape), {"x": r.place(x)}, r.place(y))
    elif _small_shape(function, shape) is not None:
        _small(r, function, shape, r.place(x), r.place(y))
    else:
        return False
    return True


def _blend(r: Recorder, step: Step, function: Blend) -> bool:
    parts = function.parts(*(_Shaped(r.shape(i), r.place(i)) for i in step.inputs))
    if parts is None:
        return False
    named = zip(("x", "weights", "residual"), parts, strict=True)
    reads = {name: part.place for name, part in named if part is not None}
    params = r.small.blend(parts[0].shape, function.activation, per_image=function.scaled)
    r.call("BLEND", params, reads, r.place(step.number))
    return True


def _linear(r: Recorder, step: Step, function: Linear) -> bool:
    x = step.inputs[0]
    if not function.takes(r.example(x)):
        return False
    _, packed, bias = function.packed(r.example(x))
    weight = function.module.weight
    r.guards.append(lambda: function.module.weight is weight)
    r.kernel("RUN", packed, bias, {"x": r.place(x)}, r.place(step.number))
    return True


def _only_reshapes(r: Recorder, function: Any, shape: Shape) -> bool:
    """Whether a function gives the numbers that it takes, those of one point in their order."""
    if isinstance(function, partial):
        return function.func in (rules.as_shape, rules.without)
    if type(function) in (nn.Dropout, *rules.CHANNEL_DROPOUTS) and not function.training:
        r.guards.append(lambda: not function.training)
        return True
    return type(function) is nn.Flatten or (function is spatial_mean and len(shape) == 3)


def _is_point(shape: Sequence[int]) -> bool:
    """Whether a column has channels alone."""
    return prod(shape) == prod(shape[:2])


def _small_shape(function: Any, shape: Shape) -> Shape | None:
    """Of a mean or pooling in C; None if there is none."""
    if function is spatial_mean and len(shape) > 3:
        return means_shape(shape)
    geometry = function.geometry(shape) if isinstance(function, Pool) else None
    return None if geometry is None else geometry.y_shape


def _small(r: Recorder, function: Any, shape: Shape, x: Place, y: Place) -> None:
    if isinstance(function, Pool):
        geometry = function.geometry(shape)
        params = r.small.pool(geometry, mean=function.mean, counted=function.counted)
        r.call("POOL", params, {"x": x}, y)
        return
    params = r.small.means(shape)
    r.call("MEANS", params, {"x": x}, y, scratch=r.small.means_size(params))


_RULES: dict[type[Op], Callable[[Recorder, Step], bool]] = {
    Convolution: _convolution,
    Delay: _delay,
    Window: _window,
    Framewise: _framewise,
    Whole: _framewise,
}
