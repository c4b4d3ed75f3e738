"""What a step of a continual network is made of: operations on single columns, and their state.

Inside a network a column keeps its time axis, of extent 1: (N, C, 1, *frame). Slots are the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .continual_clock import Clock, On

State = dict[str, Tensor]


@dataclass
class Moment:
    """One frame of every slot.

    seen    frames that each slot had before, (slots,)
    common  the same as one number if it is the same in all slots, and all of them get a frame
    active  slots that get a frame now; True for all
    new     slots whose first frame this is, where that one stands for all before it
    update  False: nothing is kept
    """

    seen: np.ndarray
    common: int | None
    active: On
    new: On = False
    update: bool = True

    def on(self, clock: Clock) -> On:
        """The slots in which the frame brings a column."""
        if self.common is not None:
            return self.new is True or clock.on(self.common)
        found = clock.on_each(self.seen) | self.new
        found &= self.active
        return True if found.all() else found if found.any() else False


@dataclass
class Columns:
    """Consecutive columns of one value of a clip, each with a time axis of extent 1 if it has one.

    first  number of the first one
    time   the axis of time in a column; None if the value has none any more
    """

    first: int
    frames: list[Tensor]
    time: int | None

    @property
    def end(self) -> int:
        return self.first + len(self.frames)

    def slice(self, first: int, end: int) -> list[Tensor]:
        """Columns `first` to `end`."""
        return self.frames[first - self.first : end - self.first]


def rows(on: On) -> Tensor:
    """Indices of slots."""
    return torch.from_numpy(np.flatnonzero(on))


def stacked(count: int, like: Tensor, fill: float = 0.0) -> Tensor:
    """(count, *like.shape), every entry in the memory layout of `like`."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda i: -strides[i])
    memory = like.new_full((count, *(like.shape[i] for i in order)), fill)
    return memory.permute(0, *(1 + order.index(i) for i in range(like.dim())))


class Op:
    """An operation on columns. Operations own no state: it is handed to them.

    slot_axis  of each tensor of the state
    """

    slot_axis = 1

    def allocate(self, xs: Sequence[Tensor]) -> State:
        """An empty state for slots with columns like these."""
        return {}

    def clear(self, state: State, slots: Tensor | None = None) -> None:
        """Empty the state of some slots, or of all."""

    def fill(self, state: State, xs: Sequence[Tensor], slots: On) -> None:
        """As if these columns had come for ever."""

    def step(
        self, state: State, xs: Sequence[Any], ons: Sequence[On], on: On, at: Moment
    ) -> Tensor | None:
        """Take the columns that are there (`ons`, for each input) and give one (`on`), or None."""
        raise NotImplementedError

    def clip(self, xs: Sequence[Columns], first: int, end: int) -> list[Tensor]:
        """Columns `first` to `end` of a clip; what precedes an input's first column is padding."""
        raise NotImplementedError

    def last(self, ends: Sequence[int]) -> int:
        """One more than the last column that these ends of the inputs allow."""
        return min(ends)


