"""A continual network as a list of operations, each with the clock of its columns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fastconv.errors import UnsupportedError

from .continual_clock import STARTS, Clock, joined, waiting
from .continual_conv import Convolution, Convolutions
from .continual_elementwise import Blend
from .continual_ops import Delay, Framewise, Op, Recurrent, Retime, Whole, Window

FORMS = ("ring", "sum", "auto")
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
}


@dataclass(frozen=True)
class Node:
    """One operation.

    inputs  numbers of the nodes whose columns it takes; number 0 is the frame itself
    time    the axis of time in its columns; None if they have none
    kind    what fusing looks at: 'norm', 'add', 'scale' or the name of an activation
    """

    name: str
    op: Op
    inputs: tuple[int, ...]
    clock: Clock
    time: int | None
    kind: str = ""


class Graph:
    """Operations in the order in which they run, made by the methods below.

    Values are numbers of nodes. `under` is put in front of the names of new nodes.

    start    see `continual_clock.STARTS`
    backend, form  of the convolutions; form of their memory, 'ring', 'sum' or 'auto'
    """

    def __init__(self, start: str = "wait", backend: str = "auto", form: str = "ring") -> None:
        if start not in STARTS:
            raise UnsupportedError(f"unknown start {start!r}. Known: {', '.join(STARTS)}")
        if form not in FORMS:
            raise UnsupportedError(f"unknown form {form!r}. Known: {', '.join(FORMS)}")
        self.start, self.backend, self.form = start, backend, form
        self.nodes = [Node("", Framewise(_same), (), Clock().started(start), 2)]
        self.output = 0
        self.under: list[str] = []
        self._names: dict[str, int] = {}

    def clock(self, value: int) -> Clock:
        return self.nodes[value].clock

    def time(self, value: int) -> int | None:
        return self.nodes[value].time

    def name(self, own: str) -> str:
        """A name that no other node has."""
        name = ".".join(part for part in (*self.under, own) if part)
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name} ({count})"

    def add(
        self,
        name: str,
        op: Op,
        inputs: Sequence[int],
        clock: Clock,
        time: int | None,
        kind: str = "",
    ) -> int:
        self.nodes.append(Node(self.name(name), op, tuple(inputs), clock, time, kind))
        return len(self.nodes) - 1

    def framewise(
        self,
        function: Callable[..., Tensor],
        *values: int,
        time: int | None = 2,
        name: str = "",
        kind: str = "",
    ) -> int:
        """A function of one column of each value, aligned."""
        clock, aligned = self.aligned(values, name)
        return self.add(name, Framewise(function), aligned, clock, time, kind)

    def aligned(self, values: Sequence[int], name: str) -> tuple[Clock, list[int]]:
        """The clock of several values together, and those that come early, delayed."""
        if len(values) == 1:
            return self.clock(values[0]), list(values)
        clocks = [self.clock(value) for value in values]
        together = joined(clocks, self.start)
        delayed = []
        for number, (value, clock) in enumerate(zip(values, clocks, strict=True)):
            count = waiting(clock, together)
            if count:
                late = replace(together)
                op = Delay(count)
                own = f"{name}.delay{number}".lstrip(".")
                value = self.add(own, op, (value,), late, self.time(value))
            delayed.append(value)
        return together, delayed

    def delay(self, value: int, count: int, name: str = "delay") -> int:
        """The value `count` columns late."""
        if not count:
            return value
        clock = self.clock(value)
        late = replace(clock, lag=clock.lag + count * clock.rate)
        return self.add(name, Delay(count), (value,), late, self.time(value))

    def convolution(self, module: Convolutions, value: int, name: str = "") -> int:
        op = Convolution(module, backend=self.backend, form=self.form, start=self.start)
        padding = op.padding[0][0]
        if padding > op.reach:
            raise UnsupportedError(f"pads {padding} frames in front of a window of {op.reach + 1}")
        clock = self.clock(value).convolved(op.reach, module.stride[0], padding, self.start)
        return self.add(name, op, (value,), clock, 2, "convolution")

    def module(self, module: nn.Module, value: int, name: str = "", kind: str = "") -> int:
        """A module that treats every position alike."""
        kind = kind or ACTIVATIONS.get(type(module), "")
        if getattr(module, "inplace", False):
            module = copy.copy(module)  # columns may be kept
            module.inplace = False  # type: ignore[assignment]
        time = self.time(value)
        op = Framewise(module) if time is None else Whole(module, time)
        return self.add(name, op, (value,), self.clock(value), time, kind)

    def retime(self, value: int, offset: int = 0, stride: int = 1, name: str = "") -> int:
        """Every stride-th column, from `offset` on; with a negative one zeros come first."""
        if offset == 0 and stride == 1:
            return value
        clock = self.clock(value).retimed(offset, stride, self.start)
        return self.add(name, Retime(offset, stride), (value,), clock, self.time(value))

    def window(
        self,
        value: int,
        taps: int,
        reduce: Callable[[Tensor], Tensor],
        each: Callable[[Tensor], Tensor] | None = None,
        *,
        dilation: int = 1,
        stride: int = 1,
        padding: int = 0,
        blank: float = 0.0,
        time: int | None = 2,
        name: str = "",
    ) -> int:
        """A reduction over `taps` columns, after one of each by itself."""
        clock = self.clock(value)
        reach = dilation * (taps - 1)
        if padding > reach:
            raise UnsupportedError(f"pads {padding} frames in front of a window of {reach + 1}")
        if not reach:
            function = _same if each is None else each
            value = self.add(name, Framewise(function), (value,), clock, time)
            return self.retime(value, 0, stride, name)
        # Zeros that were padded before take part; padding of its own has its own value.
        blank = blank if not clock.begin or self.start != "zeros" else 0.0
        op = Window(
            reach, reduce, each, dilation=dilation, stride=stride, padding=padding, blank=blank
        )
        late = clock.convolved(reach, stride, padding, self.start)
        return self.add(name, op, (value,), late, time)

    def recurrent(self, module: nn.LSTM | nn.GRU, value: int, name: str = "") -> int:
        if module.bidirectional:
            raise UnsupportedError("is bidirectional: its second direction begins with the end")
        time = 1 if module.batch_first else 0
        return self.add(name, Recurrent(module), (value,), self.clock(value), time)


def _same(x: Tensor) -> Tensor:
    return x


def fused(graph: Graph) -> list[Node | None]:
    """The nodes with batch norm, residual and activation done by the convolution before them.

    Numbers stay: a convolution takes the place of the last node that it does the work of, None is
    left in the other places. What a node's value would be used for twice is not taken over. Sums,
    scales and activations that are left become one pass each.
    """
    nodes: list[Node | None] = list(graph.nodes)
    users: dict[int, list[int]] = {graph.output: [len(nodes)]}
    for number, node in enumerate(graph.nodes):
        for value in node.inputs:
            users.setdefault(value, []).append(number)

    def follower(value: int, kinds: Sequence[str]) -> int | None:
        used = users.get(value, [])
        node = nodes[used[0]] if len(used) == 1 and used[0] < len(nodes) else None
        return used[0] if node is not None and node.kind in kinds else None

    for number, node in enumerate(graph.nodes):
        if node.kind != "convolution":
            continue
        assert isinstance(node.op, Convolution)
        norm, activation, place, taken = None, "none", number, [number]
        residual: tuple[int, ...] = ()
        if (found := follower(place, ("norm",))) is not None:
            norm, place = graph.nodes[found].op.module, found  # type: ignore[attr-defined]
            taken.append(found)
        if (found := follower(place, ("add",))) is not None:
            others = [value for value in graph.nodes[found].inputs if value != place]
            if len(others) == 1:
                residual, place = (others[0],), found
                taken.append(found)
        if (found := follower(place, tuple(ACTIVATIONS.values()))) is not None:
            activation, place = graph.nodes[found].kind, found
        if place == number:
            continue
        op = Convolution(
            node.op.module,
            norm=norm,
            activation=activation,
            residual=bool(residual),
            backend=graph.backend,
            form=graph.form,
            start=graph.start,
        )
        inputs = (*node.inputs, *residual)
        for gone in taken:
            nodes[gone] = None
        nodes[place] = replace(graph.nodes[place], name=node.name, op=op, inputs=inputs, kind="")
    for number, last in enumerate(nodes):
        if last is None or last.kind not in ("scale", "add", *ACTIVATIONS.values()):
            continue
        activation, place = last.kind, number
        if last.kind in ("scale", "add"):
            if len(last.inputs) != 2:
                continue
            found = follower(number, tuple(ACTIVATIONS.values()))
            activation = "none" if found is None else graph.nodes[found].kind
            place = number if found is None else found
        blend = Blend(last.kind == "scale", last.kind == "add", activation)
        nodes[number] = None
        nodes[place] = replace(graph.nodes[place], op=Framewise(blend), inputs=last.inputs, kind="")
    return nodes
