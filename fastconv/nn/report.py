"""What `accelerate` did, layer by layer, and how far its outputs are from exact ones."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.plan import Plan

# Errors of two programs that sum equally long runs: rounded by another order of the terms, and
# passed on by the same layers, so that they scatter more than as many independent numbers would.
NETWORK_MARGIN = 2.0


@dataclass(frozen=True)
class Replacement:
    """One convolution: its plan on the example input, or the reason why it stays PyTorch's.

    fused         what is computed in the same pass: 'batch norm', 'sum', 'relu', ...
    error_factor  its expected error as a multiple of a direct sum's
    ms            of its pass on the example input, the least of some runs; None if it was not timed
    """

    name: str
    module: str
    plan: Plan | None = None
    reason: str = ""
    fused: tuple[str, ...] = ()
    error_factor: float = 1.0
    ms: float | None = None


@dataclass(frozen=True)
class Report:
    """What `accelerate` did. `str(report)` is a table.

    layers          one Replacement per call of a convolution, in execution order
    error_factor    largest expected layer error, as a multiple of a direct sum's
    error           max |accelerated - exact| / max |exact| on the example input; exact is the model
                    in float64
    original_error  the same of the model itself
    numbers         how many were compared; of several outputs, in the smallest
    roundoff        the spacing of numbers near 1 in the precision of the outputs
    channels_last   whether activations are kept channels last from the first convolution on
    traced          whether the whole model runs as one list of kernel calls
    stays           modules that run as they are, by name, with the reason
    others          operations left to PyTorch in one run, by name, and how often each

    Without the check, `error` is the distance to the model itself and `original_error` is 0.
    """

    layers: tuple[Replacement, ...]
    error_factor: float
    error: float
    original_error: float
    numbers: int
    roundoff: float
    channels_last: bool
    traced: bool = False
    stays: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, int], ...] = ()

    @property
    def allowed(self) -> float:
        """The bound on `error`: the model's own, times the worst layer's factor and a margin.

        An own error below four units in the last place is luck, not a measure. Both are random
        draws: the size of N random errors has a relative standard deviation of 1 / sqrt(2 N), and
        four of them are allowed, which matters where a model returns a few numbers.
        """
        own = max(self.original_error, 4 * self.roundoff)
        few = 1 + 4 / sqrt(2 * max(self.numbers, 1))
        return NETWORK_MARGIN * few * self.error_factor * own

    def __str__(self) -> str:
        timed = any(layer.ms is not None for layer in self.layers)
        head = ("layer", "geometry", "algorithm", "backend", "fused", "error")
        rows = [(*head, "ms") if timed else head]
        for layer in self.layers:
            if layer.plan is None:
                row = (layer.name, layer.module, "unchanged: " + layer.reason, "", "", "")
            else:
                row = (
                    layer.name,
                    describe(layer.plan),
                    layer.plan.algorithm,
                    layer.plan.backend,
                    ", ".join(layer.fused),
                    f"{layer.error_factor:.1f}x",
                )
            rows.append((*row, "" if layer.ms is None else f"{layer.ms:.3f}") if timed else row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += [f"{name or 'the model'} stays as it is: {reason}" for name, reason in self.stays]
        if self.others:
            left = ", ".join(f"{name} ({count})" for name, count in self.others)
            lines.append(f"left to PyTorch: {left}")
        done = sum(layer.plan is not None for layer in self.layers)
        lines.append(
            f"{done} of {len(self.layers)} convolutions replaced; "
            f"error {self.error:.1e} of the largest output"
        )
        return "\n".join(lines)


def describe(plan: Plan) -> str:
    """A geometry in one short line, e.g. '54x16x56x56 -> 54, 3x3x3 /1x2x2 groups 54'."""
    g = plan.geometry
    if isinstance(g, SeparableGeometry):
        return " | ".join(map(_describe, g.stages))
    return _describe(g)


def _describe(g: Geometry) -> str:
    x = "x".join(map(str, (g.in_channels, *g.in_size)))
    stride = "" if set(g.stride) == {1} else " /" + "x".join(map(str, g.stride))
    groups = "" if g.groups == 1 else f" groups {g.groups}"
    return f"{x} -> {g.out_channels}, {'x'.join(map(str, g.kernel))}{stride}{groups}"


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """max |got - want| / max |want| over the tensors of two outputs; NaN equals NaN.

    Infinite where shapes differ.
    """
    largest = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point() or not b.numel():
            continue
        a, b = a.double(), b.double()
        equal = (a == b) | (a.isnan() & b.isnan())
        off = torch.where(equal, 0.0, a - b).abs().max()
        scale = torch.where(b.isfinite(), b, 0.0).abs().max()
        largest = max(largest, float(off / scale) if off else 0.0)
    return largest
