"""Which operations a module of PyTorch is in a stream, or why it cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastconv.errors import UnsupportedError

from .continual_elementwise import Pool, largest, mean, spatial_mean
from .continual_graph import Graph

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVERAGE_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
MAX_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
ADAPTIVE_POOLS: dict[
    type[nn.Module], tuple[int, Callable[..., Any], Callable[[Tensor], Tensor]]
] = {
    nn.AdaptiveAvgPool1d: (1, functional.adaptive_avg_pool1d, mean),
    nn.AdaptiveAvgPool2d: (2, functional.adaptive_avg_pool2d, mean),
    nn.AdaptiveAvgPool3d: (3, functional.adaptive_avg_pool3d, mean),
    nn.AdaptiveMaxPool1d: (1, functional.adaptive_max_pool1d, largest),
    nn.AdaptiveMaxPool2d: (2, functional.adaptive_max_pool2d, largest),
    nn.AdaptiveMaxPool3d: (3, functional.adaptive_max_pool3d, largest),
}
# Every position by itself, or channels at one position.
POSITIONWISE = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.Softplus, nn.Softsign, nn.Mish,
    nn.LogSigmoid, nn.Threshold, nn.Identity, nn.Dropout, nn.AlphaDropout,
)  # fmt: skip
# They drop whole channels of a clip; in a stream of every frame anew.
CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """An int for every axis, or the tuple itself."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """PyTorch's class that a module is, or is derived from without a `forward` of its own."""
    return next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))


def axes_of(module: nn.Module) -> int:
    """Of a convolution or a pooling, from the name of its class."""
    return int(kind_of(module).__name__[-2])


def record(
    graph: Graph, module: nn.Module, value: int, name: str = "", window: int | None = None
) -> int:
    """Add a module's operations on a value to a graph.

    window  columns that a pooling to one column takes in; None: nobody said

    Raises UnsupportedError for what has no meaning in a stream.
    """
    kind = kind_of(module)
    own_record: Any = getattr(module, "record", None)
    if own_record is not None:
        graph.under.append(name)
        try:
            return int(own_record(graph, value))
        finally:
            graph.under.pop()
    if kind is nn.Sequential:
        for own, child in module.named_children():
            value = record(graph, child, value, f"{name}.{own}".lstrip("."), window)
        return value
    if kind is nn.Identity:
        return value
    if isinstance(module, CONVOLUTIONS):
        return graph.convolution(module, value, name)
    if isinstance(module, BATCH_NORMS):
        if module.running_mean is None:
            raise UnsupportedError("normalises with the statistics of the whole clip")
        return graph.module(module, value, name, "norm")
    if isinstance(module, (*POSITIONWISE, *CHANNEL_DROPOUTS)):
        return graph.module(module, value, name)
    if isinstance(module, nn.Linear):
        return graph.framewise(module, value, time=graph.time(value), name=name)
    if isinstance(module, nn.Softmax):
        return graph.framewise(module, value, time=graph.time(value), name=name)
    if isinstance(module, nn.Flatten):
        time = graph.time(value)
        merged = time is not None and module.start_dim <= time
        after = None if merged else time
        return graph.framewise(module, value, time=after, name=name)
    if kind in AVERAGE_POOLS:
        return average_pool(graph, module, value, name, AVERAGE_POOLS[kind])
    if kind in MAX_POOLS:
        return max_pool(graph, module, value, name, MAX_POOLS[kind])
    if kind in ADAPTIVE_POOLS:
        return adaptive_pool(graph, module, value, name, window)
    if isinstance(module, (nn.LSTM, nn.GRU)):
        return graph.recurrent(module, value, name)
    raise UnsupportedError(_why_not(module))


def _why_not(module: nn.Module) -> str:
    if isinstance(module, (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
        return "normalises with the statistics of the whole clip"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "is a transposed convolution, which brings several columns for one"
    if isinstance(module, nn.modules.upsampling.Upsample):
        return "is resampled in time"
    return "has no rule; give it a method `record` to make one"


def average_pool(graph: Graph, pool: Any, value: int, name: str, axes: int) -> int:
    """An average over time is the average of the averages of single frames."""
    kernel, stride, padding = (
        per_axis(v, axes) for v in (pool.kernel_size, pool.stride or pool.kernel_size, pool.padding)
    )
    if getattr(pool, "divisor_override", None):
        raise UnsupportedError("divides by a number of its own")
    if padding[0] and not pool.count_include_pad and graph.start == "zeros":
        raise UnsupportedError("averages over fewer columns at the start of a clip")
    each = None
    if axes > 1:
        each = Pool(
            True,
            (1, *kernel[1:]),
            (1, *stride[1:]),
            (0, *padding[1:]),
            (1,) * axes,
            pool.ceil_mode,
            pool.count_include_pad,
        )
    return graph.window(
        value, kernel[0], mean, each, stride=stride[0], padding=padding[0], name=name
    )


def max_pool(graph: Graph, pool: Any, value: int, name: str, axes: int) -> int:
    if pool.return_indices:
        raise UnsupportedError("returns places as well as values")
    kernel, stride, padding, dilation = (
        per_axis(v, axes)
        for v in (pool.kernel_size, pool.stride or pool.kernel_size, pool.padding, pool.dilation)
    )
    each = None
    if axes > 1:
        each = Pool(
            False,
            (1, *kernel[1:]),
            (1, *stride[1:]),
            (0, *padding[1:]),
            (1, *dilation[1:]),
            pool.ceil_mode,
        )
    return graph.window(
        value,
        kernel[0],
        largest,
        each,
        dilation=dilation[0],
        stride=stride[0],
        padding=padding[0],
        blank=float("-inf"),
        name=name,
    )


def adaptive_pool(
    graph: Graph, pool: Any, value: int, name: str, window: int | None, *, gate: bool = False
) -> int:
    """To one column: a window as long as the clip that the network is for.

    gate  the newest column stands at the window's end, for what is applied to that column
    """
    axes, function, reduce = ADAPTIVE_POOLS[kind_of(pool)]
    size = per_axis(pool.output_size, axes) if pool.output_size is not None else (None,)
    if size[0] not in (1, None):
        raise UnsupportedError(f"pools a clip to {size[0]} columns; only 1 is served")
    each: Callable[[Tensor], Tensor] = spatial_mean
    if reduce is not mean or any(extent != 1 for extent in size[1:]):
        each = partial(function, output_size=(1, *size[1:]) if axes > 1 else 1)
    if size[0] is None:
        window = 1
    if window is None:
        raise UnsupportedError("pools over the whole clip; say over how many columns, `window`")
    padding = window - 1 if gate else 0
    return graph.window(value, window, reduce, each, padding=padding, name=name)


def concatenated(*xs: Tensor) -> Tensor:
    return torch.cat(xs, dim=1)


def added(*xs: Tensor) -> Tensor:
    total = xs[0] + xs[1]
    for x in xs[2:]:
        total = total + x
    return total


def multiplied(x: Tensor, y: Tensor) -> Tensor:
    return x * y
