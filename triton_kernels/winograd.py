"""Minimal filtering F(m, r) per axis in Triton, any stride by the polyphase split.

Staged: V = BT x, one matrix product per point on the tensor cores, y = AT M with the epilogue
(Lavin and Gray 2016, section 4.1). One axis, time where there is a choice, is left to the product,
which transforms its operands and its sums on the fly: V and M then have frames where they would
have points. A convolution over this axis alone is the product and nothing else.

Float32 products are three TF32 products of numbers split in two, about as exact as float32
multiply-adds; configuration split = 0 multiplies float32. M is float32 in every precision.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from ..transforms import transform
from .emit import kernel
from .launch import (
    Launch,
    device_of,
    epilogue_constants,
    on_device,
    power_of_two,
    refuse_dtype,
    wide,
)
from .winograd_product import product_source
from .winograd_schedule import Chunk, Schedule, schedule_of
from .winograd_source import input_source, output_source

CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"fuse": 0},
    {"fuse": 1},
    {"rows": 64, "columns": 32, "warps": 4, "stages": 3},
    {"rows": 64, "columns": 64, "warps": 4, "stages": 2},
    {"rows": 128, "columns": 32, "warps": 4, "stages": 2},
    {"rows": 128, "columns": 64, "warps": 4, "stages": 3},
    {"rows": 128, "columns": 64, "warps": 8, "stages": 3},
    {"split": 0},
)


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if geometry.groups != 1:
        return f"winograd is for one group, not {geometry.groups}"
    if any(d != 1 for d in geometry.dilation):
        return f"winograd is for dilation 1, not {geometry.dilation}"
    if all(r <= s for r, s in zip(geometry.kernel, geometry.stride, strict=True)):
        return f"no axis of kernel {geometry.kernel} has more than one tap per phase"
    return refuse_dtype(dtype)


def prepack(weights: Any, plan: Plan) -> torch.Tensor:
    """U = G g along every axis, computed in float64 and rounded once.

    (parts, points, alpha, columns, depth): alpha the points of the axis that the product
    transforms, points the others, zeros behind the channels; two parts are TF32 numbers, their sum
    is U.
    """
    s = schedule_of(plan)
    w = on_device(weights, plan).reshape(s.geometry.lifted().w_shape).double()
    u = torch.stack([_transformed(w, phase, s) for phase in product(*map(range, _phases(s)))])
    # (phases, K, C, alpha0, alpha1, alpha2) -> points, alpha, K, phases, C
    k, c = u.shape[1:3]
    order = (4, 5, 3) if s.fused else (3, 4, 5)
    u = u.permute(*order, 1, 0, 2).reshape(s.points, s.alpha, k, s.phases, c)
    u = torch.nn.functional.pad(u, (0, s.phase_depth - c, 0, 0, 0, s.columns - k))
    u = u.reshape(1, s.points, s.alpha, s.columns, s.depth)
    dtype = getattr(torch, plan.dtype)
    if s.parts == 1:
        u = u.to(dtype).contiguous()
        return _tf32(u) if s.precision == "tf32" else u
    high = _tf32(u.to(dtype))
    return torch.cat([high, (u - high).to(dtype)])


def _phases(s: Schedule) -> tuple[int, ...]:
    return tuple(a.phases for a in s.axes)


def _transformed(w: torch.Tensor, phase: tuple[int, ...], s: Schedule) -> torch.Tensor:
    """U of the taps of one phase, w (K, C, T, H, W) -> (K, C, alpha0, alpha1, alpha2)."""
    w = w.permute(0, 1, *(2 + i for i in s.order))
    for axis, (p, a) in enumerate(zip(phase, s.axes, strict=True), 2):
        taps = w.movedim(axis, -1)[..., p :: a.stride]
        g = torch.from_numpy(a.transform.as_arrays("float64")[1]).to(w.device)
        w = (taps @ g[:, : taps.shape[-1]].T).movedim(-1, axis)
    return w


def _tf32(u: torch.Tensor) -> torch.Tensor:
    """Float32 rounded to the eleven bits that tensor cores read."""
    return ((u.view(torch.int32) + 4096) & -8192).view(torch.float32)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch: V and M of a chunk."""
    return schedule_of(plan).workspace()


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x by F(m, r) on every axis, and its epilogue, to y.

    x (N, C, *in_size), packed from `prepack` for the same plan, bias (K,) or None,
    residual (N, K, *out_size) or None, y (N, K, *out_size) written; memory as plan.layout says.

    Equivalent to `F.conv3d(x, w, bias, stride, padding)`.
    """
    arrays = {
        "x": x,
        "packed": packed,
        "bias": bias,
        "residual": residual,
        "y": y,
        "workspace": workspace,
    }
    with device_of(x):
        for launch in launches(plan):
            launch(arrays)


@lru_cache(maxsize=1024)
def launches(plan: Plan) -> tuple[Launch, ...]:
    """The kernels of a run: one, or three per chunk (more where all three axes are staged)."""
    s = schedule_of(plan)
    if not prod(s.geometry.y_shape):
        return ()
    if s.direct:
        return (_direct(s),)
    found: list[Launch] = []
    for chunk in s.chunks:
        found += [*_inputs(s, chunk), _products(s, chunk), *_outputs(s, chunk)]
    return tuple(found)


def _product_launch(
    s: Schedule, arrays: tuple[str, ...], rows: int, scalars: tuple[int, ...], even: bool
) -> Launch:
    t = s.axes[0].transform if s.fused else transform(1, 1)
    p, u_point = s.product, s.columns * s.depth
    constants = {"BP": p.rows, "BK": p.columns, "DEPTH": p.depth, "EVEN": even, "WIDE": _wide(s)}
    if s.direct:
        constants.update(epilogue_constants(s.plan.epilogue))
    blocks = -(-rows // p.rows) * (s.columns // p.columns) * s.points
    tail = (s.columns, s.depth)
    v_point, m_point = scalars[-2:]
    scalars = (*scalars[:-2], *tail, v_point, m_point, s.points * s.alpha * u_point)
    text = kernel(product_source(t, s.direct, s.precision))
    return Launch(text, blocks, arrays, scalars, tuple(constants.items()), p.warps, p.stages)


def _direct(s: Schedule) -> Launch:
    """One axis alone: from x to y."""
    first, a, b = s.axes
    sizes = (a.out, b.out, first.size, a.size, b.size)
    paddings, strides = (first.pad, a.pad, b.pad), (a.stride, b.stride)
    x_steps, y_steps = (a.x_step, b.x_step), (a.y_step, b.y_step)
    plain = paddings[1:] == (0, 0) and strides == (1, 1) and (a.size, b.size) == (a.out, b.out)
    if plain and a.x_step == b.x_step * b.size and a.y_step == b.y_step * b.size:
        # One axis of pixels: offsets are then known to be contiguous.
        sizes = (a.out * b.out, 1, first.size, a.size * b.size, 1)
        x_steps, y_steps = (b.x_step, 0), (b.y_step, 0)
    rows = s.geometry.batch * first.count * sizes[0] * sizes[1]
    scalars: tuple[int, ...] = (0, rows, first.count, *sizes, *paddings, *strides)
    scalars += (s.x_image, first.x_step, *x_steps, s.x_channel, first.out)
    scalars += (s.y_image, first.y_step, *y_steps, s.y_channel)
    scalars += (s.geometry.in_channels, s.geometry.out_channels, 0, 0)
    arrays = ("x", "packed", "bias", "residual", "y")
    return _product_launch(s, arrays, rows, scalars, s.geometry.in_channels == s.depth)


def _products(s: Schedule, chunk: Chunk) -> Launch:
    pixels = chunk.rows * s.axes[2].count
    before, behind = s.frames
    tiles = s.axes[0].count
    if s.fused:
        frames, pad = (before, behind), s.axes[0].pad
    else:  # pixels and tiles of the first axis are alike
        pixels, frames, pad, tiles = pixels * before, (1, 1), 0, 1
    rows = chunk.images * tiles * pixels
    scalars: tuple[int, ...]
    scalars = (s.m_start(chunk), rows, tiles, pixels, 1, frames[0], pixels, 1, pad, 0, 0, 1, 1)
    v_plane, m_plane = pixels * s.depth, pixels * s.m_columns
    scalars += (frames[0] * v_plane, v_plane, s.depth, 0, 1, frames[1])
    scalars += (frames[1] * m_plane, m_plane, s.m_columns, 0, 1)
    scalars += (s.depth, s.m_columns, s.v_point(chunk), s.m_point(chunk))
    return _product_launch(s, ("workspace", "packed", "workspace"), rows, scalars, True)


def _inputs(s: Schedule, chunk: Chunk) -> list[Launch]:
    rows, order = s.v_rows(chunk), s.axes
    transforms, strides = tuple(a.transform for a in order), tuple(a.stride for a in order)
    scalars: tuple[int, ...]
    scalars = (rows, s.frames[0], chunk.rows, order[2].count, chunk.first_image, chunk.first_row)
    scalars += (*(a.size for a in order), *(a.pad for a in order), s.phase_depth)
    scalars += (s.geometry.in_channels, s.x_image, *(a.x_step for a in order), s.x_channel)
    scalars += (s.v_point(chunk), s.depth)
    # A product that transforms its operands rounds them itself.
    tf32 = s.precision == "tf32" and (not s.fused or order[0].transform.m == 1)
    fixed = (transforms, strides, _phases(s), s.fused, s.last, tf32)
    block, channels = _block(s, prod(a.alpha for a in order[1:]), s.phase_depth)
    constants = {"R": block, "CB": channels, "WIDE": _wide(s)}
    programs = -(-rows // block) * -(-s.phase_depth // channels) * s.phases
    return [
        Launch(
            kernel(input_source(*fixed, outer)),
            programs,
            ("x", "workspace"),
            scalars,
            tuple(constants.items()),
        )
        for outer in range(1 if s.fused else order[0].alpha)
    ]


def _outputs(s: Schedule, chunk: Chunk) -> list[Launch]:
    rows, order = s.m_rows(chunk), s.axes
    transforms = tuple(a.transform for a in order)
    scalars: tuple[int, ...]
    scalars = (s.m_start(chunk), rows, s.frames[1], chunk.rows, order[2].count)
    scalars += (chunk.first_image, chunk.first_row, *(a.out for a in order), s.m_columns)
    scalars += (s.geometry.out_channels, s.y_image, *(a.y_step for a in order), s.y_channel)
    scalars += (s.m_point(chunk), s.m_columns)
    block, channels = _block(s, prod(a.alpha for a in order[1:]), s.m_columns)
    constants = {"R": block, "CB": channels, "WIDE": _wide(s)}
    constants.update(epilogue_constants(s.plan.epilogue))
    programs = -(-rows // block) * -(-s.m_columns // channels)
    return [
        Launch(
            kernel(output_source(transforms, s.fused, s.last, outer)),
            programs,
            ("workspace", "bias", "residual", "y"),
            scalars,
            tuple(constants.items()),
        )
        for outer in range(1 if s.fused else order[0].transform.m)
    ]


def _block(s: Schedule, values: int, channels: int) -> tuple[int, int]:
    """Rows x channels of a program of a transform that keeps `values` numbers per element."""
    vector = s.plan.options.get("vector", 4 if values <= 16 else 2 if values <= 64 else 1)
    elements = 128 * vector
    lanes = min(32 * vector, power_of_two(channels))
    if s.last:
        return elements // lanes, lanes
    # Lanes along tiles read x; V is written along channels, by a turn in shared memory.
    return elements // 16, 16


def _wide(s: Schedule) -> bool:
    chunk = s.chunks[0]
    points = (0, 0) if s.direct else (s.v_point(chunk), s.m_point(chunk))
    g = s.geometry
    padded = g.batch * g.in_channels * prod(g.padded_size)
    return wide(padded, prod(g.y_shape), *points)
