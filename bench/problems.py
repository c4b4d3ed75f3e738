"""A case with its arrays and exact answer, and the rule that says whether an answer is right."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.epilogue import Epilogue
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.reference import direct

from .cases import Case

if TYPE_CHECKING:
    from torch import nn

# Unit roundoff of each precision that a contender may compute in.
UNIT = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
# Errors of random data add like a random walk: the expected rms error, with this margin, is the
# bound. Loose against noise, tight against mistakes, which are off by the values' own size.
MARGIN = 4.0


@dataclass
class Problem:
    """What every contender gets. Arrays are float32, in (N, C, *size) order, contiguous.

    x           the input; for `streams` (frames, N, C, *frame), oldest first, two more than the
                window holds
    weights     one per stage; biases likewise, None without; () for a network
    stages      the convolutions, in order
    model       the network, in eval mode
    want        the exact output in float64: of the last frame, for `streams`
    direct_rms  relative rms error expected of a direct computation in float32
    """

    case: Case
    x: np.ndarray
    want: np.ndarray
    direct_rms: float
    weights: tuple[np.ndarray, ...] = ()
    biases: tuple[np.ndarray | None, ...] = ()
    stages: tuple[Geometry, ...] = ()
    model: nn.Module | None = field(default=None, repr=False)

    @property
    def epilogues(self) -> tuple[Epilogue, ...]:
        """One per stage."""
        return tuple(Epilogue(b is not None, self.case.activation) for b in self.biases)

    def errors(self, got: np.ndarray) -> tuple[float, float]:
        """max |got - want| / max |want|, and the same of root mean squares.

        Infinite if the shape is another or a value is not finite.
        """
        if got.shape != self.want.shape or not np.isfinite(got).all():
            return float("inf"), float("inf")
        off = got.astype(np.float64) - self.want
        largest, rms = np.abs(self.want).max(), np.sqrt(np.mean(self.want**2))
        return float(np.abs(off).max() / largest), float(np.sqrt(np.mean(off**2)) / rms)

    def allowed_rms(self, precision: str, factor: float = 1.0) -> float:
        """The largest relative rms error of a right answer.

        precision  of the operands; sums are in float32 at least
        factor     how much more error than a direct sum's the algorithm may make, as
                   `planner.error_factor` says
        """
        rounding = 0.0 if precision in ("float32", "float64") else UNIT[precision]
        if self.model is not None:  # a network amplifies all roundings alike
            return MARGIN * factor * self.direct_rms * max(1.0, rounding / UNIT["float32"])
        # Two operands and the result are rounded to the precision, in every stage.
        return MARGIN * factor * (self.direct_rms + 3 * len(self.stages) * rounding)


def make(case: Case, folder: str | None = None) -> Problem:
    """The problem of a case, from a fixed seed.

    folder: where the exact answers of networks are kept for other processes, because they take long

    Raises UnsupportedError for a network that does not exist.
    """
    geometry = case.geometry
    if geometry is None:
        return _network(case, folder)
    stages = geometry.stages if isinstance(geometry, SeparableGeometry) else (geometry,)
    weights = tuple(_weights(stage, i) for i, stage in enumerate(stages))
    biased = case.activation != "none"
    biases = tuple(
        _random((s.out_channels,), 10 + i) if biased else None for i, s in enumerate(stages)
    )
    if case.kind == "streams":
        frames = stages[0].in_size[0] + 2
        x = _random((frames, *stages[0].x_shape[:2], *stages[0].x_shape[3:]), 20)
        z: Any = np.moveaxis(x[2:], 0, 2)
    else:
        z = x = _random(stages[0].x_shape, 20)
    # A running sum of n random products has relative error u sqrt(n / 2); 8 for epilogue and store.
    terms = [s.in_channels // s.groups * s.taps for s in stages]
    rms = sum(sqrt(n / 2 + 8) for n in terms) * UNIT["float32"]
    problem = Problem(case, x, z, rms, weights, biases, stages)
    for stage, w, bias, epilogue in zip(stages, weights, biases, problem.epilogues, strict=True):
        z = direct.finish(direct.correlate(z, w, stage), bias, None, epilogue)
    problem.want = z[:, :, 0] if case.kind == "streams" else z
    return problem


def _network(case: Case, folder: str | None) -> Problem:
    """The seeded network on random noise; PyTorch's own error in float32 is the measure."""
    from fastconv.zoo import NETWORKS, build

    if case.target not in NETWORKS:
        raise UnsupportedError(f"the zoo of this version has no {case.target}")
    import torch

    model = build(case.target).eval()
    x = _random((1, *NETWORKS[case.target].input_shape), 20)
    kept = None if folder is None else Path(folder, f"{case.target}.npz")
    if kept is not None and kept.exists():
        with np.load(kept) as known:
            return Problem(case, x, known["want"], float(known["direct_rms"]), model=model)
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        plain = model(torch.from_numpy(x)).numpy()
        want = exact(torch.from_numpy(x).double()).numpy()
    problem = Problem(case, x, want, 0.0, model=model)
    problem.direct_rms = problem.errors(plain)[1]
    if kept is not None:
        part = kept.with_suffix(".part.npz")
        np.savez(part, want=want, direct_rms=problem.direct_rms)
        part.replace(kept)
    return problem


def _weights(stage: Geometry, seed: int) -> np.ndarray:
    """Standard normal over the root of the sum's length, so that every stage keeps its scale."""
    w = _random(stage.w_shape, seed)
    return (w / np.float32(sqrt(np.prod(stage.w_shape[1:])))).astype(np.float32)


def _random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)
