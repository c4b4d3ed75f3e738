"""The stateful shell around a graph of operations: frames in, results out, slots, save and restore.

Slots are the entries of the batch: streams that begin, pause and end on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastconv import winners
from fastconv.errors import GeometryError, UnsupportedError
from fastconv.plan import Plan

from .continual_clock import Clock, On
from .continual_conv import Convolution
from .continual_elementwise import in_c
from .continual_graph import Graph, Node, fused
from .continual_ops import Columns, Moment, State, rows
from .continual_play import Recorded
from .continual_record import Recorder

Saved = dict[str, Any]
_VERSION = attrgetter("_version")
NONE: State = {}  # of operations that keep nothing


class Step(NamedTuple):
    """What a frame, or several, brought.

    output  (N, K, *frame), of several frames (N, K, M, *frame) with the M columns that any slot has
    ready   (N,) or (N, M) bool: the slots that have a result; the others' rows are zeros
    """

    output: Tensor
    ready: Tensor


class Program:
    """A graph made ready to run: which columns exist when, and when a value is last used."""

    def __init__(self, graph: Graph, nodes: Sequence[Node | None]) -> None:
        self.nodes = [(number, node) for number, node in enumerate(nodes) if node is not None][1:]
        self.size, self.output = len(nodes), graph.output
        clocks = {node.clock for node in graph.nodes}
        self.clocks = list(clocks)
        self.steady = max(clock.warm_up for clock in clocks)
        self.every_frame = all(clock.rate == 1 for clock in clocks)
        place = {clock: i for i, clock in enumerate(self.clocks)}
        self.clock_of = [place[node.clock] for node in graph.nodes]
        last_use = {value: number for number, node in self.nodes for value in node.inputs}
        self.dead: dict[int, list[int]] = {}
        for value, number in last_use.items():
            if value != self.output:
                self.dead.setdefault(number, []).append(value)

        # Number, function, name, inputs, own clock, the inputs' clocks, values not needed any more.
        self.calls = [
            (
                number,
                node.op.step,
                node.name,
                node.inputs,
                self.clock_of[number],
                tuple(self.clock_of[i] for i in node.inputs),
                tuple(self.dead.get(number, ())),
            )
            for number, node in self.nodes
        ]

    def step(self, states: dict[str, State], frame: Tensor, at: Moment) -> tuple[Any, On]:
        """The output column of a frame, None if no slot has one; and which have."""
        if self.every_frame and at.common is not None and at.common >= self.steady:
            on: list[On] = [True] * len(self.clocks)
        else:
            on = [at.on(clock) for clock in self.clocks]
        values: list[Any] = [None] * self.size
        values[0] = frame
        for number, step, name, inputs, clock, clocks, dead in self.calls:
            ons = [on[i] for i in clocks]
            values[number] = step(
                states.get(name, NONE), [values[i] for i in inputs], ons, on[clock], at
            )
            for value in dead:
                values[value] = None
        return values[self.output], on[self.clock_of[self.output]]

    def steady_ons(self, at: Moment) -> tuple[bool, ...] | None:
        """For every clock whether a column comes in all active slots; None while some start."""
        seen = at.seen if at.active is True else at.seen[at.active]
        if at.new is not False or seen.min() < max(self.steady, 1):
            return None
        if self.every_frame:
            return (True,) * len(self.clocks)
        if at.common is None:
            return None
        return tuple(clock.on(at.common) for clock in self.clocks)

    def start(self, frame: Tensor, slots: int) -> tuple[dict[str, State], Tensor, list[Any]]:
        """Empty states for slots of frames like this, and of such a frame the column of output and
        every value's shape and precision, as a tensor without memory of its own."""
        at = Moment(np.zeros(slots, np.int64), 0, True, True)
        states: dict[str, State] = {}
        values: list[Any] = [None] * self.size
        values[0] = torch.zeros_like(frame)
        shapes: list[Any] = [None] * self.size
        for number, node in self.nodes:
            xs = [values[i] for i in node.inputs]
            state = node.op.allocate(xs)
            if state:
                states[node.name] = state
            values[number] = node.op.step(state, xs, [True] * len(xs), True, at)
            node.op.clear(state)
            shapes[number] = values[number].new_empty(1).expand(values[number].shape)
            for value in self.dead.get(number, ()):
                values[value] = None
        return states, values[self.output], shapes

    def fill(self, states: dict[str, State], frame: Tensor, at: Moment) -> None:
        """New slots: as if their first frame had been there for ever."""
        values: list[Any] = [None] * self.size
        values[0] = frame
        spare = Moment(at.seen, at.common, at.active, at.new, update=False)
        for number, node in self.nodes:
            xs = [values[i] for i in node.inputs]
            state = states.get(node.name, NONE)
            node.op.fill(state, xs, at.new)
            values[number] = node.op.step(state, xs, [at.new] * len(xs), at.new, spare)

    def clip(self, frames: list[Tensor]) -> list[Tensor]:
        """Every column of the output of a clip, frames (N, C, 1, *frame)."""
        values: list[Any] = [None] * self.size
        values[0] = Columns(0, frames, 2)
        for number, node in self.nodes:
            xs = [values[i] for i in node.inputs]
            first = node.clock.begin
            assert first is not None
            # No more than a stream of these frames would have by now.
            last = min(node.op.last([x.end for x in xs]), node.clock.column(len(frames) - 1) + 1)
            end = max(last, first)
            values[number] = Columns(first, node.op.clip(xs, first, end), node.time)
            for value in self.dead.get(number, ()):
                values[value] = None
        return values[self.output].frames


