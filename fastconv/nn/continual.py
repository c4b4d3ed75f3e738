"""Continual modules to build networks of: convolutions, poolings, branches, heads.

What they have in common, frames, slots, state and timing, is in `continual_network.Continual`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

from torch import Tensor, nn

from fastconv.errors import UnsupportedError

from . import continual_rules as rules
from .continual_elementwise import largest, mean, spatial_mean
from .continual_graph import Graph
from .continual_network import Continual

Module = TypeVar("Module", bound="_Layer")


class _Layer(Continual):
    """A module of PyTorch that is continual besides: its arguments, its state dict."""

    padding: Any = 0  # PyTorch's own, per axis, time first

    def __init__(
        self,
        *args: Any,
        start: str = "wait",
        backend: str = "auto",
        form: str = "ring",
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        own: Any = next(c for c in type(self).__mro__ if c.__module__.startswith("torch.nn"))
        own.__init__(self, *args, **kwargs)
        self.start_mode, self.backend, self.form = start, backend, form
        self._forget()

    @classmethod
    def convert(
        cls: type[Module],
        module: nn.Module,
        *,
        start: str = "wait",
        backend: str = "auto",
        form: str = "ring",
    ) -> Module:
        """This class with the parameters (not copies) of PyTorch's module."""
        new = cls.__new__(cls)
        new.__dict__.update(module.__dict__)
        new.start_mode, new.backend, new.form = start, backend, form
        new._forget()
        return new


class _Convolution(_Layer):
    def record(self, graph: Graph, value: int) -> int:
        return graph.convolution(self, value)  # type: ignore[arg-type]


class ContinualConv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` over a stream: frames (N, C)."""


class ContinualConv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` over a stream, its first axis being time: frames (N, C, W)."""


class ContinualConv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` over a stream: frames (N, C, H, W)."""


class _AveragePool(_Layer):
    axes = 3

    def record(self, graph: Graph, value: int) -> int:
        return rules.average_pool(graph, self, value, "", self.axes)


class ContinualAvgPool1d(_AveragePool, nn.AvgPool1d):
    """`torch.nn.AvgPool1d` over a stream. Averages are taken anew from the kept columns."""

    axes = 1


class ContinualAvgPool2d(_AveragePool, nn.AvgPool2d):
    """`torch.nn.AvgPool2d` over a stream, its first axis being time."""

    axes = 2


class ContinualAvgPool3d(_AveragePool, nn.AvgPool3d):
    """`torch.nn.AvgPool3d` over a stream. Averages are taken anew from the kept columns."""


class _MaxPool(_Layer):
    axes = 3

    def record(self, graph: Graph, value: int) -> int:
        return rules.max_pool(graph, self, value, "", self.axes)


class ContinualMaxPool1d(_MaxPool, nn.MaxPool1d):
    """`torch.nn.MaxPool1d` over a stream."""

    axes = 1


