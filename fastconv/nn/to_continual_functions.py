"""Which operations PyTorch's functions are in a stream, as they come out of a traced clip.

A handler is called as handler(converter, node, *args, **kwargs); values of the clip are `Traced`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fastconv.errors import UnsupportedError

from . import continual_rules as rules
from .continual_elementwise import largest, mean, spatial_mean, summed
from .continual_ops import zeros_beside

if TYPE_CHECKING:
    from .to_continual import Converter

# Functions of one value that treat every position alike; some of them take numbers besides.
POSITIONWISE = (
    "relu", "relu6", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "elu",
    "leaky_relu", "gelu", "selu", "celu", "softplus", "mish", "exp", "log", "log1p", "sqrt",
    "rsqrt", "square", "abs", "neg", "clamp", "clip", "float", "contiguous", "clone", "detach",
)  # fmt: skip
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout")
BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "true_divide": "div",
    "maximum": "maximum", "minimum": "minimum", "pow": "pow", "__rsub__": "__rsub__",
    "__rtruediv__": "__rtruediv__", "__rdiv__": "__rtruediv__",
}  # fmt: skip
RESHAPES = ("reshape", "view", "flatten", "unsqueeze", "squeeze", "unflatten")
SPLITS = ("chunk", "split", "tensor_split", "unbind")


@dataclass(frozen=True)
class Traced:
    """A value of the clip: its number in the graph and its shape there."""

    value: int
    shape: tuple[int, ...]
    converter: Converter

    @property
    def time(self) -> int | None:
        """The axis of the frames, also of extent 1; None if there is none any more."""
        return self.converter.graph.time(self.value)

    @property
    def dims(self) -> int:
        return len(self.shape)

    @property
    def collapsed(self) -> bool:
        """Whether the clip has but one column of it."""
        return self.time is None or self.shape[self.time] == 1


@dataclass(frozen=True)
class Zeros:
    """Zeros that the model makes."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """What a function with several results would give: `function(column)[i]`."""

    source: Traced
    function: Callable[[Tensor], Sequence[Tensor]]


def framewise(
    converter: Converter,
    node: fx.Node,
    function: Callable[..., Tensor],
    *xs: Traced,
    time: int | None,
    kind: str = "",
) -> Traced:
    values = [x.value for x in xs]
    graph = converter.graph
    value = graph.framewise(function, *values, time=time, name=node.name, kind=kind)
    return Traced(value, node.meta["shape"], converter)


def positionwise(converter: Converter, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Traced:
    name = _plain(node)
    if not isinstance(x, Traced):
        raise UnsupportedError("is not called with frames")
    if any(isinstance(a, (Traced, fx.Node)) for a in (*args, *kwargs.values())):
        raise UnsupportedError("takes a second tensor")
    kwargs.pop("inplace", None)
    function = getattr(functional, name, None) or getattr(torch, name, None)
    function = function or getattr(Tensor, name)
    args = tuple(a for a in args if not isinstance(a, bool))  # `inplace`
    whole = partial(function, **kwargs) if kwargs else function
    call = partial(_with_numbers, whole, args) if args else whole
    kind = name if name in ("relu", "silu", "hardswish", "sigmoid") else ""
    return framewise(converter, node, call, x, time=x.time, kind=kind)


def _with_numbers(function: Callable[..., Tensor], args: tuple[Any, ...], x: Tensor) -> Tensor:
    return function(x, *args)


def unchanged(converter: Converter, node: fx.Node, x: Traced, *args: Any, **kwargs: Any) -> Traced:
    """Dropout in eval mode. A model in training mode should use the module."""
    return x


def softmax(converter: Converter, node: fx.Node, x: Traced, dim: int, **kwargs: Any) -> Traced:
    if x.time is not None and dim % x.dims == x.time:
        raise UnsupportedError("runs along time")
    from_right = dim % x.dims - x.dims
    call = partial(getattr(functional, _plain(node)), dim=from_right)
    return framewise(converter, node, call, x, time=x.time)


def binary(converter: Converter, node: fx.Node, a: Any, b: Any, **kwargs: Any) -> Any:
    name = BINARY[_plain(node)]
    function = partial(getattr(Tensor, name), **kwargs) if kwargs else getattr(Tensor, name)
    if isinstance(a, Zeros) or isinstance(b, Zeros):
        if name not in ("add", "sub") or (isinstance(a, Zeros) and name == "sub"):
            raise UnsupportedError("computes with zeros that the model makes")
        return b if isinstance(a, Zeros) else a
    if isinstance(a, Traced) and isinstance(b, Traced):
        first, second = same_rate((a, b))
        kind = {"add": "add" if a.shape == b.shape else "", "mul": "scale"}.get(name, "")
        kind = "" if kwargs else kind
        time = _joined_time((a, b), node.meta["shape"])
        return framewise(converter, node, function, first, second, time=time, kind=kind)
    x, other = (a, b) if isinstance(a, Traced) else (b, a)
    if isinstance(other, fx.Node):
        constant = _constant(converter, other, x, node)
        call: Callable[..., Tensor] = partial(_with_constant, function, constant, x is b)
    elif x is b:
        raise UnsupportedError("has a number in front")
    else:
        call = partial(_with_numbers, function, (other,))
    return framewise(converter, node, call, x, time=x.time)


def _constant(
    converter: Converter, other: fx.Node, x: Traced, node: fx.Node
) -> Callable[[], Tensor]:
    """A parameter or buffer of the model, the same for all frames."""
    shape, time = other.meta["shape"], x.time
    if time is not None:
        at = len(shape) - (x.dims - time)
        if at >= 0 and shape[at] != 1:
            raise UnsupportedError(f"has a value of its own for each of {shape[at]} frames")
    path, _, name = str(other.target).rpartition(".")
    if other.target == "constant":
        raise UnsupportedError("computes with a tensor that is no parameter and no buffer")
    return partial(getattr, converter.network.part(path), name)


def _with_constant(
    function: Callable[..., Tensor], constant: Callable[[], Tensor], behind: bool, x: Tensor
) -> Tensor:
    return function(constant(), x) if behind else function(x, constant())


def same_rate(xs: Sequence[Traced]) -> list[Traced]:
    """Values that a clip has once, from branches with fewer and with more columns, meet.

    What a clip begins with is at the same frame in all of them.
    """
    rates = [x.converter.graph.clock(x.value).rate for x in xs]
    slowest = max(rates)
    if len(set(rates)) == 1 or not all(x.collapsed for x in xs):
        return list(xs)
    if any(slowest % rate for rate in rates):
        return list(xs)
    return [
        Traced(x.converter.graph.retime(x.value, 0, slowest // rate), x.shape, x.converter)
        for x, rate in zip(xs, rates, strict=True)
    ]


def _joined_time(xs: Sequence[Traced], shape: tuple[int, ...]) -> int | None:
    """The axis of time in a broadcast result."""
    places = {len(shape) - x.dims + x.time for x in xs if x.time is not None}
    if len(places) > 1:
        raise UnsupportedError("joins values whose frames lie along different axes")
    return places.pop() if places else None


def cat(converter: Converter, node: fx.Node, xs: Sequence[Any], dim: int = 0) -> Traced:
    frames = [x for x in xs if isinstance(x, Traced)]
    if not frames or any(isinstance(x, fx.Node) for x in xs):
        raise UnsupportedError("joins frames with something else")
    axis, time = dim % frames[0].dims, _joined_time(frames, frames[0].shape)
    if axis == time:
        return _cat_in_time(converter, xs)
    if len(frames) < len(xs):
        counts = [0 if isinstance(x, Traced) else x.shape[axis] for x in xs]
        place = xs.index(frames[0])
        if len(frames) > 1:
            raise UnsupportedError("joins several values with zeros")
        call = partial(
            zeros_beside, before=sum(counts[:place]), behind=sum(counts[place:]), axis=axis
        )
        if not sum(counts):
            return frames[0]
        return framewise(converter, node, call, frames[0], time=time)
    join: Callable[..., Tensor] = rules.concatenated if axis == 1 else partial(_cat_along, axis)
    return framewise(converter, node, join, *same_rate(frames), time=time)


def _cat_along(axis: int, *xs: Tensor) -> Tensor:
    return torch.cat(xs, dim=axis)


def _cat_in_time(converter: Converter, xs: Sequence[Any]) -> Traced:
    """Zeros in front are padding, zeros behind are never reached."""
    frames = [x for x in xs if isinstance(x, Traced)]
    if len(frames) > 1:
        raise UnsupportedError("puts columns of several values one behind the other")
    (x,) = frames
    time = x.time
    assert time is not None
    before = sum(z.shape[time] for z in xs[: list(xs).index(x)])
    behind = sum(z.shape[time] for z in xs[list(xs).index(x) + 1 :])
    value = converter.graph.retime(x.value, -before, 1, f"{before} zeros in front")
    shape = list(x.shape)
    shape[time] += before + behind
    return Traced(value, tuple(shape), converter)


def reshaped(converter: Converter, node: fx.Node, x: Traced, *args: Any, **kwargs: Any) -> Traced:
    shape, time, place = node.meta["shape"], x.time, None
    if shape[0] != x.shape[0]:
        raise UnsupportedError("moves the batch away from the first axis")
    if time is not None:
        before, frames = prod(x.shape[:time]), x.shape[time]
        place = next(
            (i for i, n in enumerate(shape) if n == frames and prod(shape[:i]) == before), None
        )
        if place is None and frames != 1:
            raise UnsupportedError(f"mixes the {frames} columns of a clip with other axes")
    column = [-1, *shape[1:]]
    if place is not None:
        column[place] = 1
    return framewise(converter, node, partial(_as_shape, tuple(column)), x, time=place)


def _as_shape(shape: tuple[int, ...], x: Tensor) -> Tensor:
    return x.reshape(shape)


def transposed(converter: Converter, node: fx.Node, x: Traced, *args: Any, **kwargs: Any) -> Traced:
    order = list(range(x.dims))
    if _plain(node) == "permute":
        given = args[0] if args and isinstance(args[0], (tuple, list)) else args
        order = [a % x.dims for a in (given or kwargs["dims"])]
    else:
        a, b = (v % x.dims for v in (args or (kwargs["dim0"], kwargs["dim1"])))
        order[a], order[b] = order[b], order[a]
    time = None if x.time is None else order.index(x.time)
    return framewise(converter, node, partial(torch.permute, dims=tuple(order)), x, time=time)


def split(converter: Converter, node: fx.Node, x: Traced, *args: Any, **kwargs: Any) -> Parts:
    name = _plain(node)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if name == "unbind":
        dim = kwargs.get("dim", args[0] if args else 0)
    if dim % x.dims == x.time:
        raise UnsupportedError("takes the frames of a clip apart")
    if name == "unbind":
        raise UnsupportedError("takes an axis away")
    return Parts(x, partial(_split, getattr(torch, name), args, kwargs))


def _split(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> Any:
    return function(x, *args, **kwargs)


def getitem(converter: Converter, node: fx.Node, x: Any, index: Any) -> Any:
    if isinstance(x, Parts):
        call = partial(_part, x.function, index)
        return framewise(converter, node, call, x.source, time=x.source.time)
    if isinstance(x, tuple):
        if x[index] is None:
            raise UnsupportedError("uses the memory of a recurrent layer")
        return Traced(x[index].value, node.meta["shape"], converter)
    if not isinstance(x, Traced):
        raise UnsupportedError("takes a part of something that is not made of frames")
    return sliced(converter, node, x, index)


def _part(function: Callable[[Tensor], Sequence[Tensor]], index: int, x: Tensor) -> Tensor:
    return function(x)[index]


def sliced(converter: Converter, node: fx.Node, x: Traced, index: Any) -> Traced:
    """Along time only what has a meaning without an end."""
    whole = _full_index(index if isinstance(index, tuple) else (index,), x.dims)
    time, value, after = x.time, x.value, x.time
    graph = converter.graph
    if time is not None:
        part, frames = whole[time], x.shape[time]
        if isinstance(part, int):
            if part % frames != frames - 1:
                raise UnsupportedError(f"takes frame {part} of a clip of {frames}")
            after = None  # the last frame: in a stream, the newest
        else:
            first, step = part.start or 0, part.step or 1
            first = first + frames if first < 0 else first
            value = graph.retime(value, first, step, node.name)
            whole[time] = slice(None)
        dropped = sum(isinstance(p, int) for p in whole[:time])
        after = None if after is None else after - dropped
        if isinstance(part, int):
            whole[time] = 0
    if all(p == slice(None) for p in whole):
        return Traced(value, node.meta["shape"], converter)
    source = Traced(value, x.shape, converter)
    return framewise(converter, node, partial(_take, tuple(whole)), source, time=after)


def _take(index: tuple[Any, ...], x: Tensor) -> Tensor:
    return x[index]


def _full_index(index: tuple[Any, ...], dims: int) -> list[Any]:
    """One int or slice for every axis."""
    if not all(isinstance(p, (int, slice, EllipsisType)) for p in index):
        raise UnsupportedError("takes elements by a tensor or adds an axis")
    place = next((i for i, p in enumerate(index) if p is Ellipsis), len(index))
    behind = index[place + 1 :]
    middle = [slice(None)] * (dims - place - len(behind))
    return [*index[:place], *middle, *behind]


def reduced(
    converter: Converter, node: fx.Node, x: Traced, dim: Any = None, keepdim: bool = False,
    **kwargs: Any,
) -> Traced:  # fmt: skip
    """A mean, sum or maximum over axes, time among them or not."""
    dim = kwargs.get("axis", dim)
    if dim is None:
        raise UnsupportedError("reduces the batch too")
    axes = sorted({a % x.dims for a in ([dim] if isinstance(dim, int) else dim)})
    name = _plain(node)
    over = {"mean": mean, "sum": summed, "amax": largest}[name]
    spatial = tuple(a for a in axes if a != x.time)
    each = partial(getattr(torch, name), dim=spatial, keepdim=True) if spatial else None
    if name == "mean" and x.time == 2 and spatial == tuple(range(3, x.dims)) and spatial:
        each = spatial_mean
    graph, value = converter.graph, x.value
    if x.time is not None and x.time in axes:
        gate = converter.is_gate(node)
        window = converter.window(x, gate)
        value = graph.window(
            value,
            window,
            over,
            each,
            padding=window - 1 if gate else 0,
            time=x.time,
            name=node.name,
        )
    elif each is not None:
        value = graph.framewise(each, value, time=x.time, name=node.name)
    if keepdim:
        return Traced(value, node.meta["shape"], converter)
    time = x.time
    after = None if time is None or time in axes else time - sum(a < time for a in axes)
    kept = Traced(value, x.shape, converter)
    return framewise(converter, node, partial(_without, tuple(axes)), kept, time=after)


def _without(axes: tuple[int, ...], x: Tensor) -> Tensor:
    return x.squeeze(axes)


def padded(
    converter: Converter, node: fx.Node, x: Traced, pad: Sequence[int], mode: str = "constant",
    value: float | None = None,
) -> Traced:  # fmt: skip
    """Zeros around frames, and in front of them in time."""
    pairs = [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)]  # the last axis first
    graph, source, time = converter.graph, x.value, x.time
    from_right = None if time is None else x.dims - 1 - time
    if from_right is not None and from_right < len(pairs):
        before, behind = pairs[from_right]
        if (before or behind) and (mode != "constant" or value or min(before, behind) < 0):
            raise UnsupportedError("pads the clip with other values than zeros")
        source = graph.retime(source, -before, 1, node.name)
        pairs[from_right] = (0, 0)
    if not any(map(any, pairs)):
        return Traced(source, node.meta["shape"], converter)
    flat = tuple(n for pair in pairs for n in pair)
    call = partial(functional.pad, pad=flat, mode=mode, value=value)
    kept = Traced(source, x.shape, converter)
    return framewise(converter, node, call, kept, time=time)


def pooled(converter: Converter, node: fx.Node, x: Traced, *args: Any, **kwargs: Any) -> Traced:
    """The function of a pooling, as its module."""
    name = _plain(node).lstrip("_")
    axes = int(name[-2])
    graph = converter.graph
    if x.time != 2 or x.dims != axes + 2:
        raise UnsupportedError("pools where the frames do not lie along axis 2")
    if name.startswith("adaptive"):
        kind = getattr(nn, f"Adaptive{name[9:12].capitalize()}Pool{axes}d")
        gate = converter.is_gate(node)
        window = converter.window(x, gate)
        size = args[0] if args else kwargs["output_size"]
        size = size[0] if isinstance(size, (tuple, list)) and len(size) == 1 else size
        pool = kind(size)
        value = rules.adaptive_pool(graph, pool, x.value, node.name, window, gate=gate)
        return Traced(value, node.meta["shape"], converter)
    names = ["kernel_size", "stride", "padding"]
    if name.startswith("avg"):
        names += ["ceil_mode", "count_include_pad", "divisor_override"]
        rule, kind = rules.average_pool, getattr(nn, f"AvgPool{axes}d")
    else:
        names += ["dilation", "ceil_mode", "return_indices"]
        rule, kind = rules.max_pool, getattr(nn, f"MaxPool{axes}d")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given = {key: v for key, v in given.items() if v is not None and v != []}
    for key in ("kernel_size", "stride", "padding", "dilation"):
        if key in given:
            given[key] = rules.per_axis(
                given[key] if isinstance(given[key], int) else tuple(given[key]), axes
            )
    value = rule(graph, kind(**given), x.value, node.name, axes)
    return Traced(value, node.meta["shape"], converter)


def _plain(node: fx.Node) -> str:
    """A function's name, the same whether it works in place or not."""
    name: str = getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("__") else name.rstrip("_")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(POSITIONWISE, positionwise),
    **dict.fromkeys(DROPOUTS, unchanged),
    **dict.fromkeys(BINARY, binary),
    **dict.fromkeys(RESHAPES, reshaped),
    **dict.fromkeys(SPLITS, split),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
    **dict.fromkeys(("mean", "sum", "amax"), reduced),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), transposed),
    **{f"{kind}_pool{n}d": pooled for kind in ("avg", "max", "_max") for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": pooled for kind in ("avg", "max") for n in (1, 2, 3)},
    "cat": cat,
    "concat": cat,
    "getitem": getitem,
    "__getitem__": getitem,
    "pad": padded,
}
