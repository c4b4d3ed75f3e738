"""The exact figures behind the papers' tables, computed from the zoo's networks."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import prod
from typing import TYPE_CHECKING

from .algorithms import HFA, hybrid_axes, under
from .counts import Number
from .published import READINGS, Reading
from .targets import Target, of_reading

if TYPE_CHECKING:
    from .nn.rules import Call
    from .nn.trace import Layer

Value = Number
RULES = {"efficient": "thop", "dissected": "thop-2019", "continual": "ptflops", "mfnet": "mfnet"}
# The convolutions of C3D that table 4 of the FSB paper numbers; it has 5a and 5b with the last.
FSB_LAYERS = ("conv1a", "conv2a", "conv3a", "conv3b", "conv4a", "conv4b")


@cache
def value_of(paper: str, table: str, model: str, variant: str, quantity: str) -> Value:
    """The exact figure of one cell."""
    if quantity == "compression":
        return _compression(variant)
    if quantity == "operations":
        rule = "thop-2019" if table.startswith("earlier") else RULES[paper]
        return _operations(model, variant, rule)
    return QUANTITIES[quantity](model, variant)


def _target(model: str, variant: str) -> Target:
    """Built once for all readings that count it differently."""
    reading = READINGS[model, variant]
    return _built(replace(reading, per_frame=False, algorithm="", tile=(1, 1)))


@cache
def _built(reading: Reading) -> Target:
    return of_reading(reading)


@cache
def _calls(target: Target) -> list[Call]:
    from .nn.rules import calls

    return calls(target.model, target.x)


@cache
def _clip_layers(target: Target) -> list[Layer]:
    return target.layers()


def _layers(model: str, variant: str) -> list[Layer]:
    from .nn.trace import one_step

    layers = _clip_layers(_target(model, variant))
    return list(map(one_step, layers)) if READINGS[model, variant].per_frame else layers


def macs(model: str, variant: str) -> int:
    """Multiply-accumulates alone."""
    return sum(layer.macs for layer in _layers(model, variant))


def _params(model: str, variant: str) -> int:
    return _target(model, variant).parameters


def _weights(model: str, variant: str) -> int:
    return sum({layer.name: prod(layer.w_shape) for layer in _layers(model, variant)}.values())


def _multiplications(model: str, variant: str) -> Number:
    """Under the reading's algorithm, with ideal tiles."""
    reading = READINGS[model, variant]
    total: Number = sum(_under(layer, reading) for layer in _layers(model, variant))
    return total.numerator if total.denominator == 1 else total


def _under(layer: Layer, reading: Reading) -> Number:
    geometry = layer.geometry
    if geometry is None or not reading.algorithm:
        return layer.macs
    axes = hybrid_axes(geometry) if reading.algorithm == HFA else (0, 1, 2)
    time, space = reading.tile
    ms = [(space if axis else time) if axis in axes else 1 for axis in range(3)]
    return under(geometry, ms, whole_tiles=False).multiplications


def _share(model: str, variant: str) -> Fraction:
    """Multiplications that the fast algorithm leaves."""
    direct = sum(layer.macs for layer in _layers(model, variant))
    return Fraction(_multiplications(model, variant)) / direct


def _operations(model: str, variant: str, rule: str) -> int:
    from .nn.rules import operations, step_operations

    target = _target(model, variant)
    if READINGS[model, variant].per_frame:
        counted = step_operations(_calls(target), target.exceptions)
        return sum(number for _, number in counted) + _longer_pool(model, variant)
    return sum(number for _, number in operations(_calls(target), rule, target.exceptions))


def _longer_pool(model: str, variant: str) -> int:
    """What CoX3D's final pooling is counted to cost more over more frames than the clip has."""
    if not model.startswith("CoX3D"):
        return 0
    return _pooled_channels(model, variant) * (_pool(model, variant) - _clip(model, variant))


def _clip(model: str, variant: str) -> int:
    frames: int = _target(model, variant).x.shape[2]
    return frames


def _pool(model: str, variant: str) -> int:
    """Frames under the final pooling: 'pool N', or the clip's."""
    _, _, frames = variant.partition("pool ")
    return int(frames) if frames else _clip(model, variant)