class Framewise(Op):
    """A function of one column, or of one from each of several values, aligned."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def step(self, state, xs, ons, on, at):  # type: ignore[no-untyped-def]
        return None if on is False else self.function(*xs)

    def clip(self, xs, first, end):  # type: ignore[no-untyped-def]
        columns = zip(*(x.slice(first, end) for x in xs), strict=True)
        return [self.function(*column) for column in columns]


class Whole(Framewise):
    """A module that treats every position alike; in training a clip goes through it in one piece.

    A batch norm needs that. In eval mode every column goes by itself, as in a stream: vector code
    may round the ends of an array in another way.
    """

    def __init__(self, module: nn.Module, time: int) -> None:
        super().__init__(module)
        self.module, self.time = module, time

    def clip(self, xs, first, end):  # type: ignore[no-untyped-def]
        if end <= first or not self.module.training:
            return super().clip(xs, first, end)
        whole = torch.cat(xs[0].slice(first, end), dim=self.time)
        return list(self.module(whole).split(1, dim=self.time))


class Retime(Op):
    """Other numbers for the same columns: every stride-th from `offset` on; before it, zeros."""

    def __init__(self, offset: int, stride: int) -> None:
        self.offset, self.stride = offset, stride

    def step(self, state, xs, ons, on, at):  # type: ignore[no-untyped-def]
        return None if on is False else xs[0]

    def clip(self, xs, first, end):  # type: ignore[no-untyped-def]
        (x,) = xs
        numbers = [self.offset + j * self.stride for j in range(first, end)]
        return [x.frames[c - x.first] for c in numbers]

    def last(self, ends: Sequence[int]) -> int:
        return -(-(ends[0] - self.offset) // self.stride)


class Delay(Op):
    """Keeps columns until a later value has got as far.

    count  columns that are kept: every new one finds the place of the one that leaves
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def allocate(self, xs: Sequence[Tensor]) -> State:
        return ring_of(self.count, xs[0])

    def clear(self, state: State, slots: Tensor | None = None) -> None:
        empty(state, slots)

    def fill(self, state: State, xs: Sequence[Tensor], slots: On) -> None:
        fill(state["columns"], xs[0], slots)

    def step(self, state, xs, ons, on, at):  # type: ignore[no-untyped-def]
        # Before the newest column takes the place of the one that leaves.
        y = None if on is False else oldest(state)
        if ons[0] is not False and at.update:
            push(state, xs[0], ons[0])
        return y

    def clip(self, xs, first, end):  # type: ignore[no-untyped-def]
        (x,) = xs
        if first >= x.first:
            return x.slice(first, end)
        zeros = [torch.zeros_like(x.frames[0])] * (min(x.first, end) - first)
        return [*zeros, *x.slice(max(first, x.first), end)]


def ring_of(count: int, like: Tensor, blank: float = 0.0) -> State:
    """The last `count` columns of every slot.

    columns  (count, N, ...): that of number t is in entry t mod count
    steps    (1, N): columns that each slot had
    """
    steps = torch.zeros((1, like.shape[0]), dtype=torch.int64, device=like.device)
    return {"columns": stacked(count, like, blank), "steps": steps}


def empty(state: State, slots: Tensor | None = None, blank: float = 0.0) -> None:
    """As if some slots, or all, had had no columns."""
    for tensor, value in ((state["columns"], blank), (state["steps"], 0)):
        if slots is None:
            tensor.fill_(value)
        else:
            tensor[:, slots] = value


def read(state: State, ages: Tensor) -> Tensor:
    """Copies (ages, N, ...) of columns; the last one has age 1."""
    ring, steps = state["columns"], state["steps"]
    slots = torch.arange(ring.shape[1], device=ring.device)
    return ring[(steps - ages[:, None]) % len(ring), slots]


def oldest(state: State) -> Tensor:
    """A copy (N, ...) of the column whose place the next one takes."""
    ring, steps = state["columns"], state["steps"]
    return ring[steps[0] % len(ring), torch.arange(ring.shape[1], device=ring.device)]


def push(state: State, x: Tensor, on: On) -> None:
    """The newest column of some slots takes the place of their oldest."""
    ring, steps = state["columns"], state["steps"]
    slots = torch.arange(ring.shape[1]) if on is True else rows(on)
    slots = slots.to(ring.device)
    x = x.detach()
    ring[steps[0, slots] % len(ring), slots] = x if on is True else x[slots]
    steps[0, slots] += 1


def fill(ring: Tensor, x: Tensor, slots: On) -> None:
    """The same column in every entry of the ring of some slots."""
    if slots is True:
        ring.copy_(x.expand_as(ring))
    elif slots is not False:
        index = rows(slots)
        ring[:, index] = x[index]


