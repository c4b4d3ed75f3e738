"""Which layers a model runs on an input, with shapes: where counting and rewriting start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastconv.algorithms import step_of
from fastconv.geometry import Geometry

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)
TRANSPOSED_NOTE = "transposed convolution"


@dataclass(frozen=True)
class Layer:
    """One call of one convolution or linear layer.

    name: qualified module name, '' for the model itself
    kind: 'conv', 'linear', or 'other' for a convolution that is neither (`note` says why)
    x_shape, y_shape: of a convolution with a batch axis, also where the call had none;
        (..., features) of a linear layer
    stride, padding, dilation: as in the module, one per axis, padding possibly 'same' or 'valid';
        () for a linear layer; of one step of a stream, padding is (before, after) per axis
    module: class name
    """

    name: str
    kind: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | tuple[tuple[int, int], ...] | str
    dilation: tuple[int, ...]
    groups: int
    bias: bool
    module: str
    note: str = ""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the direct way; taps on padding count, as in the papers."""
        # w is (C, K / groups, *kernel) if transposed, else (K, C / groups, *kernel) or (out, in).
        once_per = self.x_shape if self.note == TRANSPOSED_NOTE else self.y_shape
        return prod(once_per) * prod(self.w_shape[1:])

    @property
    def geometry(self) -> Geometry | None:
        """The convolution's geometry; None for a linear layer or a convolution of kind 'other'."""
        if self.kind != "conv":
            return None
        return Geometry.of(
            self.x_shape, self.w_shape, self.stride, self.padding, self.dilation, self.groups
        )


def one_step(layer: Layer) -> Layer:
    """The layer on one step of a stream: see `fastconv.algorithms.step_of`."""
    if layer.geometry is None:
        return layer
    step = step_of(layer.geometry)
    return replace(layer, x_shape=step.x_shape, y_shape=step.y_shape, padding=step.padding)


def trace(model: nn.Module, *example_inputs: Any) -> list[Layer]:
    """Run a model once in eval mode and list its convolution and linear layers as they ran.

    example_inputs: the arguments of `model.forward`; with tensors on the `meta` device nothing is
        computed, wherever the model's weights are

    A module called twice is listed twice; convolutions called as functions are not seen. The model
    comes back as it was, also after an error: no hooks, its own training mode, weights and
    statistics.
    """
    layers: list[Layer] = []
    modes = {module: module.training for module in model.modules()}
    handles = [
        module.register_forward_hook(partial(_record, layers, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear))
    ]
    try:
        model.eval()
        with torch.no_grad():
            if _on_meta(example_inputs):
                call_converted(model, example_inputs, lambda tensor: tensor.to("meta"))
            else:
                model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return layers


def call_converted(
    model: nn.Module, args: tuple[Any, ...], convert: Callable[[Tensor], Tensor]
) -> Any:
    """The output of a model as if its parameters and buffers were converted; it is not changed."""
    # Once per module and each of its own tensors: a tensor replaced twice is not put back.
    places = {
        f"{prefix}.{name}" if prefix else name: convert(tensor)
        for prefix, module in model.named_modules()
        for name, tensor in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
    }
    return functional_call(model, places, args, tie_weights=False)


def _on_meta(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_on_meta(part) for part in value)
    return isinstance(value, Tensor) and value.is_meta


def _record(
    layers: list[Layer], name: str, module: nn.Module, args: Any, kwargs: Any, y: Tensor
) -> None:
    x = args[0] if args else kwargs["input"]
    if isinstance(module, nn.Linear):
        layers.append(_linear(name, module, x, y))
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        layers.append(_convolution(name, module, x, y))


def _linear(name: str, module: nn.Linear, x: Tensor, y: Tensor) -> Layer:
    return Layer(
        name=name,
        kind="linear",
        x_shape=tuple(x.shape),
        w_shape=tuple(module.weight.shape),
        y_shape=tuple(y.shape),
        stride=(),
        padding=(),
        dilation=(),
        groups=1,
        bias=module.bias is not None,
        module=type(module).__name__,
    )


def _convolution(name: str, module: Convolution, x: Tensor, y: Tensor) -> Layer:
    note = ""
    if isinstance(module, TRANSPOSED):
        note = TRANSPOSED_NOTE
    elif module.padding_mode != "zeros":
        note = f"padding_mode {module.padding_mode!r}"
    batch = () if x.ndim == module.weight.ndim else (1,)
    return Layer(
        name=name,
        kind="other" if note else "conv",
        x_shape=(*batch, *x.shape),
        w_shape=tuple(module.weight.shape),
        y_shape=(*batch, *y.shape),
        stride=tuple(module.stride),
        padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
        bias=module.bias is not None,
        module=type(module).__name__,
        note=note,
    )
