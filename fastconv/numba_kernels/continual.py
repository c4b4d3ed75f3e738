"""A convolution fed one frame at a time, in both forms of memory.

ring  The frames of a column's taps are a clip of one column, and summed in the order of a whole
      clip. Only the frames that the taps read make it, so that dilation along T is gone. Depthwise
      tiles read them where they lie; for the other kernels they are copied into the workspace.
sum   Each tap is a convolution of the frame alone, whose result is added to the column it is for.

Where only some streams have a column, all are computed, and those are taken.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from math import prod
from types import ModuleType
from typing import Any

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
    return grouped.supports(geometry, dtype, epilogue)


@functools.lru_cache(maxsize=256)
def _clip(plan: Plan) -> tuple[ModuleType, Plan]:
    """The module and the plan that compute columns from the frames of their taps alone; for the
    option `sum`, of one tap.
    """
    g = plan.geometry
    taps = 1 if plan.options.get("sum") else g.kernel[0]
    window = replace(
        g,
        in_size=(taps, *g.in_size[1:]),
        kernel=(taps, *g.kernel[1:]),
        stride=(1, *g.stride[1:]),
        dilation=(1, *g.dilation[1:]),
    )  # no padding along T: one column
    family = "depthwise" if g.is_depthwise else "grouped"
    module = depthwise if g.is_depthwise else grouped
    # What tunes the depthwise kernel, without what says which form of memory there is.
    config = tuple((name, n) for name, n in plan.config if name not in ("sum", "replicate"))
    return module, replace(plan, family=family, geometry=window, config=config)


@functools.lru_cache(maxsize=256)
def _taps(plan: Plan) -> tuple[Plan, Plan]:
    """Of the option `sum`: the plan of one tap, and of the last, whose residual is the sum."""
    _, clip = _clip(plan)
    assert isinstance(plan.epilogue, Epilogue)
    last = replace(plan.epilogue, residual=True)
    return replace(clip, epilogue=Epilogue()), replace(clip, epilogue=last)


def prepack(weights: np.ndarray, plan: Plan) -> Any:
    """w (K, C / G, *kernel) in the order in which the kernel of the window reads it.

    With the option `sum` a tuple, tap by tap.
    """
    module, clip = _clip(plan)
    if not plan.options.get("sum"):
        return module.prepack(weights, clip)
    taps = range(plan.geometry.kernel[0])
    return tuple(module.prepack(weights[:, :, k : k + 1], _taps(plan)[0]) for k in taps)


def _sizes(plan: Plan) -> list[int]:
    """Of the workspace's pieces in front of the inner kernel's own."""
    column = prod(plan.geometry.y_shape)
    if plan.options.get("sum"):
        return [column, column, column]  # under one tap, what is added to the last, a column
    return [prod(_clip(plan)[1].geometry.x_shape), column]


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    module, clip = _clip(plan)
    inner = max(module.workspace_size(p) for p in (clip, *_taps(plan)))
    return pieces_size([*_sizes(plan), inner], plan.dtype)


def run(
    plan, x, packed, bias, residual, state, steps, y, workspace, active=None, update=True
) -> None:
    """Write the column that the frame x completes to y, and what later columns need to the state.

    x         (N, C, *frame), frame = the axes behind the first
    packed    what `prepack` returned for the same plan
    bias      (K,) or None;  residual (N, K, *out_frame) or None
    state     (N, C, L, *frame); with the option `sum` (N, K, L, *out_frame)
    steps     (N,) int64, frames seen so far; incremented
    y         (N, K, *out_frame); written where the stream has a column at this time
    workspace `workspace_size(plan)` elements, overwritten
    active    (N,) bool or None: of a stream that is not, nothing is written
    update    False: state and steps are not written

    Equivalent to column (t - L) / s of `F.conv3d(stream, w, bias, (s, ...), (0, ...), ...)`.
    """
    there = _columns(plan, steps) if active is None else _columns(plan, steps) & active
    form = _with_sums if plan.options.get("sum") else _with_frames
    form(plan, x, packed, bias, residual, state, steps, y, workspace, active, update, there)
    if update:
        steps += 1 if active is None else active


def _columns(plan: Plan, times: np.ndarray) -> np.ndarray:
    """(N,) bool: whether there is a column at these times (N,)."""
    g = plan.geometry
    return (times - (g.in_size[0] - 1)) % g.stride[0] == 0


def _with_frames(
    plan, x, packed, bias, residual, state, steps, y, workspace, active, update, there
) -> None:
    """The state is the last frames: columns are summed as over a clip, then x takes its slot."""
    module, clip = _clip(plan)
    memory, scratch, rest = pieces(workspace, _sizes(plan))
    keep = update and state.shape[2] > 0
    if there.any():
        out = y if there.all() else _as(scratch, y, plan.layout)
        added = None if residual is None else residual[:, :, None]
        if plan.geometry.kernel[0] == 1:
            module.run(clip, x[:, :, None], packed, bias, added, out[:, :, None], rest)
        elif module is depthwise and depthwise.takes_frames(clip):
            frames = _frames(plan, x, state, steps)
            depthwise.run_frames(clip, frames, packed, bias, residual, out)
        else:
            _gather(plan, x, state, steps, memory, active, keep)
            keep = False
            module.run(clip, _window(clip, memory), packed, bias, added, out[:, :, None], rest)
        if out is not y:
            y[there] = out[there]
    if keep:
        _gather(plan, x, state, steps, None, active, True)


def _with_sums(
    plan, x, packed, bias, residual, state, steps, y, workspace, active, update, there
) -> None:
    """The state is the columns that are not complete: every tap adds to its own."""
    g = plan.geometry
    module, _ = _clip(plan)
    one, last = _taps(plan)
    taps, ring = g.kernel[0], g.in_size[0] - 1
    *maps, rest = pieces(workspace, _sizes(plan))
    part, sums, column = (_as(m, y, plan.layout) for m in maps)

    def under(tap: int) -> np.ndarray:
        module.run(one, x[:, :, None], packed[tap], None, None, part[:, :, None], rest)
        return part

    streams = np.arange(g.batch)[there]
    sums[...] = 0 if residual is None else residual
    if ring:
        sums[streams] += state[streams, :, steps[streams] % ring]
    fresh = steps == 0
    if active is not None:
        fresh &= active
    if ring and plan.options.get("replicate") and fresh.any():
        # What the frames in front of the stream have added, all of them its first.
        before = np.zeros(part.shape, part.dtype)
        for tap in range(taps - 1):
            before += under(tap)
            first = (taps - 2 - tap) * g.dilation[0]
            for slot in range(first, first + g.dilation[0]) if update else ():
                state[fresh, :, slot] = before[fresh]
        begun = there & fresh
        sums[begun] = before[begun] + (0 if residual is None else residual[begun])
    if len(streams):
        out = y if len(streams) == g.batch else column
        module.run(last, x[:, :, None], packed[-1], bias, sums[:, :, None], out[:, :, None], rest)
        if out is not y:
            y[there] = out[there]
    for tap in range(taps - 1 if update else 0):
        times = steps + (taps - 1 - tap) * g.dilation[0]
        waiting = _columns(plan, times) if active is None else _columns(plan, times) & active
        if not waiting.any():
            continue
        product = under(tap)
        for n in np.flatnonzero(waiting):
            slot = state[n, :, times[n] % ring]
            # The first tap to reach a column overwrites the slot.
            slot[...] = product[n] + slot if tap else product[n]


def _as(memory: np.ndarray, y: np.ndarray, layout: str) -> np.ndarray:
    """Memory of y's size as an array of its shape, in the layout."""
    n, k, *out = y.shape
    if layout == CHANNELS_LAST:
        return np.moveaxis(memory.reshape(n, *out, k), -1, 1)
    return memory.reshape(y.shape)


