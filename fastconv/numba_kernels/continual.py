"""A convolution fed one frame at a time: the frames of its taps are a clip of one column.

Only the frames that the taps read make the clip, so that dilation along T is gone. Depthwise tiles
read them where they lie; for the other kernels they are copied into the workspace. Either way the
column is summed in the same order as over a whole clip.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from math import prod
from types import ModuleType

import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import depthwise, grouped
from .layout import pieces, pieces_size
from .simd import (
    Code,
    Int,
    Kernel,
    address,
    block,
    kernel,
    parallel_for,
    peek,
    threads,
    vector_width,
)

CONFIGS: tuple[dict[str, int], ...] = ({},)
LEAST_BYTES = 64 << 10  # of a frame that one item copies


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if geometry.stride[0] != 1:
        return (
            f"a step emits one column per frame; temporal stride {geometry.stride[0]} is not served"
        )
    return grouped.supports(geometry, dtype, epilogue)


@functools.lru_cache(maxsize=256)
def _clip(plan: Plan) -> tuple[ModuleType, Plan]:
    """The module and the plan that compute the column from the frames of its taps alone."""
    g = plan.geometry
    window = replace(
        g, in_size=(g.kernel[0], *g.in_size[1:]), dilation=(1, *g.dilation[1:])
    )  # stride 1, no padding along T: one column
    family = "depthwise" if g.is_depthwise else "grouped"
    module = depthwise if g.is_depthwise else grouped
    return module, replace(plan, family=family, geometry=window)


def prepack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, C / G, *kernel) in the order in which the kernel of the window reads it."""
    module, clip = _clip(plan)
    return module.prepack(weights, clip)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    module, clip = _clip(plan)
    window = prod(clip.geometry.x_shape)
    return pieces_size([window, module.workspace_size(clip)], plan.dtype)


def run(
    plan, x, packed, bias, residual, state, steps, y, workspace, active=None, update=True
) -> None:
    """Write the output column that the frame x completes to y, and the frame itself to the state.

    x         (N, C, *frame), frame = the axes behind the first
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_frame) or None
    state     (N, C, L, *frame), the ring; the oldest frame of each stream is overwritten by x
    steps     (N,) int64, frames seen so far; incremented
    y         (N, K, *out_frame), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to column t of `F.conv3d(stream, w, bias, ...)` over the stream padded in front
    with L zero frames.
    """
    module, clip = _clip(plan)
    column = y[:, :, None]
    added = None if residual is None else residual[:, :, None]
    if plan.geometry.kernel[0] == 1:
        module.run(clip, x[:, :, None], packed, bias, added, column, workspace)
    elif module is depthwise and depthwise.takes_frames(clip):
        frames = _frames(plan, x, state, steps)
        depthwise.run_frames(clip, frames, packed, bias, residual, y)
        _gather(plan, x, state, steps, None)
    else:
        memory, rest = pieces(workspace, [prod(clip.geometry.x_shape)])
        _gather(plan, x, state, steps, memory)
        module.run(clip, _window(clip, memory), packed, bias, added, column, rest)
    steps += 1


def _frames(plan: Plan, x: np.ndarray, state: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Addresses (N, KT) of the frames of the window, channels last."""
    g = plan.geometry
    ring, step = g.in_size[0] - 1, g.dilation[0]
    size = prod(g.in_size[1:]) * g.in_channels * x.itemsize
    first, newest = address(state), address(x)
    rows = []
    for n, seen in enumerate(steps.tolist()):
        # Tap k reads the frame of age L - k * dilation; the oldest is where the next one goes.
        slots = [(seen + k * step) % ring for k in range(g.kernel[0] - 1)]
        rows.append([first + (n * ring + slot) * size for slot in slots] + [newest + n * size])
    return np.array(rows, np.int64)


def _window(clip: Plan, memory: np.ndarray) -> np.ndarray:
    """The clip's input (N, C, KT, *frame) in its layout."""
    n, c, *size = clip.geometry.x_shape
    if clip.layout == CHANNELS_LAST:
        return np.moveaxis(memory.reshape(n, *size, c), -1, 1)
    return memory.reshape(n, c, *size)


# The parameters of `gather_kernel`, by position.
X, STATE, WINDOW, STEPS, FRAME, PIECES, ROWS, RING, TAPS, DILATION = range(10)


@block
def copy(code: Code, dtype: str, source: Int, target: Int, count: Int) -> None:
    """target[:count] = source[:count]."""
    whole = count - count % code.lanes
    code.loop(whole, lambda i, _: code.store(code.load(source, i), target, i), step=code.lanes)
    rest = code.first(count - whole)
    code.store(code.load(source, whole, rest), target, whole, rest)


def gather_kernel(DTYPE, ITEM, LANES):
    """An item is a piece of one stream's frame; in contiguous memory, of one of its channels."""

    def kernel(params, item, thread):
        frame, pieces = peek(params, FRAME), peek(params, PIECES)
        ring, taps = peek(params, RING), peek(params, TAPS)
        row, piece = item // pieces, item % pieces
        begin, end = frame * piece // pieces, frame * (piece + 1) // pieces
        count = end - begin
        seen = peek(peek(params, STEPS), row // peek(params, ROWS))
        newest = peek(params, X) + ITEM * (row * frame + begin)
        state = peek(params, STATE) + ITEM * (row * ring * frame + begin)
        window = peek(params, WINDOW) + ITEM * (row * taps * frame + begin)
        if peek(params, WINDOW) != 0:
            for tap in range(taps - 1):
                slot = (seen + tap * peek(params, DILATION)) % ring
                copy(DTYPE, state + ITEM * slot * frame, window + ITEM * tap * frame, count)
            copy(DTYPE, newest, window + ITEM * (taps - 1) * frame, count)
        copy(DTYPE, newest, state + ITEM * (seen % ring) * frame, count)

    return kernel


def _gather(plan: Plan, x, state, steps, window: np.ndarray | None) -> None:
    """Copy the frames of the taps to the window, if there is one, and x to the state."""
    compiled, fixed, items = _gathering(plan, threads())
    seen = np.ascontiguousarray(steps, np.int64)
    parallel_for(compiled, (*map(address, (x, state, window, seen)), *fixed), items)


@functools.lru_cache(maxsize=256)
def _gathering(plan: Plan, workers: int) -> tuple[Kernel, tuple[int, ...], int]:
    """The kernel that copies frames, its parameters behind the arrays, and how many items."""
    g = plan.geometry
    itemsize = np.dtype(plan.dtype).itemsize
    ring = g.in_size[0] - 1
    frame, rows = prod(g.in_size[1:]), g.in_channels
    if plan.layout == CHANNELS_LAST:
        frame, rows = frame * g.in_channels, 1
    pieces = max(1, min(-(-2 * workers // max(1, g.batch * rows)), frame * itemsize // LEAST_BYTES))
    fixed = (frame, pieces, rows, ring, g.kernel[0], g.dilation[0])
    compiled = kernel(gather_kernel, plan.dtype, itemsize, vector_width(plan.dtype))
    return compiled, fixed, g.batch * rows * pieces
