"""How far minimal filtering is from float64, measured beside direct sums of the same layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fastconv.errors import UnsupportedError
from fastconv.transforms import amplification

from . import ours, problems
from .cases import Case
from .contenders import Settings

# 64 channels and 4096 outputs on 1, 2 and 3 axes, whole tiles of 2, 4 and nearly so of 6.
LAYERS = ("conv1d:64-64:3@4096:p1", "conv2d:64-64:3x3@64x64:p1", "conv3d:64-64:3x3x3@16x16x16:p1")
TILES = (None, 2, 4, 6)


class Error(NamedTuple):
    """Relative errors of one algorithm on one layer, and how often they are those of direct."""

    axes: int
    m: int | None
    largest: float
    rms: float
    factor_largest: float
    factor_rms: float
    amplification: float


def measured(backend: str = "auto") -> Iterator[Error]:
    """An Error per layer of LAYERS and tile of TILES, float32; tiles that nobody has are left out.

    Normal random inputs and weights; relative to the largest output, and to the outputs' rms.
    """
    for axes, target in enumerate(LAYERS, 1):
        problem = problems.make(Case("layers", target, target))
        direct = None
        for m in TILES:
            tile = None if m is None else (m,) * axes
            algorithm = "direct" if m is None else "winograd"
            try:
                made = ours.prepare(problem, ours.Choice(backend, algorithm, tile), Settings(1))
            except UnsupportedError:
                continue
            largest, rms = problem.errors(made.output())
            direct = direct or (largest, rms)
            (plan,) = made.plans
            factor = amplification(plan.transforms) if plan.transforms else 1.0
            yield Error(axes, m, largest, rms, largest / direct[0], rms / direct[1], factor)


def table(rows: Iterator[Error]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| 64 channels, float32 | max error | rms error | max, of direct | rms, of direct | "
        "amplification |",
        "|---|---|---|---|---|---|",
    ]
    for e in rows:
        taps = "x".join("3" * e.axes)
        tile = "x".join(str(e.m) * e.axes)
        name = f"{e.axes}D direct" if e.m is None else f"{e.axes}D F({tile}, {taps})"
        lines.append(
            f"| {name} | {e.largest:.1e} | {e.rms:.1e} | {e.factor_largest:.1f} | "
            f"{e.factor_rms:.1f} | {e.amplification:.3g} |"
        )
    return lines
