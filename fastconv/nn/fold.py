"""A recording as few steps: batch norms, activations and sums become part of a convolution.

Every step is one pass over memory. What is not known stays an operation of PyTorch's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fastconv.epilogue import ACTIVATIONS
from fastconv.errors import GeometryError
from fastconv.geometry import Geometry, SeparableGeometry

from .graph import Operation, Recording, Ref, Value

DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


@dataclass(frozen=True, eq=False)
class Norm:
    """y = x * scale + shift per channel, from the statistics of a batch norm."""

    weight: Ref | None
    bias: Ref | None
    mean: Ref
    variance: Ref
    eps: float


@dataclass(eq=False)
class Conv:
    """activation(norm(conv(x) + bias) + residual), x being input_activation(x * scale) if scaled.

    geometry  of x as (N, C, *size); a linear layer has one axis of one point
    fused     what was taken in, for people
    """

    x: Value
    y: Value
    geometry: Geometry
    weight: Ref
    bias: Ref | None
    name: str
    norm: Norm | None = None
    residual: Value | None = None
    activation: str = "none"
    scale: Value | None = None
    input_activation: str = "none"
    fused: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> list[Value]:
        return [v for v in (self.x, self.scale, self.residual) if v is not None]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]

    @property
    def finished(self) -> bool:
        """Nothing can be added behind an activation."""
        return self.activation != "none"


@dataclass(eq=False)
class Block:
    """Three convolutions that run as one separable block."""

    stages: tuple[Conv, Conv, Conv]
    geometry: SeparableGeometry

    @property
    def inputs(self) -> list[Value]:
        residual = self.stages[2].residual
        return [self.stages[0].x, *([residual] if residual else [])]

    @property
    def outputs(self) -> list[Value]:
        return [self.stages[2].y]


@dataclass(eq=False)
class Blend:
    """activation(norm(x * scale) + residual)."""

    x: Value
    y: Value
    norm: Norm | None = None
    scale: Value | None = None
    residual: Value | None = None
    activation: str = "none"

    @property
    def inputs(self) -> list[Value]:
        return [v for v in (self.x, self.scale, self.residual) if v is not None]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]

    @property
    def finished(self) -> bool:
        return self.activation != "none"

    @property
    def parts(self) -> set[str]:
        """Which of its parts it has."""
        given = {"norm": self.norm, "scale": self.scale, "residual": self.residual}
        return {name for name, part in given.items() if part is not None} | (
            {"activation"} if self.finished else set()
        )


@dataclass(eq=False)
class Means:
    """The mean over all points of every channel."""

    x: Value
    y: Value

    @property
    def inputs(self) -> list[Value]:
        return [self.x]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]


@dataclass(eq=False)
class Pool:
    """Largest value, or mean, of windows; counted: zeros of the padding count in a mean."""

    x: Value
    y: Value
    geometry: Geometry
    mean: bool = False
    counted: bool = False

    @property
    def inputs(self) -> list[Value]:
        return [self.x]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]


@dataclass(eq=False)
class Join:
    """Channels of several values behind each other."""

    parts: list[Value]
    y: Value

    @property
    def inputs(self) -> list[Value]:
        return self.parts

    @property
    def outputs(self) -> list[Value]:
        return [self.y]


@dataclass(eq=False)
class Pad:
    """Zeros round x; `pairs` (before, after) per axis behind the channels."""

    operation: Operation
    pairs: tuple[tuple[int, int], ...]

    @property
    def x(self) -> Value:
        return self.operation.inputs[0]

    @property
    def y(self) -> Value:
        return self.operation.outputs[0]

    @property
    def inputs(self) -> list[Value]:
        return [self.x]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]


@dataclass(eq=False)
class Other:
    """What PyTorch, or a module that stays, does."""

    operation: Operation

    @property
    def inputs(self) -> list[Value]:
        return self.operation.inputs

    @property
    def outputs(self) -> list[Value]:
        return self.operation.outputs


Step = Conv | Block | Blend | Means | Pool | Join | Pad | Other


def steps(
    recording: Recording, fold: bool = True, scales: Callable[[Conv], bool] = lambda conv: True
) -> tuple[list[Step], Any]:
    """The steps of a recording, and its result with the values that they make.

    fold    batch norms are taken into the weights in front of them
    scales  whether a convolution can scale and activate its input as it reads it
    """
    folder = _Folder(recording)
    folder.drop_unused()
    if fold:
        folder.norms()
    folder.pads()
    folder.gates()
    folder.sums()
    folder.activations()
    folder.scales(scales)
    folder.blocks()
    return folder.steps, folder.result


class _Folder:
    def __init__(self, recording: Recording) -> None:
        same: dict[Value, Value] = {}

        def present(leaf: Any) -> Any:
            while leaf in same if isinstance(leaf, Value) else False:
                leaf = same[leaf]
            return leaf

        self.steps: list[Step] = []
        for operation in recording.operations:
            now = replace(
                operation,
                args=tree_map(present, operation.args),
                kwargs=tree_map(present, operation.kwargs),
            )
            source = _identity(now)
            if source is not None:
                same[now.outputs[0]] = source
            else:
                self.steps.append(_step(now))
        self.result = tree_map(present, recording.result)
        kept = Other(Operation(torch.nn.Identity(), (self.result,), {}, None, ""))
        self._result_values = kept.inputs

    def _users(self) -> Counter[Value]:
        counts = Counter(v for step in self.steps for v in step.inputs)
        counts.update(self._result_values)
        return counts

    def _makers(self) -> dict[Value, Step]:
        return {v: step for step in self.steps for v in step.outputs}

    def _remove(self, gone: Iterable[Step]) -> None:
        ids = set(map(id, gone))
        self.steps = [step for step in self.steps if id(step) not in ids]

    def drop_unused(self) -> None:
        """Steps nobody needs; what draws random numbers or runs users' code is kept."""
        needed = set(self._result_values)
        kept: list[Step] = []
        for step in reversed(self.steps):
            asked = any(v in needed for v in step.outputs)
            if asked or (isinstance(step, Other) and _has_effects(step.operation)):
                needed.update(step.inputs)
                kept.append(step)
        self.steps = kept[::-1]

    def norms(self) -> None:
        users, makers, gone = self._users(), self._makers(), []
        for step in self.steps:
            if not isinstance(step, Blend) or step.parts != {"norm"}:
                continue
            conv = makers.get(step.x)
            if isinstance(conv, Conv) and users[conv.y] == 1 and conv.norm is None:
                conv.norm, conv.y = step.norm, step.y
                conv.fused.append("batch norm")
                makers[conv.y] = conv
                gone.append(step)
        self._remove(gone)

    def pads(self) -> None:
        """Zeros in front of convolutions become their padding; other ones stay an operation."""
        for pad in [step for step in self.steps if isinstance(step, Pad)]:
            users = [step for step in self.steps if pad.y in step.inputs]
            asked = pad.y in self._result_values
            if asked or not all(_can_pad(step, pad) for step in users):
                self.steps[self.steps.index(pad)] = Other(pad.operation)
                continue
            for conv in users:
                assert isinstance(conv, Conv)
                both = zip(conv.geometry.padding, pad.pairs, strict=True)
                padding = tuple((a + c, b + d) for (a, b), (c, d) in both)
                size = tuple(pad.x.shape[2:])
                conv.geometry = replace(conv.geometry, in_size=size, padding=padding)
                conv.x = pad.x
                conv.fused.append("padding")
            self._remove([pad])

    def gates(self) -> None:
        """x * sigmoid(x) is one activation."""
        users, makers, gone = self._users(), self._makers(), []
        for i, step in enumerate(self.steps):
            if not isinstance(step, Other) or step.operation.name != "mul":
                continue
            pair = step.operation.args
            if len(pair) != 2 or not all(isinstance(v, Value) for v in pair):
                continue
            for x, gate in (pair, pair[::-1]):
                maker = makers.get(gate)
                same = isinstance(maker, Blend) and maker.parts == {"activation"} and maker.x is x
                if same and maker.activation == "sigmoid" and _is_plain(step.outputs[0]):
                    self.steps[i] = Blend(x, step.outputs[0], activation="silu")
                    if users[gate] == 1:
                        gone.append(maker)
                    break
        self._remove(gone)

    def sums(self) -> None:
        """x + y joins what makes x, or y, if nobody else wants that."""
        users, makers, gone = self._users(), self._makers(), []
        for step in self.steps:
            if not isinstance(step, Blend) or step.parts != {"residual"}:
                continue
            assert step.residual is not None
            pairs = (step.x, step.residual), (step.residual, step.x)
            for x, residual in pairs:
                maker = makers.get(x)
                if x is residual or users[x] != 1 or not _takes_residual(maker):
                    continue
                assert isinstance(maker, (Conv, Blend))
                maker.residual, maker.y = residual, step.y
                if isinstance(maker, Conv):
                    maker.fused.append("sum")
                makers[step.y] = maker
                gone.append((step, maker))
                break
        # The sum's other part may be made after the step that takes it in.
        for step, maker in gone:
            self.steps.remove(maker)
            self.steps[self.steps.index(step)] = maker

    def activations(self) -> None:
        users, makers, gone = self._users(), self._makers(), []
        for step in self.steps:
            if not isinstance(step, Blend) or step.parts != {"activation"}:
                continue
            maker = makers.get(step.x)
            if isinstance(maker, (Conv, Blend)) and users[step.x] == 1 and not maker.finished:
                maker.activation, maker.y = step.activation, step.y
                if isinstance(maker, Conv):
                    maker.fused.append(step.activation)
                makers[step.y] = maker
                gone.append(step)
        self._remove(gone)

    def scales(self, allowed: Callable[[Conv], bool]) -> None:
        """Squeeze and excitation: the convolution behind it scales what it reads."""
        users, makers, gone = self._users(), self._makers(), []
        for step in self.steps:
            if not isinstance(step, Conv) or prod(step.geometry.kernel) != 1:
                continue
            maker = makers.get(step.x)
            if not isinstance(maker, Blend) or maker.parts - {"activation"} != {"scale"}:
                continue
            if users[step.x] == 1 and step.geometry.groups == 1 and allowed(step):
                step.x, step.scale, step.input_activation = maker.x, maker.scale, maker.activation
                step.fused.insert(0, "scaled input")
                if maker.finished:
                    step.fused.insert(1, f"its {maker.activation}")
                gone.append(maker)
        self._remove(gone)

    def blocks(self) -> None:
        users, makers = self._users(), self._makers()
        for last in [step for step in self.steps if isinstance(step, Conv)]:
            middle = makers.get(last.x)
            first = makers.get(middle.x) if isinstance(middle, Conv) else None
            if not isinstance(middle, Conv) or not isinstance(first, Conv):
                continue
            if users[last.x] != 1 or users[middle.x] != 1:
                continue
            stages = (first, middle, last)
            geometry = _separable(stages)
            if geometry is not None:
                self.steps[self.steps.index(last)] = Block(stages, geometry)
                self._remove((first, middle))
                makers = self._makers()


