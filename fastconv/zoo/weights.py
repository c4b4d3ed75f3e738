"""Seeded random weights: untrained networks whose numbers are worth comparing through the depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import TypeVar

import torch
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)
FILTERED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMALISED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def seeded(make: Callable[[], Net], seed: int, gain: Callable[[str], float]) -> Net:
    """Build a network and fill it from one seeded stream.

    make: the constructor; the caller's random state is as it was afterwards
    gain: variance gain of the convolution or linear layer of that qualified name; 2 keeps the mean
        square through a following ReLU, 1 where there is none

    Weights have variance gain / fan_in, biases standard deviation 0.05. Batch norms get mild
    statistics and affine values of their own: the defaults make a batch norm the identity, and that
    would hide a mistake in folding it away. The stream is drawn on the CPU in module order, so that
    every device gets the same values; parameters on the `meta` device have none.

    Source: He et al., Delving Deep into Rectifiers, 2015, equation 10.
    """
    with torch.random.fork_rng(devices=[]):
        net = make()
    stream = torch.Generator(device="cpu").manual_seed(seed)
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, FILTERED):
                _normal(module.weight, sqrt(gain(name) / module.weight[0].numel()), stream)
                _normal(module.bias, 0.05, stream)
            elif isinstance(module, NORMALISED):
                _uniform(module.weight, 0.8, 1.2, stream)
                _normal(module.bias, 0.05, stream)
                _normal(module.running_mean, 0.05, stream)
                _uniform(module.running_var, 0.8, 1.25, stream)
    return net


def _normal(target: Tensor | None, std: float, stream: torch.Generator) -> None:
    if target is not None and not target.is_meta:
        target.copy_(torch.randn(target.shape, generator=stream, device="cpu") * std)


def _uniform(target: Tensor | None, low: float, high: float, stream: torch.Generator) -> None:
    if target is not None and not target.is_meta:
        target.copy_(torch.rand(target.shape, generator=stream, device="cpu") * (high - low) + low)


def by_part(gains: Mapping[str, float]) -> Callable[[str], float]:
    """A gain by the first part of a qualified name that is listed, 2 without."""
    return lambda name: next((gains[part] for part in name.split(".") if part in gains), 2.0)
