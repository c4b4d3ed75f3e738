"""Minimal filtering F(m, r) per axis, nested over 1, 2 or 3 axes.

Winograd 1980; Lavin and Gray 2016, section 4.

A strided axis is split into phases (polyphase): output o reads inputs o * s + k, so phase p sees
the inputs p, p + s, ... under the taps p, p + s, ...; the phases are stride-1 convolutions of
ceil(r / s) taps whose products are summed before the inverse transform. The transform of a strided
axis is therefore F(m, ceil(r / s)).
"""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from ..transforms import Transform, apply_along
from . import direct

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if any(d != 1 for d in geometry.dilation):
        return f"winograd is for dilation 1, not {geometry.dilation}"
    if all(r <= s for r, s in zip(geometry.kernel, geometry.stride, strict=True)):
        return f"no axis of kernel {geometry.kernel} has more than one tap per phase"
    return direct.refuse_dtype(dtype)


def phases(geometry: Geometry) -> list[tuple[int, ...]]:
    """Offsets of the polyphase split, one int per axis; phases without taps are left out."""
    return list(
        product(*(range(min(s, k)) for s, k in zip(geometry.stride, geometry.kernel, strict=True)))
    )


def filter_transform(
    w: np.ndarray, transforms: tuple[Transform, ...], geometry: Geometry
) -> np.ndarray:
    """U = G g along every axis, phases in front: w (K, C, *kernel) -> (phases, K, C, *alpha)."""
    return np.stack([_transform_phase(w, p, transforms, geometry) for p in phases(geometry)])


def _transform_phase(w, phase, transforms, geometry):
    part = w[(..., *(slice(p, None, s) for p, s in zip(phase, geometry.stride, strict=True)))]
    missing = [(0, t.r - k) for t, k in zip(transforms, part.shape[2:], strict=True)]
    part = direct.zeros_around(part, missing)
    for axis, t in enumerate(transforms, 2):
        part = apply_along(t.filter_program, part, axis)
    return part


def tiles(geometry: Geometry, transforms: tuple[Transform, ...]) -> tuple[int, ...]:
    """Tiles per axis, the last one possibly partial: ceil(out / m)."""
    return tuple(-(-o // t.m) for o, t in zip(geometry.out_size, transforms, strict=True))


def input_transform(
    x: np.ndarray, transforms: tuple[Transform, ...], geometry: Geometry
) -> np.ndarray:
    """V = BT d for every tile: x (N, C, *in_size) -> (phases, N, C, *tiles, *alpha)."""
    padded, n = direct.pad(x, geometry), geometry.n
    count = tiles(geometry, transforms)
    out = []
    for phase in phases(geometry):
        part = padded[
            (..., *(slice(p, None, s) for p, s in zip(phase, geometry.stride, strict=True)))
        ]
        # Whole tiles: zeros behind, or a cut where the last inputs reach no output.
        reach = [(p - 1) * t.m + t.alpha for p, t in zip(count, transforms, strict=True)]
        part = part[(..., *map(slice, reach))]
        missing = [(0, e - s) for e, s in zip(reach, part.shape[2:], strict=True)]
        part = direct.zeros_around(part, missing)
        windows = np.lib.stride_tricks.sliding_window_view(
            part, [t.alpha for t in transforms], tuple(range(2, 2 + n))
        )
        v = windows[(slice(None), slice(None), *(slice(None, None, t.m) for t in transforms))]
        for axis, t in enumerate(transforms, 2 + n):
            v = apply_along(t.input_program, v, axis)
        out.append(v)
    return np.stack(out)


def output_transform(
    m: np.ndarray, transforms: tuple[Transform, ...], geometry: Geometry
) -> np.ndarray:
    """y = AT M, tiles put together and cropped: m (N, K, *tiles, *alpha) -> (N, K, *out_size)."""
    n = geometry.n
    for axis, t in enumerate(transforms, 2 + n):
        m = apply_along(t.output_program, m, axis)
    # (N, K, P1.., m1..) -> (N, K, P1, m1, P2, m2, ...)
    m = m.transpose(0, 1, *(a for i in range(n) for a in (2 + i, 2 + n + i)))
    m = m.reshape(
        *m.shape[:2],
        *(p * t.m for p, t in zip(tiles(geometry, transforms), transforms, strict=True)),
    )
    return m[(..., *map(slice, geometry.out_size))]


def multiply(u: np.ndarray, v: np.ndarray, n: int, groups: int = 1) -> np.ndarray:
    """M = sum over phases and channels of U V: u (S, K, C / groups, *alpha), v (S, N, C, *tiles,
    *alpha).

    Returns (N, K, *tiles, *alpha): per group and point of alpha a matrix product (K, S C) x
    (S C, N tiles).
    """
    if groups > 1:
        parts = zip(np.split(u, groups, axis=1), np.split(v, groups, axis=2), strict=True)
        return np.concatenate([multiply(a, b, n) for a, b in parts], axis=1)
    s, k, c, *alpha = u.shape
    batch, count = v.shape[1], v.shape[3 : 3 + n]
    points = prod(alpha)
    uu = u.transpose(*range(3, 3 + n), 1, 0, 2).reshape(points, k, s * c)
    vv = v.transpose(*range(3 + n, 3 + 2 * n), 0, 2, 1, *range(3, 3 + n))
    vv = vv.reshape(points, s * c, batch * prod(count))
    m = np.matmul(uu, vv).reshape(*alpha, k, batch, *count)
    return m.transpose(n + 1, n, *range(n + 2, 2 * n + 2), *range(n))


def prepack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """U (phases, K, C / groups, *alpha) in float64."""
    return filter_transform(direct.exact(weights), plan.transforms, plan.geometry)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return 0


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x by F(m, r) on every axis, and its epilogue, to y.

    x (N, C, *in_size), packed U (phases, K, C, *alpha), bias (K,) or None,
    residual (N, K, *out_size) or None, y (N, K, *out_size) written.
    plan.transforms has one F(m, ceil(kernel / stride)) per axis.

    Equivalent to `F.conv3d(x, w, bias, stride, padding, groups=groups)`.
    """
    geometry, transforms = plan.geometry, plan.transforms
    v = input_transform(direct.exact(x), transforms, geometry)
    z = output_transform(multiply(packed, v, geometry.n, geometry.groups), transforms, geometry)
    y[...] = direct.finish(z, bias, residual, plan.epilogue)
