"""A convolution fed one frame at a time, in both forms of its memory; nothing waits for the host.

Two launches: columns (with sums also what is added to later ones), then what every program of the
first had to read before it may change: the slot of the oldest frame, and the count of frames. So a
CUDA graph of a step replays as a stream goes on.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import continual_source, launch
from .continual_source import Structure
from .emit import kernel
from .launch import Launch

# x3: 1 for three TF32 products in place of one in float32; pixels, outs: of a tile;
# cols: outputs of a row that share what they read, where products are element by element
CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"x3": 1},
    {"pixels": 16},
    {"pixels": 32},
    {"outs": 16},
    {"outs": 64},
    {"cols": 1},
    {"cols": 2},
    {"cols": 4},
)
MOST_ELEMENTWISE = 4  # input channels per group that are multiplied element by element
PROGRAMS = 264  # wanted: two for each processor of a large GPU
BLOCK = 1024  # elements of a frame that a program keeps


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


def prepack(weights: Any, plan: Plan) -> torch.Tensor:
    """w (K, C / G, *kernel) as (G, *kernel, C / G, K / G), or (*kernel, C / G, K) where a group has
    few channels.
    """
    g = plan.geometry
    w = launch.on_device(weights, plan)
    per_group = w.reshape(g.groups, g.out_channels // g.groups, w.shape[1], -1)
    if _structure(plan).block_c:
        return per_group.permute(0, 3, 2, 1).contiguous()
    # (G, K / G, C / G, taps) -> (taps, C / G, K)
    return per_group.permute(3, 2, 0, 1).reshape(g.taps, w.shape[1], -1).contiguous()


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch: the times of the streams."""
    if plan.options.get("sum") or plan.geometry.kernel[0] == 1:
        return 0
    return plan.geometry.batch * 8 // getattr(torch, plan.dtype).itemsize


def _axes(plan: Plan) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
    """in_size, out_size, kernel, stride, dilation and leading padding of time, height, width."""
    g = plan.geometry
    ones = [1] * (3 - g.n)

    def three(values: Any, one: int = 1) -> list[int]:
        return [values[0], *(one for _ in ones), *values[1:]]

    pads = three([before for before, _ in g.padding], 0)
    return (
        three(g.in_size),
        three(g.out_size),
        three(g.kernel),
        three(g.stride),
        three(g.dilation),
        pads,
    )


@lru_cache(maxsize=1024)
def _structure(plan: Plan, update: bool = True) -> Structure:
    g, options = plan.geometry, plan.options
    _, out_size, taps, stride, dilation, pads = _axes(plan)
    depth, outs = g.in_channels // g.groups, g.out_channels // g.groups
    pixels, last = out_size[1] * out_size[2], plan.layout == CHANNELS_LAST
    dots = depth > MOST_ELEMENTWISE
    if dots:
        block_p, block_k = _tile_of_dots(g.batch, pixels, outs, g.groups)
        block_c = min(max(launch.power_of_two(depth), 16), 64)
    else:
        block_p, block_k = _tile_elementwise(pixels, g.out_channels, last)
        block_c = 0
    shares = not (dots or options.get("sum")) and taps[2] > 1
    cols = options.get("cols", _cols(g.batch, pixels, g.out_channels)) if shares else 1
    precision = "tf32" if plan.precision == "tf32" else "tf32x3" if options.get("x3") else "ieee"
    sizes = (prod(g.x_shape[1:]), g.out_channels * g.in_size[0] * pixels)
    return Structure(
        tuple(taps),
        tuple(stride),
        tuple(dilation),
        (pads[1], pads[2]),
        depth,
        outs,
        last,
        bool(options.get("replicate")),
        update,
        options.get("pixels", block_p),
        options.get("outs", block_k),
        block_c,
        cols,
        precision,
        launch.wide(*sizes),
    )