def _times(plan: Plan, seen: int) -> list[int]:
    """Of the frames under the taps of a column, but the last, which is the newest."""
    g = plan.geometry
    first = 0 if plan.options.get("replicate") else seen - g.in_size[0]
    begin = seen - (g.in_size[0] - 1)
    return [max(begin + k * g.dilation[0], first) for k in range(g.kernel[0] - 1)]


def _frames(plan: Plan, x: np.ndarray, state: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Addresses (N, KT) of the frames of the window, channels last."""
    g = plan.geometry
    ring = g.in_size[0] - 1
    size = prod(g.in_size[1:]) * g.in_channels * x.itemsize
    first, newest = address(state), address(x)
    rows = []
    for n, seen in enumerate(steps.tolist()):
        here = newest + n * size
        row = [
            here if time == seen else first + (n * ring + time % ring) * size
            for time in _times(plan, seen)
        ]
        rows.append([*row, here])
    return np.array(rows, np.int64)


def _window(clip: Plan, memory: np.ndarray) -> np.ndarray:
    """The clip's input (N, C, KT, *frame) in its layout."""
    n, c, *size = clip.geometry.x_shape
    if clip.layout == CHANNELS_LAST:
        return np.moveaxis(memory.reshape(n, *size, c), -1, 1)
    return memory.reshape(n, c, *size)


# The parameters of `gather_kernel`, by position.
(
    X, STATE, WINDOW, STEPS, ACTIVE, FRAME, PIECES, ROWS, RING, TAPS, DILATION, REPLICATE, KEEP,
) = range(13)  # fmt: skip


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
        stream = row // peek(params, ROWS)
        if peek(peek(params, ACTIVE), stream) == 0:
            return
        begin, end = frame * piece // pieces, frame * (piece + 1) // pieces
        count = end - begin
        seen = peek(peek(params, STEPS), stream)
        newest = peek(params, X) + ITEM * (row * frame + begin)
        state = peek(params, STATE) + ITEM * (row * ring * frame + begin)
        window = peek(params, WINDOW) + ITEM * (row * taps * frame + begin)
        if peek(params, WINDOW) != 0:
            for tap in range(taps - 1):
                # Before the first frame: the oldest slot, or that frame.
                time = seen + tap * peek(params, DILATION)
                if peek(params, REPLICATE) != 0:
                    time = max(time, ring)
                source = state + ITEM * (time % ring) * frame
                if time == seen + ring:
                    source = newest
                copy(DTYPE, source, window + ITEM * tap * frame, count)
            copy(DTYPE, newest, window + ITEM * (taps - 1) * frame, count)
        if peek(params, KEEP) != 0:
            copy(DTYPE, newest, state + ITEM * (seen % ring) * frame, count)

    return kernel


def _gather(plan: Plan, x, state, steps, window: np.ndarray | None, active, keep: bool) -> None:
    """Copy the frames of the taps to the window, if there is one, and to keep it x to the state."""
    compiled, fixed, items = _gathering(plan, threads())
    seen = np.ascontiguousarray(steps, np.int64)
    mask = np.ones(len(seen), np.int64) if active is None else active.astype(np.int64)
    known = tuple(map(address, (x, state, window, seen, mask)))
    parallel_for(compiled, (*known, *fixed, int(keep)), items)


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
    replicate = plan.options.get("replicate", 0)
    fixed = (frame, pieces, rows, ring, g.kernel[0], g.dilation[0], replicate)
    compiled = kernel(gather_kernel, plan.dtype, itemsize, vector_width(plan.dtype))
    return compiled, fixed, g.batch * rows * pieces