class Window(Op):
    """A reduction over the newest column and earlier ones, after one of each column by itself.

    reach    columns that are kept: dilation * (k - 1)
    reduce   of a stack (k, N, ...), oldest first
    padding  columns in front of the clip that hold `blank`

    Nothing is summed up over time: every column of output is reduced from the kept ones anew, so
    that a stream of any length has the rounding of one window.
    """

    def __init__(
        self,
        reach: int,
        reduce: Callable[[Tensor], Tensor],
        each: Callable[[Tensor], Tensor] | None = None,
        *,
        dilation: int = 1,
        stride: int = 1,
        padding: int = 0,
        blank: float = 0.0,
    ) -> None:
        self.reach, self.reduce, self.each = reach, reduce, each
        self.dilation, self.stride, self.padding, self.blank = dilation, stride, padding, blank

    def _each(self, x: Tensor) -> Tensor:
        return x if self.each is None else self.each(x)

    def allocate(self, xs: Sequence[Tensor]) -> State:
        return ring_of(self.reach, self._each(xs[0]), self.blank)

    def clear(self, state: State, slots: Tensor | None = None) -> None:
        empty(state, slots, self.blank)

    def fill(self, state: State, xs: Sequence[Tensor], slots: On) -> None:
        fill(state["columns"], self._each(xs[0]), slots)

    def step(self, state, xs, ons, on, at):  # type: ignore[no-untyped-def]
        if ons[0] is False:
            return None
        x, y = self._each(xs[0]), None
        if on is not False:
            ages = torch.arange(self.reach, 0, -self.dilation, device=x.device)
            kept = read(state, ages)
            y = self.reduce(torch.cat([kept, x[None]]).contiguous())
        if at.update:
            push(state, x, ons[0])
        return y

    def clip(self, xs, first, end):  # type: ignore[no-untyped-def]
        (x,) = xs
        each = [self._each(column) for column in x.frames]
        columns = []
        for j in range(first, end):
            start = j * self.stride - self.padding
            window = []
            for c in range(start, start + self.reach + 1, self.dilation):
                if c >= x.first:
                    window.append(each[c - x.first])
                else:
                    window.append(torch.full_like(each[0], self.blank))
            columns.append(self.reduce(torch.stack(window).contiguous()))
        return columns

    def last(self, ends: Sequence[int]) -> int:
        return (ends[0] + self.padding - self.reach - 1) // self.stride + 1


class Recurrent(Op):
    """An LSTM or a GRU, one column at a time; its memory is the state.

    A column is (N, 1, features), or (1, N, features) where the module has time first.
    """

    def __init__(self, module: nn.LSTM | nn.GRU) -> None:
        self.module = module
        own = nn.LSTM if isinstance(module, nn.LSTM) else nn.GRU
        self.call = partial(own.forward, module)  # a continual module's own takes a clip
        self.names = ("hidden", "cell") if own is nn.LSTM else ("hidden",)

    def allocate(self, xs: Sequence[Tensor]) -> State:
        m, slots = self.module, xs[0].shape[0 if self.module.batch_first else 1]
        sizes = {"hidden": m.proj_size or m.hidden_size, "cell": m.hidden_size}
        return {name: xs[0].new_zeros(m.num_layers, slots, sizes[name]) for name in self.names}

    def clear(self, state: State, slots: Tensor | None = None) -> None:
        for memory in state.values():
            if slots is None:
                memory.zero_()
            else:
                memory[:, slots] = 0

    def _memory(self, tensors: Sequence[Tensor]) -> Any:
        return tuple(tensors) if len(tensors) > 1 else tensors[0]

    def step(self, state, xs, ons, on, at):  # type: ignore[no-untyped-def]
        if on is False:
            return None
        y, memory = self.call(xs[0], self._memory([state[name] for name in self.names]))
        if not at.update:
            return y
        memories: Any = memory if len(self.names) > 1 else (memory,)
        for name, new in zip(self.names, memories, strict=True):
            if on is True:
                state[name].copy_(new.detach())
            else:
                index = rows(on)
                state[name][:, index] = new.detach()[:, index]
        return y

    def clip(self, xs, first, end):  # type: ignore[no-untyped-def]
        memory, columns = None, []
        for x in xs[0].slice(first, end):  # one by one, as the stream has them
            y, memory = self.call(x, memory)
            columns.append(y)
        return columns


def zeros_beside(x: Tensor, before: int, behind: int, axis: int) -> Tensor:
    """x with channels of zeros in front and behind."""
    parts = [x]
    for count, at_front in ((before, True), (behind, False)):
        if count:
            shape = list(x.shape)
            shape[axis] = count
            zeros = x.new_zeros(shape)
            parts = [zeros, *parts] if at_front else [*parts, zeros]
    return torch.cat(parts, dim=axis)