class Continual(nn.Module):
    """A module that takes a stream frame by frame; what all continual modules have.

    frame (N, C, *size), clip (N, C, T, *size); N are slots, independent streams. `forward` takes a
    clip and keeps nothing; `forward_step` and `forward_steps` keep what the next frame needs. The
    state lives in `start`ed slots, not in the state dict.
    """

    _graph: Graph | None
    _programs: dict[bool, Program]
    _states: dict[str, State]
    _recorded: dict[Any, tuple[Any, Recorded | None]]
    _shapes: list[Any]
    _seen: np.ndarray
    _frame: Tensor | None
    _example: Any
    _device: torch.device | None
    _torn: bool
    _version: int
    _tensors: list[Tensor] | None

    def __init__(self, *, start: str = "wait", backend: str = "auto", form: str = "ring") -> None:
        super().__init__()
        self.start_mode, self.backend, self.form = start, backend, form
        self._forget()

    def record(self, graph: Graph, value: int) -> int:
        """Add this module's operations on a value to a graph; the value of its output."""
        raise NotImplementedError

    # What follows from the graph alone.

    @property
    def clock(self) -> Clock:
        """When a column of output exists."""
        graph = self.graph()
        return graph.clock(graph.output)

    @property
    def delay(self) -> int:
        """Frames from a frame to the output column that a clip network has at its place."""
        return self.clock.lag

    @property
    def receptive_field(self) -> int:
        """Frames that an output depends on; the memory of recurrent layers is not counted."""
        return self.clock.receptive_field

    @property
    def padding(self) -> Any:
        """Frames by which the layers' temporal padding moves the output, all together."""
        return self.clock.padding

    @property
    def warm_up(self) -> int:
        """Frames that pass before the first result."""
        return self.clock.warm_up

    @property
    def rate(self) -> int:
        """Frames from one result to the next."""
        return self.clock.rate

    def graph(self) -> Graph:
        """The operations, before any fusing."""
        if self._graph is None:
            graph = Graph(self.start_mode, self.backend, self.form)
            graph.output = self.record(graph, 0)
            self._graph = graph
        return self._graph

    def _program(self) -> Program:
        program = self._programs.get(self.training)
        if program is None:
            graph = self.graph()
            program = Program(graph, graph.nodes if self.training else fused(graph))
            self._programs[self.training] = program
        if not self.training:
            self._follow_weights(program)
        return program

    def _follow_weights(self, program: Program) -> None:
        """Fold anew what was written since; writes through `.data` are not seen."""
        if self._tensors is None:
            tensors = (*self.parameters(), *self.buffers())
            self._tensors = [t for t in tensors if not t.is_inference()]
        version = sum(map(_VERSION, self._tensors))
        if version != self._version:
            self._version = version
            self._recorded = {}
            for _, node in program.nodes:
                if isinstance(node.op, Convolution):
                    node.op.forget()

    def plans(self) -> list[Plan]:
        """What the convolutions ran in eval mode for the frames so far, in their order."""
        program = self._programs.get(False)
        ops = [] if program is None else [node.op for _, node in program.nodes]
        return [op.plan for op in ops if isinstance(op, Convolution) and op.plan is not None]

    # Slots.

    @property
    def slots(self) -> int:
        """Streams that the state is for; 0 before the first frame."""
        return len(self._seen)

    @property
    def seen(self) -> tuple[int, ...]:
        """Frames that each slot had."""
        return tuple(self._seen.tolist())

    @property
    def state_bytes(self) -> int:
        """Bytes of state that all slots together hold now."""
        tensors = (t for state in self._states.values() for t in state.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def start(self, frame: Tensor) -> None:
        """Empty slots for streams of frames like this one (N, C, *size); values do not matter."""
        modes = {module: module.training for module in self.modules()}
        self.eval()  # the example's values must not get into a batch norm
        try:
            # Made in inference mode, the state could be written nowhere else.
            with torch.inference_mode(False), torch.no_grad():
                found = self._program().start(frame.unsqueeze(2), frame.shape[0])
        finally:
            for module, mode in modes.items():
                module.training = mode
        self._states, self._example, self._shapes = found
        self._recorded, self._frame = {}, torch.empty_like(frame, device="meta")
        self._seen = np.zeros(frame.shape[0], np.int64)
        self._device, self._torn = frame.device, False

    def stop(self) -> None:
        """Give the slots and their state up."""
        self._states, self._seen, self._torn = {}, np.zeros(0, np.int64), False
        self._recorded = {}

    def reset(self, slot: int | None = None) -> None:
        """Empty a slot, or all of them: the next frame is the first of a stream."""
        index = None if slot is None else torch.tensor([self._checked(slot)])
        with torch.no_grad():
            for op, state in self._stateful():
                op.clear(state, index)
        self._seen[slice(None) if slot is None else slot] = 0
        self._torn = self._torn and slot is not None

    def save(self, slot: int) -> Saved:
        """A copy of a slot for `restore`: tensors and numbers alone, which `torch.save` takes."""
        self._checked(slot)
        states = {
            name: {key: t.select(op.slot_axis, slot).clone() for key, t in state.items()}
            for name, op, state in self.named_states()
        }
        return {"seen": int(self._seen[slot]), "start": self.start_mode, "state": states}

    def restore(self, slot: int, saved: Saved) -> None:
        """Continue in a slot where the saved one was.

        Raises GeometryError if it is of another network, start mode or size of frames.
        """
        self._checked(slot)
        named = list(self.named_states())
        mine = {
            name: {key: t.select(op.slot_axis, slot).shape for key, t in state.items()}
            for name, op, state in named
        }
        given = {
            name: {key: t.shape for key, t in state.items()}
            for name, state in saved["state"].items()
        }
        if mine != given or saved["start"] != self.start_mode:
            raise GeometryError("restore: the saved slot is of another network or size of frames")
        with torch.no_grad():
            for name, op, state in named:
                for key, tensor in state.items():
                    tensor.select(op.slot_axis, slot).copy_(saved["state"][name][key])
        self._seen[slot] = saved["seen"]

    def copy(self, source: int, target: int) -> None:
        """Let a slot go on from where another one is."""
        self.restore(target, self.save(source))

    # Frames.

    def forward_step(
        self,
        frame: Tensor,
        active: Sequence[bool] | Tensor | None = None,
        *,
        update_state: bool = True,
    ) -> Step:
        """Take the next frame of every slot, or of the active ones, and give what it completes.

        frame   (N, C, *size); the first one fixes the number of slots, sizes, precision and device
        active  (N,) bool: slots without a frame now; theirs is not looked at, their state stays
        update_state  False: only look at what would come

        Raises GeometryError for a frame that does not fit; the state is then untouched.
        """
        if not len(self._seen):
            self.start(frame)
        mask = self._check(frame, active)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            column, on = self._advance(frame.unsqueeze(2), mask, update_state)
        if update_state:
            self._seen[slice(None) if mask is True else mask] += mask is not False
        return self._result(column, on)

    def _advance(self, frame: Tensor, mask: On, update: bool) -> tuple[Any, On]:
        seen = self._seen
        if mask is False:
            return None, False
        lockstep = mask is True and (seen == seen[0]).all()
        at = Moment(seen, int(seen[0]) if lockstep else None, mask, update=update)
        program = self._program()
        if (recorded := self._recording(program, frame, at)) is not None:
            self._torn = True  # until the last operation is done
            column = recorded(self._states, frame, mask, at)
            self._torn = False
            return column, False if column is None else mask
        self._torn = True
        if self.start_mode == "replicate":
            new = (seen == 0) & mask
            at.new = True if new.all() else new if new.any() else False
            if at.new is not False:
                program.fill(self._states, frame, at)
        column = program.step(self._states, frame, at)
        if at.new is not False and not update:
            slots = rows(np.broadcast_to(at.new, seen.shape))
            for op, state in self._stateful():
                op.clear(state, slots)
        self._torn = False
        return column

    def _recording(self, program: Program, frame: Tensor, at: Moment) -> Recorded | None:
        """The step as it was recorded for columns like those of now; None where it cannot be."""
        if self.training:
            self._recorded = {}  # a step with a gradient does not keep the tensors of its state
            return None
        ons = program.steady_ons(at) if at.update and in_c(frame) else None
        if ons is None:
            return None
        situation = winners.situation()
        before, found = self._recorded.get(ons, (None, None))
        if before != situation or (found is not None and not found.fits(frame)):
            recorder = Recorder(program, self._states, self._shapes, frame, ons)
            found = Recorded(recorder) if recorder.record() else None
            self._recorded[ons] = situation, found
        return found

    def _result(self, column: Any, on: On) -> Step:
        time = self.graph().time(self.graph().output)
        column = self._example if column is None else column
        y = column if time is None else column.squeeze(time)
        if on is True:
            return Step(y, torch.ones(self.slots, dtype=torch.bool))
        if on is False:
            return Step(torch.zeros_like(y), torch.zeros(self.slots, dtype=torch.bool))
        ready = torch.from_numpy(on)
        zeros = torch.zeros_like(y)
        index = rows(on)
        zeros[index] = y[index]
        return Step(zeros, ready)

    def forward_steps(self, clip: Tensor, *, update_state: bool = True) -> Step:
        """`forward_step` of every frame of a clip (N, C, T, *size), the results in one tensor."""
        before = self._copied() if not update_state and self.slots else None
        steps = [self.forward_step(frame) for frame in clip.unbind(2)]
        if before is not None:
            self._put_back(before)
        elif not update_state:
            self.reset()
        found = [step for step in steps if bool(step.ready.any())]
        if not found:
            empty = self._result(None, False).output.unsqueeze(2)[:, :, :0]
            return Step(empty, torch.zeros(self.slots, 0, dtype=torch.bool))
        output = torch.stack([step.output for step in found], dim=2)
        return Step(output, torch.stack([step.ready for step in found], dim=1))

    def forward(self, clip: Tensor) -> Tensor:
        """Every column of a clip (N, C, T, *size) as (N, K, columns, *frame); no state is read.

        The columns are those that a stream of these frames brings, in the same order. A gradient is
        kept in training mode alone.
        """
        if self.start_mode == "replicate":
            spare = self._twin()
            return spare.forward_steps(clip).output
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            columns = self._program().clip(list(clip.split(1, dim=2)))
        graph = self.graph()
        time = graph.time(graph.output)
        if not columns:
            raise GeometryError(
                f"forward: a clip of {clip.shape[2]} frames is too short for one column of output, "
                f"which needs {self.clock.warm_up + 1}"
            )
        flat = columns if time is None else [column.squeeze(time) for column in columns]
        return torch.stack(flat, dim=2)

    def _twin(self) -> Continual:
        """The same module without any state."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        twin._states, twin._seen, twin._torn = {}, np.zeros(0, np.int64), False
        twin._recorded = {}
        return twin

    # Bookkeeping.

    def _forget(self) -> None:
        """No graph, no state: all of it is made again when it is needed."""
        self._graph, self._programs = None, {}
        self._states, self._seen = {}, np.zeros(0, np.int64)
        self._recorded, self._shapes = {}, []
        self._frame = self._example = self._device = None
        self._torn = False
        self._version, self._tensors = -1, None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Another device or precision: weights are folded anew, slots are given up."""
        result = super()._apply(fn, recurse)
        self._forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(self.__dict__)
        spare = self._twin()
        spare._forget()
        for name in (
            "_graph", "_programs", "_states", "_seen", "_frame", "_example", "_tensors",
            "_recorded", "_shapes",
        ):  # fmt: skip
            kept[name] = spare.__dict__[name]
        return kept

    def _stateful(self) -> list[tuple[Any, State]]:
        return [(op, state) for _, op, state in self.named_states()]

    def named_states(self) -> list[tuple[str, Any, State]]:
        """Name, operation and state of all that has one; the tensors are those in use."""
        ops = {node.name: node.op for _, node in self._program().nodes}
        return [(name, ops[name], state) for name, state in self._states.items()]

    def _copied(self) -> Any:
        kept = {n: {k: t.clone() for k, t in s.items()} for n, s in self._states.items()}
        return kept, self._seen.copy()

    def _put_back(self, kept: Any) -> None:
        states, self._seen = kept
        with torch.no_grad():
            for name, state in states.items():
                for key, tensor in state.items():
                    self._states[name][key].copy_(tensor)

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise GeometryError(f"slot must be from 0 to {self.slots - 1}, got {slot}")
        return slot

    def _check(self, frame: Tensor, active: Sequence[bool] | Tensor | None) -> On:
        """The mask of slots; what is wrong is told before anything is touched."""
        like = self._frame
        assert like is not None
        if frame.shape != like.shape or frame.dtype != like.dtype:
            raise GeometryError(
                f"forward_step: the streams have frames {tuple(like.shape)} {like.dtype}, "
                f"got {tuple(frame.shape)} {frame.dtype}; `stop` gives the slots up"
            )
        if frame.device != self._device:
            raise GeometryError(
                f"forward_step: the state is on {self._device}, the frame on {frame.device}"
            )
        if self._torn:
            raise UnsupportedError(
                "forward_step: the step before broke off in the middle; `reset` the slots"
            )
        if active is None:
            return True
        mask = np.asarray(active, bool)
        if mask.shape != (self.slots,):
            raise GeometryError(
                f"forward_step: active must be ({self.slots},), got {tuple(mask.shape)}"
            )
        return True if mask.all() else mask.copy() if mask.any() else False