def _separable(stages: tuple[Conv, Conv, Conv]) -> SeparableGeometry | None:
    """The geometry of a fully separable block, or None if these are something else."""
    if any(s.residual for s in stages[:2]) or any(s.scale for s in stages):
        return None
    gs = [s.geometry for s in stages]
    if any(g.n != 3 or g.dilation != (1, 1, 1) for g in gs) or gs[0].kernel[0] == 1:
        return None
    if gs[0].groups != 1 or not gs[1].is_depthwise or gs[2].groups != 1:
        return None
    stride = (gs[0].stride[0], *gs[1].stride[1:])
    padding = (gs[0].padding[0], *gs[1].padding[1:])
    shapes = [g.w_shape for g in gs]
    try:
        found = SeparableGeometry.of(gs[0].x_shape, *shapes, stride, padding)
    except GeometryError:
        return None
    return found if list(found.stages) == gs else None


def _takes_residual(maker: Step | None) -> bool:
    return isinstance(maker, (Conv, Blend)) and not maker.finished and maker.residual is None


def _can_pad(step: Step, pad: Pad) -> bool:
    return isinstance(step, Conv) and step.x is pad.y and len(pad.pairs) == step.geometry.n


def _has_effects(operation: Operation) -> bool:
    return operation.opaque or torch.Tag.nondeterministic_seeded in operation.target.tags


def _is_plain(value: Value) -> bool:
    """Of a precision and device that the steps know, with batch and channels."""
    return value.dtype in DTYPES.get(value.device, ()) and len(value.shape) >= 2


def _identity(operation: Operation) -> Value | None:
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


def _step(operation: Operation) -> Step:
    """The step of an operation on its own."""
    outputs = operation.outputs
    if operation.opaque or not outputs or not all(map(_is_plain, operation.inputs + outputs)):
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
