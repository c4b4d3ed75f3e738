"""Operations of a network by the rules that published tables were counted with.

None of them counts multiplications alone: they add batch norms, activations and poolings, and some
have mistakes that tables were printed with. A rule is what a counting tool did.

    thop       a multiplication per tap, an operation per bias; 2 per batch-norm element, 1 per ReLU
               element; taps - 1 per max-pooled element, an int kernel being one axis; taps per
               average-pooled element; 2 n - 1 per output of a linear layer
    thop-2019  the same tool before a correction: each extent of a convolution's output is divided
               by the stride once more
    ptflops    convolutions as thop; 2 per batch-norm element, 1 per ReLU element and per input
               element of a pooling; n per output of a linear layer, and its bias
    mfnet      a multiplication per tap, an addition per element of each unit's output
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.errors import UnsupportedError

from .trace import CONVOLUTIONS, TRANSPOSED, call_converted

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
GLOBAL_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


@dataclass(frozen=True)
class Call:
    """One call of a module: what a counting tool sees of it."""

    name: str
    module: nn.Module
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]

    @property
    def is_layer(self) -> bool:
        """Whether `fastconv.nn.trace` lists it."""
        return isinstance(self.module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear))


@dataclass(frozen=True)
class Exceptions:
    """Where the code that was counted differs from the modules here; patterns of qualified names.

    functional  called as functions there, which tools that hook modules do not see
    pooled      whose input passed an identity pooling there
    added       whose output was the sum of two branches (rule mfnet)
    """

    functional: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def operations(
    seen: Sequence[Call], rule: str, exceptions: Exceptions | None = None
) -> list[tuple[Call, int]]:
    """The counted ones of a model's `calls` with their operations; the sum is what is published.

    Raises UnsupportedError for an unknown rule.
    """
    if rule not in RULES:
        raise UnsupportedError(f"count: unknown rule {rule!r}. Known: {', '.join(RULES)}")
    known = exceptions or Exceptions()
    counted = []
    for call in seen:
        number = 0 if _any(call.name, known.functional) else RULES[rule](call)
        if rule == "ptflops" and _any(call.name, known.pooled):
            number += prod(call.x_shape)
        if rule == "mfnet" and _any(call.name, known.added):
            number += prod(call.y_shape)
        if number or call.is_layer:
            counted.append((call, number))
    return counted


def step_operations(
    seen: Sequence[Call], exceptions: Exceptions | None = None
) -> list[tuple[Call, int]]:
    """Rule ptflops on one step of a continual network, which it counts in its own way.

    seen: the calls of the network for clips

    Batch norms and ReLUs count twice, as wrapper and as wrapped; a linear layer, applied along
    channels to a 1 x 1 x 1 map, counts as its inputs and 1; a pooling counts its spatial inputs.
    """
    counted = []
    for call, number in operations(seen, "ptflops", exceptions):
        frames = call.y_shape[2] if len(call.y_shape) == 5 else 1
        if isinstance(call.module, (*BATCH_NORMS, *ACTIVATIONS)):
            number = 2 * number
        elif isinstance(call.module, nn.Linear):
            number = call.module.in_features + 1
        elif isinstance(call.module, (*GLOBAL_POOLS, *AVERAGE_POOLS, *MAX_POOLS)):
            frames = call.x_shape[2] if len(call.x_shape) == 5 else 1
        counted.append((call, number // frames))
    return counted


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def calls(model: nn.Module, *example_inputs: Tensor) -> list[Call]:
    """Every call of every module in eval mode, in order of their ends; the model is not changed.

    example_inputs: as for `trace`, may be on the `meta` device
    """
    seen: list[Call] = []
    modes = {module: module.training for module in model.modules()}
    handles = [
        module.register_forward_hook(partial(_record, seen, name))
        for name, module in model.named_modules()
    ]
    try:
        model.eval()
        with torch.no_grad():
            if any(x.is_meta for x in example_inputs):
                call_converted(model, example_inputs, lambda tensor: tensor.to("meta"))
            else:
                model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen


def _record(seen: list[Call], name: str, module: nn.Module, args: Any, y: Any) -> None:
    if args and isinstance(args[0], Tensor) and isinstance(y, Tensor):
        seen.append(Call(name, module, tuple(args[0].shape), tuple(y.shape)))


def _taps(call: Call, y_shape: Sequence[int], bias: bool) -> int:
    """Multiplications of a convolution with this many outputs, and 1 per output for a bias."""
    module = call.module
    assert isinstance(module.weight, Tensor)
    weights = prod(module.weight.shape[1:]) + (bias and module.bias is not None)
    once_per = call.x_shape if isinstance(module, TRANSPOSED) else y_shape
    return prod(once_per) * weights


def _thop(call: Call, *, corrected: bool = True) -> int:
    module, outputs = call.module, prod(call.y_shape)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        size = call.y_shape[2:]
        if not corrected:
            size = tuple(o // s for o, s in zip(size, module.stride, strict=True))
        return _taps(call, (*call.y_shape[:2], *size), bias=True)
    if isinstance(module, nn.Linear):
        return (2 * module.in_features - 1) * outputs
    if isinstance(module, MAX_POOLS):
        kernel: Any = module.kernel_size
        return ((prod(kernel) if isinstance(kernel, tuple) else kernel) - 1) * outputs
    if isinstance(module, AVERAGE_POOLS):
        axes = len(call.x_shape) - 2
        window: Any = module.kernel_size
        return outputs * (prod(window) if isinstance(window, tuple) else window**axes)
    if isinstance(module, GLOBAL_POOLS):  # a window as large as its map
        return prod(call.x_shape)
    return _element_wise(call)


def _ptflops(call: Call) -> int:
    module = call.module
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return _taps(call, call.y_shape, bias=True)
    if isinstance(module, nn.Linear):
        bias = call.y_shape[-1] if module.bias is not None else 0
        return prod(call.x_shape) * call.y_shape[-1] + bias
    if isinstance(module, (*MAX_POOLS, *AVERAGE_POOLS, *GLOBAL_POOLS)):
        return prod(call.x_shape)
    return _element_wise(call)


def _macs(call: Call) -> int:
    if isinstance(call.module, nn.Linear):
        return prod(call.y_shape) * call.module.in_features
    if isinstance(call.module, (*CONVOLUTIONS, *TRANSPOSED)):
        return _taps(call, call.y_shape, bias=False)
    return 0


def _element_wise(call: Call) -> int:
    elements = prod(call.x_shape)
    if isinstance(call.module, BATCH_NORMS):
        return 2 * elements
    return elements if isinstance(call.module, ACTIVATIONS) else 0


RULES: dict[str, Callable[[Call], int]] = {
    "thop": _thop,
    "thop-2019": partial(_thop, corrected=False),
    "ptflops": _ptflops,
    "mfnet": _macs,
}