def _pooled_channels(model: str, variant: str) -> int:
    return _layer(model, variant, "head.features.conv").y_shape[1]


def _layer(model: str, variant: str, name: str) -> Layer:
    (found,) = (layer for layer in _layers(model, variant) if layer.name == name)
    return found


def _receptive_field(model: str, variant: str) -> int:
    """Frames that one output of the stream depends on."""
    taps = [layer.w_shape[2] for layer in _layers(model, variant) if layer.kind == "conv"]
    return 1 + sum(k - 1 for k in taps) + _pool(model, variant) - 1


def _padding(model: str, variant: str) -> int:
    """Frames of zero padding that the network for clips has on either side, all layers together."""
    layers = _clip_layers(_target(model, variant))
    return sum(layer.geometry.padding[0][0] for layer in layers if layer.geometry is not None)


def _start_up(model: str, variant: str) -> int:
    """Frames before the first output that is not of padding."""
    return _receptive_field(model, variant) - _padding(model, variant) - 1


def _memory(model: str, variant: str) -> int:
    """Numbers kept at worst: of a clip, the frames before and the largest map; of a stream, states.

    A stream keeps two frames of each block's depthwise input and output and of the stem's map, and
    the final pooling's frames but one; the paper's constant is that sum, though its text divides it
    otherwise.
    """
    stem = _layer(model, variant, "stem.space")
    if not READINGS[model, variant].per_frame:
        frames = stem.x_shape[2]
        return (frames - 1) * prod(stem.x_shape) // frames + prod(stem.y_shape)
    kept = 2 * prod(stem.y_shape)
    for layer in _layers(model, variant):
        if layer.name.endswith(("depthwise.conv", "project.conv")):
            kept += 2 * prod(layer.y_shape)
    return kept + _pooled_channels(model, variant) * (_pool(model, variant) - 1)


def _modules(model: str, variant: str) -> int:
    return len(_layers(model, variant))


def _nonlinearities(model: str, variant: str) -> int:
    from .nn.rules import ACTIVATIONS

    return sum(isinstance(call.module, ACTIVATIONS) for call in _calls(_target(model, variant)))


def _skips(model: str, variant: str) -> int:
    """Additions and concatenations as executed; a fire module's concatenation skips nothing."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    counted = [aten.add.Tensor]
    if model != "3D-SqueezeNet":
        counted.append(aten.cat.default)

    class Joins(TorchDispatchMode):  # type: ignore[no-untyped-call]
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.number += func in counted
            return func(*args, **(kwargs or {}))

    target = _target(model, variant)
    with Joins() as joins, torch.no_grad():  # type: ignore[no-untyped-call]
        target.model.eval()(target.x)
    return joins.number


def _compression(variant: str) -> Fraction:
    """Weights of a dense convolution over those of the fully separable block in its place."""
    if variant.startswith("N=C=64"):
        dense, separable = 64 * 64 * 27, _block_weights(64, 64)
        return Fraction(dense, separable)
    if variant == "total":
        return Fraction(_weights("C3D", "conv weights"), _weights("FSB-C3D", "middle of table 4"))
    name = FSB_LAYERS[int(variant.removeprefix("conv_")) - 1]
    dense, separable = (
        sum(prod(x.w_shape) for x in _layers(*key) if x.name.split(".")[0] == name)
        for key in (("C3D", "conv weights"), ("FSB-C3D", "middle of table 4"))
    )
    return Fraction(dense, separable)


def _block_weights(c_in: int, c_out: int) -> int:
    import torch

    from .zoo.fsb import FullySeparable

    with torch.device("meta"):
        return sum(p.numel() for p in FullySeparable(c_in, c_out, bias=False).parameters())


QUANTITIES = {
    "params": _params,
    "weights": _weights,
    "macs": macs,
    "multiplications": _multiplications,
    "share": _share,
    "layers": _modules,
    "nonlinearities": _nonlinearities,
    "skips": _skips,
    "receptive field": _receptive_field,
    "padding": _padding,
    "start-up frames": _start_up,
    "memory": _memory,
}
