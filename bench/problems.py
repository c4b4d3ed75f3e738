"""A case with its arrays and exact answer, and the rule that says whether an answer is right."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.epilogue import Epilogue
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.reference import direct

from .cases import Case

Answer = (
    Any  # an array or tensor (N, K, *size); for `training` a tuple: y, and gradients of x and w
)

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
    want        the exact output in float64: of the last frame, for `streams`; a tensor on a GPU
    gradient    what stands for the gradient of the output; None but for `training`
    clip        of a continual network: the problem of its clip network, which peers without streams
                get in its place
    direct_rms  relative rms error expected of a direct computation in float32
    """

    case: Case
    x: np.ndarray
    want: Answer
    direct_rms: float
    weights: tuple[np.ndarray, ...] = ()
    biases: tuple[np.ndarray | None, ...] = ()
    stages: tuple[Geometry, ...] = ()
    model: nn.Module | None = field(default=None, repr=False)
    gradient: np.ndarray | None = None
    clip: Problem | None = field(default=None, repr=False)

    @property
    def epilogues(self) -> tuple[Epilogue, ...]:
        """One per stage."""
        return tuple(Epilogue(b is not None, self.case.activation) for b in self.biases)

    def errors(self, got: Answer) -> tuple[float, float]:
        """max |got - want| / max |want|, and the same of root mean squares.

        Infinite if the shape is another or a value is not finite. Of several answers the largest.
        """
        if not isinstance(self.want, tuple):
            got, wants = (got,), (self.want,)
        else:
            wants = self.want
        parts = [_errors(a, b) for a, b in zip(got, wants, strict=True)]
        return max(p[0] for p in parts), max(p[1] for p in parts)

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


def _errors(got: Any, want: Any) -> tuple[float, float]:
    """`Problem.errors` of one array; where one of them is on a GPU, it computes there."""
    if tuple(got.shape) != tuple(want.shape):
        return float("inf"), float("inf")
    if isinstance(got, np.ndarray) and isinstance(want, np.ndarray):
        if not np.isfinite(got).all():
            return float("inf"), float("inf")
        off = got.astype(np.float64) - want
        largest, rms = np.abs(want).max(), np.sqrt(np.mean(want**2))
        return float(np.abs(off).max() / largest), float(np.sqrt(np.mean(off**2)) / rms)
    import torch

    device = want.device if isinstance(got, np.ndarray) else got.device
    got, want = (torch.as_tensor(a).to(device, torch.float64) for a in (got, want))
    if not bool(got.isfinite().all()):
        return float("inf"), float("inf")
    off = got - want
    return (
        float(off.abs().max() / want.abs().max()),
        float(off.square().mean().sqrt() / want.square().mean().sqrt()),
    )


def make(case: Case, folder: str | None = None, device: str = "cpu") -> Problem:
    """The problem of a case, from a fixed seed.

    folder: where the exact answers of networks are kept for other processes, because they take long
    device: where exact answers are computed; on a GPU by PyTorch in float64

    Raises UnsupportedError for a network that does not exist.
    """
    geometry = case.geometry
    if geometry is None:
        return _network(case, folder, device)
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
    if case.kind == "training":
        return _training(problem, device)
    if device != "cpu":
        problem.want = _on_gpu(problem, z, device)
        return problem
    for stage, w, bias, epilogue in zip(stages, weights, biases, problem.epilogues, strict=True):
        z = direct.finish(direct.correlate(z, w, stage), bias, None, epilogue)
    problem.want = z[:, :, 0] if case.kind == "streams" else z
    return problem


def _on_gpu(problem: Problem, z: Any, device: str) -> Any:
    """The exact answer of convolutions in float64, by PyTorch."""
    import torch

    from fastconv.torch_kernels import grouped

    with torch.inference_mode():
        z = torch.from_numpy(z).to(device, torch.float64)
        for stage, w, bias, epilogue in zip(
            problem.stages, problem.weights, problem.biases, problem.epilogues, strict=True
        ):
            w64 = torch.from_numpy(w).to(device, torch.float64)
            b64 = None if bias is None else torch.from_numpy(bias).to(device, torch.float64)
            z = grouped.convolve(z, w64.unsqueeze(2) if stage.n == 1 else w64, b64, stage)
            grouped.finish(z, None, epilogue.activation, z)
    return z[:, :, 0] if problem.case.kind == "streams" else z


def _training(problem: Problem, device: str) -> Problem:
    """Forward and backward: the exact gradients of a random gradient of the output."""
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(
            "bench: training needs PyTorch: pip install 'fastconv[torch]'"
        ) from (error)
    from fastconv.torch_kernels import grouped

    (stage,), (weight,) = problem.stages, problem.weights
    problem.gradient = _random(stage.y_shape, 30)
    x, w, gradient = (
        torch.from_numpy(a).to(device, torch.float64) for a in (problem.x, weight, problem.gradient)
    )
    x.requires_grad_(), w.requires_grad_()
    y = grouped.convolve(x, w, None, stage)
    problem.want = (y.detach(), *torch.autograd.grad(y, (x, w), gradient))
    # The gradient of a weight is the longest sum.
    terms = stage.batch * int(np.prod(stage.out_size))
    problem.direct_rms = max(problem.direct_rms, sqrt(terms / 2 + 8) * UNIT["float32"])
    return problem


def _network(case: Case, folder: str | None, device: str) -> Problem:
    """The seeded network on random noise; PyTorch's own error in float32 is the measure."""
    from fastconv.zoo import CONTINUAL, NETWORKS, build

    from . import continual_networks

    if case.target in CONTINUAL:
        clip = replace(case, target=CONTINUAL[case.target])
        return continual_networks.problem_of(case, _network(clip, folder, device))
    if case.target not in NETWORKS:
        raise UnsupportedError(f"the zoo of this version has no {case.target}")
    import torch

    model = build(case.target).eval()
    x = _random((case.batch, *NETWORKS[case.target].input_shape), 20)
    kept = None if folder is None else Path(folder, f"{case.target}.npz")
    if kept is not None and kept.exists():
        with np.load(kept) as known:
            return Problem(case, x, known["want"], float(known["direct_rms"]), model=model)
    single = copy.deepcopy(model).to(device)
    exact = copy.deepcopy(single).double()
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        on_device = torch.from_numpy(x).to(device)
        plain = single(on_device).cpu().numpy()
        want = exact(on_device.double()).cpu().numpy()
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