def _tile_of_dots(batch: int, pixels: int, outs: int, groups: int) -> tuple[int, int]:
    """Pixels and channels: as large as leaves work for every processor."""
    block_p, block_k = 64, min(max(launch.power_of_two(outs), 16), 64)

    def programs() -> int:
        return batch * groups * -(-pixels // block_p) * -(-outs // block_k)

    while programs() < PROGRAMS and (block_p > 16 or block_k > 16):
        if block_p > 16 and block_p >= block_k:
            block_p //= 2
        else:
            block_k //= 2
    return block_p, block_k


def _cols(batch: int, pixels: int, outs: int) -> int:
    """Outputs of a run."""
    return 1


def _tile_elementwise(pixels: int, outs: int, last: bool) -> tuple[int, int]:
    """Pixels and channels, 512 elements: long along the axis that lies in consecutive memory."""
    if last:
        block_k = min(launch.power_of_two(outs), 64)
        return max(min(512 // block_k, launch.power_of_two(pixels)), 1), block_k
    block_p = min(launch.power_of_two(pixels), 128)
    return block_p, max(min(512 // block_p, launch.power_of_two(outs)), 1)


def launches(plan: Plan) -> tuple[Launch, ...]:
    """All kernel starts of `run`."""
    return _launches(plan, True)


@lru_cache(maxsize=1024)
def _launches(plan: Plan, update: bool) -> tuple[Launch, ...]:
    g, s = plan.geometry, _structure(plan, update)
    in_size, out_size, *_ = _axes(plan)
    pixels, frame = out_size[1] * out_size[2], in_size[1] * in_size[2]
    per_group = -(-s.outs // s.block_k)
    runs = pixels // out_size[2] * -(-out_size[2] // s.cols)
    p_blocks = -(-runs // s.block_p)
    k_blocks = g.groups * per_group if s.block_c else -(-g.out_channels // s.block_k)
    sums = bool(plan.options.get("sum"))
    arrays = ("x", "state", "steps", "active", "packed", "bias", "residual", "y")
    scalars = (
        in_size[1], in_size[2], out_size[2], pixels, g.in_channels, g.out_channels, p_blocks,
        k_blocks,
    )  # fmt: skip
    kept = not sums and s.ring > 0
    source = continual_source.sums(s) if sums else continual_source.ring(s)
    found = [
        Launch(
            kernel(source),
            g.batch * p_blocks * k_blocks,
            (*arrays, "seen") if kept else arrays,
            scalars,
            launch.epilogue_constants(plan.epilogue),
        )
    ]
    if update and kept:
        blocks = -(-g.in_channels * frame // BLOCK)
        text = continual_source.keep(s.last, s.ring, BLOCK)
        names = ("x", "state", "steps", "active", "seen")
        found.append(Launch(kernel(text), g.batch * blocks, names, (g.in_channels, frame, blocks)))
    elif update:
        text = continual_source.count()
        found.append(Launch(kernel(text), g.batch, ("steps", "active"), warps=1))
    return tuple(found)


def run(
    plan, x, packed, bias, residual, state, steps, y, workspace, active=None, update=True
) -> None:
    """Write the column that the frame x completes to y, and what later columns need to the state.

    x         (N, C, *frame), frame = the axes behind the first
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_frame) or None
    state     (N, C, L, *frame); with the option `sum` (N, K, L, *out_frame) in float32
    steps     (N,) int64, frames seen so far; incremented
    y         (N, K, *out_frame); written where the stream has a column at this time
    workspace `workspace_size(plan)` elements, overwritten
    active    (N,) bool or None: of a stream that is not, nothing is written
    update    False: state and steps are not written

    Equivalent to column (t - L) / s of `F.conv3d(stream, w, bias, (s, ...), (0, ...), ...)`.
    """
    seen = None
    if workspace is not None and workspace.numel():
        seen = workspace.view(torch.int64)
    arrays = {
        "x": x,
        "state": state,
        "steps": steps,
        "active": active,
        "packed": packed,
        "bias": bias,
        "residual": residual,
        "y": y,
        "seen": seen,
    }
    with launch.device_of(x):
        for start in _launches(plan, update):
            start(arrays)
