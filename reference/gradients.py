"""Gradients of convolutions, tap by tap, in float64: the definition."""

from __future__ import annotations

from math import prod

import numpy as np

from ..geometry import Geometry
from ..plan import Plan
from . import direct


def supports(geometry: Geometry, dtype: str) -> str | None:
    """None, or the reason against."""
    return direct.refuse_dtype(dtype)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that either gradient needs as scratch."""
    return 0


def input_gradient(plan, gy, w, gx, workspace) -> None:
    """Write to gx what every input gave to the outputs, weighted by gy.

    gx[n, c, i] = sum over k, o, tap with o * stride + tap * dilation - padding = i
                  of w[k, c, tap] * gy[n, k, o]

    plan  of the forward convolution
    gy    (N, K, *out_size);  w (K, C / G, *kernel)
    gx    (N, C, *in_size), written

    Equivalent to `torch.nn.grad.conv3d_input`.
    """
    geometry, gy, w = plan.geometry, direct.exact(gy), direct.exact(w)
    padded = np.zeros((geometry.batch, geometry.in_channels, *geometry.padded_size))
    # `split` and the windows of `taps` are views, so that adding to them adds to `padded`.
    for xg, yg, wg in zip(
        np.split(padded, geometry.groups, 1),
        np.split(gy, geometry.groups, 1),
        np.split(w, geometry.groups),
        strict=True,
    ):
        for tap, view in direct.taps(xg, geometry):
            view += direct.contract(wg[(..., *tap)].T, yg)
    inner = (
        slice(before, before + size)
        for (before, _), size in zip(geometry.padding, geometry.in_size, strict=True)
    )
    gx[...] = padded[(..., *inner)]


def weight_gradient(plan, x, gy, gw, workspace) -> None:
    """Write to gw the sum over all outputs of gy times the input that each tap reads.

    gw[k, c, tap] = sum over n, o of gy[n, k, o] * x[n, c, o * stride + tap * dilation - padding]

    plan  of the forward convolution
    x     (N, C, *in_size);  gy (N, K, *out_size)
    gw    (K, C / G, *kernel), written

    Equivalent to `torch.nn.grad.conv3d_weight`.
    """
    geometry, points = plan.geometry, prod(plan.geometry.out_size)
    padded, gy = direct.pad(direct.exact(x), geometry), direct.exact(gy)
    for xg, yg, wg in zip(
        np.split(padded, geometry.groups, 1),
        np.split(gy, geometry.groups, 1),
        np.split(gw, geometry.groups),
        strict=True,
    ):
        for tap, view in direct.taps(xg, geometry):
            # (N, K / G, points) times (N, points, C / G), summed over images
            flat = (yg.reshape(*yg.shape[:2], points), view.reshape(*view.shape[:2], points))
            wg[(..., *tap)] = np.matmul(flat[0], flat[1].swapaxes(1, 2)).sum(0)
