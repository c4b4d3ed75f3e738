"""How far a result may be from float64: derived from the arithmetic, never tuned.

Direct sums of n products in precision u satisfy |error| <= n u sum |w x| (Higham 2002, section
3.1). A fast algorithm multiplies the error by the amplification of its transforms, and mixes the
outputs of a tile, so its bound is normwise:

    max |error| <= slope * u * (n + 8) * amplification * max sum |w x|

(8: transforms, epilogue and final rounding). The bound above is for the worst case; on random data
errors add like a random walk, so the root mean square is held to that of a plain sum in the same
precision, times the amplification:

    rms error <= 4 * slope * amplification * few
                 * max(rms error of the plain sum, u * rms y, u * typical)

(4: three transform stages and one sum, each of which may round as much as the plain sum does).
typical = max sum |w x| / sqrt(n) is the size of a sum of n terms of random sign: where there are
few outputs, all of them may happen to cancel, and the terms that were rounded are larger than they.
few = 1 + 4 / sqrt(2 N): the rms of N random errors is random too, its standard deviation is
1 / sqrt(2 N) of it, and four of them are allowed. It matters where a whole array is a few numbers.
"""

from __future__ import annotations

import numpy as np

from fastconv.plan import Plan
from fastconv.reference import direct
from fastconv.transforms import amplification

# Largest slope of each activation: errors of its argument grow by at most this factor.
SLOPE = {"none": 1.0, "relu": 1.0, "silu": 1.1, "hardswish": 1.5, "sigmoid": 1.0}


def rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a)))) if a.size else 0.0


def plain_sum(x, w, bias, residual, geometry, epilogue, dtype) -> np.ndarray:
    """The convolution summed tap by tap in `dtype`: what an unhurried programmer would get."""
    x, w = x.astype(dtype), w.astype(dtype)
    padded = direct.pad(x, geometry)
    per_group = []
    for xg, wg in zip(
        np.split(padded, geometry.groups, 1), np.split(w, geometry.groups), strict=True
    ):
        z = np.zeros((xg.shape[0], wg.shape[0], *geometry.out_size), dtype)
        for tap, view in direct.taps(xg, geometry):
            for c in range(xg.shape[1]):
                z += (
                    wg[(slice(None), c, *tap)].reshape(1, -1, *(1,) * geometry.n)
                    * view[:, c : c + 1]
                )
        per_group.append(z)
    return direct.finish(np.concatenate(per_group, 1), bias, residual, epilogue)


def assert_conv_close(y, plan: Plan, x, w, bias=None, residual=None) -> None:
    """Compare y with the float64 definition under the bounds above; axes are (N, C, *size)."""
    geometry, epilogue = plan.geometry, plan.epilogue
    x, w, y = (np.asarray(a, np.float64) for a in (x, w, y))
    want = direct.finish(direct.correlate(x, w, geometry), bias, residual, epilogue)
    assert y.shape == want.shape, f"shape {y.shape}, expected {want.shape}"
    if not want.size:
        return
    magnitude = direct.correlate(abs(x), abs(w), geometry).max()
    magnitude += max((np.abs(a).max() for a in (bias, residual) if a is not None), default=0.0)
    terms = geometry.in_channels // geometry.groups * geometry.taps
    plain = plain_sum(x, w, bias, residual, geometry, epilogue, plan.dtype)
    assert_errors_within(y, want, plain, terms, magnitude, plan)


def assert_errors_within(y, want, plain, terms: int, magnitude: float, plan: Plan) -> None:
    """The two inequalities of this module for one array."""
    last = plan.epilogue[-1] if isinstance(plan.epilogue, tuple) else plan.epilogue
    slope, u = SLOPE[last.activation], float(np.finfo(plan.dtype).eps)
    factor = amplification(plan.transforms) if plan.transforms else 1.0
    assert np.isfinite(y).all(), "not finite: an output was not written, or read poison"
    error = np.abs(y - want)
    bound = slope * u * (terms + 8) * factor * magnitude
    assert error.max() <= bound, (
        f"{plan.algorithm}: max error {error.max():.3e} > bound {bound:.3e}"
    )
    typical = magnitude / terms**0.5
    few = 1 + 4 / (2 * max(error.size, 1)) ** 0.5
    bound = 4 * slope * factor * few * max(rms(plain - want), u * rms(want), u * typical)
    assert rms(error) <= bound, f"{plan.algorithm}: rms error {rms(error):.3e} > bound {bound:.3e}"


# Of a network's error in float32 over PyTorch's own: both add up like a random walk.
NETWORK_MARGIN = 4.0


def assert_as_exact_as(plain, got, want) -> None:
    """A network's outputs are as close to those in float64 as PyTorch's in float32 are.

    plain  PyTorch's;  want  in float64
    """
    assert got.shape == want.shape
    largest = float(want.abs().max())
    own = max(float((plain - want).abs().max()) / largest, 4 * float(np.finfo(np.float32).eps))
    error = float((got - want).abs().max()) / largest
    assert error <= NETWORK_MARGIN * own, f"error {error:.1e}, PyTorch's own {own:.1e}"
