"""A network's step, recorded once and played for every frame as calls of C.

What a frame costs besides arithmetic, plans, shapes, tensors and their memory, is paid once.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastconv import torch_ops, torch_ops_runner
from fastconv.plan import CHANNELS_LAST, CONTIGUOUS

from .continual_clock import On
from .continual_ops import Moment, State
from .continual_record import Call, Recorder, Segment, Shape, is_turned
from .graph_memory import Life, block, offsets


class Player:
    """Calls of C between two steps of Python.

    reads  values that come from outside, in the layout that is wanted, and the fields that take
           their addresses
    makes  values that leave, tensors of their own in every run: shape, strides, and the fields
           with bytes behind the beginning
    """

    def __init__(self, calls: Any, threads: int, play: Any) -> None:
        self.calls, self._count, self._threads, self._play = calls, len(calls), threads, play
        self.reads: dict[tuple[int, str], list[tuple[Any, str]]] = {}
        self.makes: dict[int, tuple[Shape, Shape, list[tuple[Any, str, int]]]] = {}

    def __call__(self, env: list[Any], active: int) -> None:
        held = []  # while the kernels read it
        for (value, layout), targets in self.reads.items():
            x = torch_ops.dense(env[value], layout)
            held.append(x)
            at = x.data_ptr()
            for call, name in targets:
                setattr(call, name, at)
        for value, (shape, strides, places) in self.makes.items():
            y = env[value] = torch.empty_strided(shape, strides)
            at = y.data_ptr()
            for call, name, behind in places:
                setattr(call, name, at + behind)
        self._play(self.calls, self._count, active, self._threads)


class Recorded:
    """A recorded step with the memory between its calls, which is used again.

    What Python gets to see, the output first of all, is a new tensor in every step.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._output, self._size = recorder.output, recorder.program.size
        self._keep = recorder.keep, recorder.states
        self._turned = recorder.turned
        self._active = np.zeros(recorder.columns[0].shape[0], np.uint8)
        segments = [part for part in recorder.parts if isinstance(part, Segment)]
        calls = [call for segment in segments for call in segment.calls]
        self._made = {value for call in calls for value in call.writes.values()}
        seen = {i for part in recorder.parts if not isinstance(part, Segment) for i in part.inputs}
        self._leaves = self._made & (seen | {recorder.output})
        self._columns = recorder.columns
        self._lay_out(calls)
        self._parts = [
            self._player(recorder, part) if isinstance(part, Segment) else part
            for part in recorder.parts
        ]

    def fits(self, frame: Tensor) -> bool:
        """Whether the frame's memory is laid out as the recorded one's."""
        return self._turned == is_turned(frame)

    def _lay_out(self, calls: list[Call]) -> None:
        """One block for what lies between calls, and scratch behind it."""
        lives: dict[int, Life] = {}
        for i, call in enumerate(calls):
            for value in (*call.writes.values(), *call.reads.values()):
                if value in self._made and value not in self._leaves:
                    first = lives[value].first if value in lives else i
                    lives[value] = Life(prod(self._columns[value].shape), first, i)
        starts, total = offsets(lives)
        scratch = max((call.scratch for call in calls), default=0)
        self._memory = block(total + scratch)
        begin = self._memory.data_ptr()
        self._places = {value: begin + 4 * at for value, at in starts.items()}
        self._scratch = begin + 4 * total

    def _player(self, recorder: Recorder, segment: Segment) -> Player:
        lib, ffi = recorder.launch.lib, recorder.launch.ffi
        records = ffi.new("fc_call[]", len(segment.calls))
        player = Player(records, recorder.launch.threads(), lib.fc_play)
        made: set[int] = set()
        for record, call in zip(records, segment.calls, strict=True):
            record.kind, record.params = getattr(lib, f"FC_CALL_{call.kind}"), call.params
            record.workspace = self._scratch
            for name, address in call.fixed.items():
                setattr(record, name, address)
            for name, value in call.writes.items():
                made.add(value)
                self._write(player, record, name, value, call.behind)
            for name, value in call.reads.items():
                if value in self._places:
                    setattr(record, name, self._places[value])
                elif value in made:
                    self._write(player, record, name, value, 0)
                else:
                    layout = CONTIGUOUS if call.kind == "TURN" else CHANNELS_LAST
                    player.reads.setdefault((value, layout), []).append((record, name))
        self._keep = *self._keep, [call.params for call in segment.calls]
        return player

    def _write(self, player: Player, record: Any, name: str, value: int, behind: int) -> None:
        if value in self._places:
            setattr(record, name, self._places[value] + behind)
            return
        shape = tuple(self._columns[value].shape)
        strides = torch_ops_runner.dense_strides(shape, CHANNELS_LAST)
        places = player.makes.setdefault(value, (shape, strides, []))[2]
        places.append((record, name, behind))

    def __call__(self, states: dict[str, State], frame: Tensor, on: On, at: Moment) -> Any:
        """The output column of a frame (N, C, 1, *size), None if it brings none.

        on  the slots that get a frame, for which it brings the columns that were recorded
        """
        env: list[Any] = [None] * self._size
        env[0], active = frame, 0
        if on is not True:
            self._active[:] = on
            active = self._active.ctypes.data
        for part in self._parts:
            if isinstance(part, Player):
                part(env, active)
                continue
            ons = [on if came else False for came in part.ons]
            xs = [env[i] for i in part.inputs]
            given = on if part.on else False
            env[part.number] = part.op.step(states.get(part.name, {}), xs, ons, given, at)
        return env[self._output]