class ContinualMaxPool2d(_MaxPool, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` over a stream, its first axis being time."""

    axes = 2


class ContinualMaxPool3d(_MaxPool, nn.MaxPool3d):
    """`torch.nn.MaxPool3d` over a stream."""


class GlobalPool(Continual):
    """The mean, or the largest, of all positions of the last `window` columns.

    A network for clips pools over the clip; a stream has no end, so the window is said. It may be
    longer than the clips were.

    frames (N, C, *size) give (N, C, 1, ...)
    """

    def __init__(self, window: int, reduce: str = "mean", **options: Any) -> None:
        super().__init__(**options)
        if window < 1 or reduce not in ("mean", "max"):
            raise UnsupportedError(
                f"GlobalPool: window must be at least 1 and reduce 'mean' or 'max', "
                f"got {window} and {reduce!r}"
            )
        self.window, self.reduce = window, reduce

    def record(self, graph: Graph, value: int) -> int:
        average = self.reduce == "mean"
        each = spatial_mean if average else _spatial_max
        return graph.window(value, self.window, mean if average else largest, each)


def _spatial_max(x: Tensor) -> Tensor:
    axes = tuple(range(3, x.dim()))
    return x.amax(axes, keepdim=True) if axes else x


class Delay(Continual):
    """Columns come out `frames` columns after they went in."""

    def __init__(self, frames: int, **options: Any) -> None:
        super().__init__(**options)
        if frames < 0:
            raise UnsupportedError(f"Delay: frames must be at least 0, got {frames}")
        self.frames = frames

    def record(self, graph: Graph, value: int) -> int:
        return graph.delay(value, self.frames)


class Sequential(Continual):
    """Modules one after the other, continual ones and any of PyTorch's that has a rule.

    modules: as for `torch.nn.Sequential`, also one OrderedDict

    Raises UnsupportedError when it is first used if a module cannot be continual.
    """

    def __init__(self, *modules: Any, **options: Any) -> None:
        super().__init__(**options)
        named = modules[0] if modules and isinstance(modules[0], OrderedDict) else None
        for name, module in named.items() if named else enumerate(modules):
            self.add_module(str(name), module)

    def record(self, graph: Graph, value: int) -> int:
        for name, module in self.named_children():
            value = recorded(graph, module, value, name)
        return value


class Residual(Continual):
    """activation(branch(x) + shortcut(x)), the faster of the two waiting for the other.

    shortcut    x itself if None
    activation  none if None
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.branch, self.shortcut, self.activation = branch, shortcut, activation

    def record(self, graph: Graph, value: int) -> int:
        long = recorded(graph, self.branch, value, "branch")
        short = value
        if self.shortcut is not None:
            short = recorded(graph, self.shortcut, value, "shortcut")
        y = graph.framewise(rules.added, long, short, name="add", kind="add")
        return y if self.activation is None else recorded(graph, self.activation, y, "activation")


class Concat(Continual):
    """The channels of several branches over one input, the faster ones waiting for the slowest."""

    def __init__(self, *branches: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.branches = nn.ModuleList(branches)

    def record(self, graph: Graph, value: int) -> int:
        found = [
            recorded(graph, branch, value, f"branches.{i}")
            for i, branch in enumerate(self.branches)
        ]
        return graph.framewise(rules.concatenated, *found, name="concat")


class SqueezeExcite(Continual):
    """x * gate(pooled x), pooled over the positions of each frame, or of the last `window` ones.

    gate: from (N, C, 1, ...) to a factor for every channel
    """

    def __init__(self, gate: nn.Module, window: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.gate, self.window = gate, window

    def record(self, graph: Graph, value: int) -> int:
        pooled = graph.window(
            value, self.window, mean, spatial_mean, padding=self.window - 1, name="pool"
        )
        factor = recorded(graph, self.gate, pooled, "gate")
        return graph.framewise(rules.multiplied, value, factor, name="scale", kind="scale")


class _Recurrent(_Layer):
    def record(self, graph: Graph, value: int) -> int:
        batch_first = bool(self.batch_first)
        before, after = (_to_batch_first, _from_batch_first)
        if not batch_first:
            before, after = (_to_time_first, _from_time_first)
        value = graph.framewise(before, value, time=1 if batch_first else 0, name="in")
        value = graph.recurrent(self, value)  # type: ignore[arg-type]
        return graph.framewise(after, value, time=2, name="out")


class ContinualLSTM(_Recurrent, nn.LSTM):  # type: ignore[misc]  # forward takes a clip
    """`torch.nn.LSTM` over a stream: frames (N, features, ...) of one position give (N, hidden)."""


class ContinualGRU(_Recurrent, nn.GRU):  # type: ignore[misc]  # forward takes a clip
    """`torch.nn.GRU` over a stream: frames (N, features, ...) of one position give (N, hidden)."""


def _to_batch_first(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], 1, -1)


def _from_batch_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _to_time_first(x: Tensor) -> Tensor:
    return x.reshape(1, x.shape[0], -1)


def _from_time_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0)


def recorded(graph: Graph, module: nn.Module, value: int, name: str) -> int:
    """`continual_rules.record`, its refusals with the place of the module."""
    try:
        return rules.record(graph, module, value, name)
    except UnsupportedError as error:
        if getattr(error, "placed", False):
            raise
        where = ".".join((*graph.under, name)).strip(".")
        told = UnsupportedError(f"{where} ({type(module).__name__}) {error}")
        told.placed = True  # type: ignore[attr-defined]
        raise told from error


def momentum(clip_momentum: float, steps: int) -> float:
    """Batch-norm momentum for training frame by frame that forgets as fast as that of clips.

    steps: optimiser steps' worth of frames per clip; 2 / (1 + steps (2 / clip_momentum - 1)), the
        momentum whose averaging window is `steps` times as long.

    Source: Hedegaard and Iosifidis, Continual 3D Convolutional Neural Networks, ECCV 2022.
    """
    return 2 / (1 + steps * (2 / clip_momentum - 1))


def set_momentum(model: nn.Module, steps: int) -> None:
    """`momentum` in every batch norm of a model that has one."""
    for module in model.modules():
        if isinstance(module, rules.BATCH_NORMS) and module.momentum is not None:
            module.momentum = momentum(module.momentum, steps)


__all__ = [
    "Concat",
    "ContinualAvgPool1d",
    "ContinualAvgPool2d",
    "ContinualAvgPool3d",
    "ContinualConv1d",
    "ContinualConv2d",
    "ContinualConv3d",
    "ContinualGRU",
    "ContinualLSTM",
    "ContinualMaxPool1d",
    "ContinualMaxPool2d",
    "ContinualMaxPool3d",
    "Delay",
    "GlobalPool",
    "Residual",
    "Sequential",
    "SqueezeExcite",
    "momentum",
    "set_momentum",
]
