"""From an operation of PyTorch's to the step that it is."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from fastconv.epilogue import ACTIVATIONS
from fastconv.geometry import Geometry

from .graph import Operation, Ref, Value
from .graph_steps import DTYPES, Blend, Conv, Join, Means, Norm, Other, Pad, Pool, Step


def is_plain(value: Value) -> bool:
    """Of a precision and device that the steps know, with batch and channels."""
    return value.dtype in DTYPES.get(value.device, ()) and len(value.shape) >= 2


def identity(operation: Operation) -> Value | None:
    """The value that an operation hands on unchanged."""
    if operation.opaque or len(operation.outputs) != 1 or operation.written:
        return None
    x = operation.args[0] if operation.args else None
    if not isinstance(x, Value):
        return None
    y = operation.outputs[0]
    if operation.name in ("contiguous", "clone", "detach", "alias", "lift_fresh"):
        return x
    if operation.name in ("to", "_to_copy") and (x.dtype, x.device) == (y.dtype, y.device):
        return x
    if operation.name in ("dropout", "feature_dropout", "alpha_dropout") and not operation.args[2]:
        return x
    return None


def step_of(operation: Operation) -> Step:
    """The step of an operation on its own."""
    outputs = operation.outputs
    if operation.opaque or not outputs or not all(map(is_plain, operation.inputs + outputs)):
        return Other(operation)
    make = _MAKERS.get(operation.name)
    arguments = {a.name: a.default_value for a in operation.target._schema.arguments}
    names = list(arguments)
    arguments.update(zip(names, operation.args, strict=False))
    arguments.update(operation.kwargs)
    made = make(operation, arguments) if make and isinstance(operation.result, Value) else None
    return made or Other(operation)


def _conv(operation: Operation, a: dict[str, Any]) -> Step | None:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if a.get("transposed") or not isinstance(x, Value) or not isinstance(weight, Ref):
        return None
    if isinstance(bias, Value) or weight.tensor.dtype != x.dtype:
        return None
    n = weight.tensor.dim() - 2
    if len(x.shape) != n + 2:
        return None
    axes = {k: _axes(a[k], n) for k in ("stride", "padding", "dilation")}
    geometry = Geometry.of(x.shape, tuple(weight.tensor.shape), **axes, groups=a["groups"])
    name = weight.name.rpartition(".")[0]
    return Conv(x, operation.outputs[0], geometry, weight, bias, name)


def _axes(value: Any, n: int) -> Any:
    if isinstance(value, str):
        return value
    return tuple(value) * (n if len(value) == 1 else 1)


def _linear(operation: Operation, a: dict[str, Any]) -> Step | None:
    """A convolution of one point; its weights are packed as (K, C, 1)."""
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if not isinstance(x, Value) or not isinstance(weight, Ref) or isinstance(bias, Value):
        return None
    if len(x.shape) != 2 or weight.tensor.dim() != 2 or weight.tensor.dtype != x.dtype:
        return None
    geometry = Geometry.of((*x.shape, 1), (*weight.tensor.shape, 1))
    return Conv(x, operation.outputs[0], geometry, weight, bias, weight.name.rpartition(".")[0])


def _norm(operation: Operation, a: dict[str, Any]) -> Step | None:
    x, mean, variance = a["input"], a["running_mean"], a["running_var"]
    given = (a["weight"], a["bias"], mean, variance)
    if a["training"] or mean is None or variance is None or not isinstance(x, Value):
        return None
    if any(isinstance(ref, Value) for ref in given):
        return None
    return Blend(x, operation.outputs[0], norm=Norm(*given, a["eps"]))


def _activation(operation: Operation, a: dict[str, Any]) -> Step:
    return Blend(a["self"], operation.outputs[0], activation=operation.name)


def _add(operation: Operation, a: dict[str, Any]) -> Step | None:
    x, other = a["self"], a["other"]
    if not isinstance(x, Value) or not isinstance(other, Value) or a["alpha"] != 1:
        return None
    if x.shape != other.shape or x.dtype != other.dtype:
        return None
    return Blend(x, operation.outputs[0], residual=other)


def _mul(operation: Operation, a: dict[str, Any]) -> Step | None:
    """Every channel of an image times a number."""
    pair = a["self"], a["other"]
    if not all(isinstance(v, Value) for v in pair) or pair[0].dtype != pair[1].dtype:
        return None
    for x, scale in (pair, pair[::-1]):
        n = len(x.shape) - 2
        if scale.shape == (*x.shape[:2], *(1,) * n) and prod(x.shape[2:]) > 1:
            return Blend(x, operation.outputs[0], scale=scale)
    return None


def _mean(operation: Operation, a: dict[str, Any]) -> Step | None:
    x = a["self"]
    n = len(x.shape)
    if a["dim"] is None or a.get("dtype") not in (None, x.dtype) or n < 3:
        return None
    spatial = sorted(d % n for d in a["dim"]) == list(range(2, n))
    return Means(x, operation.outputs[0]) if spatial else None


def _adaptive(operation: Operation, a: dict[str, Any]) -> Step | None:
    x = a["self"]
    n = int(operation.name[-2])
    whole = len(x.shape) == n + 2 and set(a["output_size"]) == {1}
    return Means(x, operation.outputs[0]) if whole else None


def _pool(operation: Operation, a: dict[str, Any]) -> Step | None:
    x, y = a["self"], operation.outputs[0]
    n = int(operation.name[-2])
    if len(x.shape) != n + 2:
        return None
    kernel = _axes(a["kernel_size"], n)
    stride = _axes(a["stride"], n) if a["stride"] else kernel
    before = _axes(a["padding"], n)
    mean = operation.name.startswith("avg")
    if a["ceil_mode"] or a.get("divisor_override") or set(_axes(a.get("dilation", [1]), n)) != {1}:
        return None
    pairs = tuple((p, p) for p in before)
    size, channels = tuple(x.shape[2:]), x.shape[1]
    geometry = Geometry(
        x.shape[0], channels, channels, channels, size, kernel, stride, pairs, (1,) * n
    )
    if geometry.y_shape != y.shape:
        return None
    if mean and kernel == size and not any(before):
        return Means(x, y)
    return Pool(x, y, geometry, mean, mean and bool(a["count_include_pad"]))


def _cat(operation: Operation, a: dict[str, Any]) -> Step | None:
    parts, y = list(a["tensors"]), operation.outputs[0]
    known = all(isinstance(v, Value) and v.dtype == y.dtype for v in parts)
    if (
        not known
        or a["dim"] % len(y.shape) != 1
        or any(len(v.shape) != len(y.shape) for v in parts)
    ):
        return None
    return Join(parts, y)


def _pad(operation: Operation, a: dict[str, Any]) -> Step | None:
    x, pads, value = a["self"], a["pad"], a.get("value")
    if a.get("mode", "constant") != "constant" or value or len(x.shape) < 3 or min(pads) < 0:
        return None
    # From the last axis on: (before, after, before of the axis in front, ...).
    pairs = [tuple(pads[i : i + 2]) for i in range(0, len(pads), 2)][::-1]
    n = len(x.shape) - 2
    if any(map(any, pairs[:-n] if len(pairs) > n else ())):
        return None
    pairs = [(0, 0)] * (n - len(pairs)) + pairs[-n:]
    return Pad(operation, tuple(pairs))


_MAKERS: dict[str, Callable[[Operation, dict[str, Any]], Step | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _conv),
    "linear": _linear,
    "batch_norm": _norm,
    **dict.fromkeys([a for a in ACTIVATIONS if a != "none"], _activation),
    "add": _add,
    "mul": _mul,
    "mean": _mean,
    **dict.fromkeys([f"adaptive_avg_pool{n}d" for n in (1, 2, 3)], _adaptive),
    **dict.fromkeys([f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)], _pool),
    "cat": _cat,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}
