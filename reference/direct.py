"""The convolution itself, from its definition; everything else is compared with this module."""

from __future__ import annotations

from functools import reduce
from itertools import product
from math import prod
from operator import add

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry

DTYPES = ("float32", "float64")


def exact(array: np.ndarray) -> np.ndarray:
    """The array in float64; object arrays (fractions, counting scalars) stay as they are."""
    array = np.asarray(array)
    return array if array.dtype == object else array.astype(np.float64)


def zeros_around(x: np.ndarray, widths) -> np.ndarray:
    """(before, after) zeros on every axis behind the first two, of x's own kind: a counting scalar
    stays countable.
    """
    zero = x.flat[0] * 0 if x.dtype == object and x.size else 0
    return np.pad(x, ((0, 0), (0, 0), *widths), constant_values=zero)


def pad(x: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Zeros around every axis: (N, C, *in_size) -> (N, C, *padded_size)."""
    return zeros_around(x, geometry.padding)


def taps(padded: np.ndarray, geometry: Geometry):
    """Yield (tap, view): what all outputs read under one kernel tap, view (N, C, *out_size)."""
    for tap in product(*map(range, geometry.kernel)):
        window = (
            slice(k * d, k * d + (o - 1) * s + 1, s)
            for k, d, o, s in zip(
                tap, geometry.dilation, geometry.out_size, geometry.stride, strict=True
            )
        )
        yield tap, padded[(..., *window)]


def contract(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sum over channels: w (K, C) and x (N, C, *size) give (N, K, *size)."""
    n, c, *size = x.shape
    return np.matmul(w, x.reshape(n, c, prod(size))).reshape(n, w.shape[0], *size)


def correlate(x: np.ndarray, w: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The definition, per group, in float64.

    y[n, k, o] = sum over c, tap of w[k, c, tap] * x[n, c, o * stride + tap * dilation - padding]

    x (N, C, *in_size), w (K, C / G, *kernel), returns (N, K, *out_size).
    Equivalent to `torch.nn.functional.conv3d(x, w, None, stride, padding, dilation, groups)`.
    """
    padded, w = pad(exact(x), geometry), exact(w)
    per_group = []
    for xg, wg in zip(
        np.split(padded, geometry.groups, 1), np.split(w, geometry.groups), strict=True
    ):
        parts = (contract(wg[(..., *tap)], view) for tap, view in taps(xg, geometry))
        per_group.append(reduce(add, parts))
    return np.concatenate(per_group, axis=1)


def activate(z: np.ndarray, activation: str) -> np.ndarray:
    """The activation of an Epilogue, elementwise."""
    if activation == "relu":
        return np.maximum(z, 0)
    if activation == "hardswish":
        return z * np.clip(z + 3, 0, 6) / 6
    if activation in ("sigmoid", "silu"):
        # exp of a negative number only: no overflow for large |z|.
        e = np.exp(-np.abs(z))
        sigmoid = np.where(z >= 0, 1, e) / (1 + e)
        return sigmoid if activation == "sigmoid" else z * sigmoid
    return z


def finish(
    z: np.ndarray, bias: np.ndarray | None, residual: np.ndarray | None, epilogue: Epilogue
) -> np.ndarray:
    """activation(z + bias + residual) for z, residual (N, K, *size) and bias (K,)."""
    if bias is not None:
        z = z + exact(bias).reshape(-1, *(1,) * (z.ndim - 2))
    if residual is not None:
        z = z + exact(residual)
    return activate(z, epilogue.activation)


def refuse_dtype(dtype: str) -> str | None:
    """The reason against a dtype, or None."""
    return None if dtype in DTYPES else f"dtype {dtype} is not one of {', '.join(DTYPES)}"
