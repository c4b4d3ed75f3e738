"""Channels-last views of any plan's arrays: contiguous memory is transposed through the workspace.

Families are written once, for (N, T, H, W, C) in C order; fewer axes are lifted to three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from ..plan import CHANNELS_LAST, Plan
from .simd import (
    LINE_BYTES,
    Code,
    Int,
    Vec,
    address,
    block,
    kernel,
    parallel_for,
    peek,
    vector_width,
)

_POINTS_PER_ITEM = 64  # a few cache lines of every channel


@block
def transpose_tile(
    code: Code, dtype: str, source: Int, source_stride: Int, target: Int, target_stride: Int,
    rows: Int, columns: Int,
) -> None:  # fmt: skip
    """target[j, i] = source[i, j] for i < rows, j < columns, at most `lanes` of each."""
    lanes = code.lanes

    def move(row_masks: Sequence, column_masks: Sequence) -> None:
        vectors = [code.load(source, source_stride * i, m) for i, m in enumerate(row_masks)]
        for j, (vector, m) in enumerate(zip(_transposed(vectors), column_masks, strict=True)):
            code.store(vector, target, target_stride * j, m)

    b = code.builder
    whole = b.and_(rows >= lanes, columns >= lanes)
    with b.if_else(whole) as (yes, no):
        with yes:
            move([None] * lanes, [None] * lanes)
        with no:
            move(
                [code.first(code.select(rows > i, columns, 0)) for i in range(lanes)],
                [code.first(code.select(columns > j, rows, 0)) for j in range(lanes)],
            )


def _transposed(vectors: list[Vec]) -> list[Vec]:
    """A square of registers transposed: log2(lanes) rounds that swap off-diagonal blocks."""
    lanes = len(vectors)
    half = lanes // 2
    while half:
        following = list(vectors)
        for i in range(lanes):
            if not i & half:
                upper, lower = vectors[i], vectors[i + half]
                # Blocks of `half` lanes: upper keeps its even ones and takes lower's, and so on.
                even = [j if not j & half else lanes + j - half for j in range(lanes)]
                odd = [j + half if not j & half else lanes + j for j in range(lanes)]
                following[i] = upper.shuffle(lower, even)
                following[i + half] = upper.shuffle(lower, odd)
        vectors, half = following, half // 2
    return vectors


def _transpose_kernel(DTYPE, ITEM, LANES):
    """params: source, target, rows, columns, rows and columns per item, items down and across."""

    def kernel(params, item, thread):
        source, target = peek(params, 0), peek(params, 1)
        rows, columns = peek(params, 2), peek(params, 3)
        high, wide = peek(params, 4), peek(params, 5)
        down, across = peek(params, 6), peek(params, 7)
        image = item // (down * across) * rows * columns
        first_row = item // across % down * high
        first_column = item % across * wide
        last_row = min(first_row + high, rows)
        last_column = min(first_column + wide, columns)
        for i in range(first_row, last_row, LANES):
            for j in range(first_column, last_column, LANES):
                transpose_tile(
                    DTYPE,
                    source + ITEM * (image + i * columns + j),
                    columns,
                    target + ITEM * (image + j * rows + i),
                    rows,
                    last_row - i,
                    last_column - j,
                )

    return kernel


def _transpose(source: np.ndarray, target: np.ndarray, rows: int, columns: int, tall: bool) -> None:
    """Each image (rows, columns) of source to (columns, rows) in target, cut along one axis."""
    dtype = str(source.dtype)
    if not source.size:
        return
    high = _POINTS_PER_ITEM if tall else rows
    wide = columns if tall else _POINTS_PER_ITEM
    down, across = -(-rows // high), -(-columns // wide)
    params = (address(source), address(target), rows, columns, high, wide, down, across)
    images = source.size // (rows * columns)
    compiled = kernel(_transpose_kernel, dtype, source.itemsize, vector_width(dtype))
    parallel_for(compiled, params, images * down * across)


def to_channels_last(source: np.ndarray, target: np.ndarray) -> None:
    """Copy (N, C, *size) in C order to (N, *size, C) in C order."""
    channels = source.shape[1]
    _transpose(source, target, channels, prod(source.shape[2:]), tall=False)


def to_contiguous(source: np.ndarray, target: np.ndarray) -> None:
    """Copy (N, *size, C) in C order to (N, C, *size) in C order."""
    channels = target.shape[1]
    _transpose(source, target, prod(target.shape[2:]), channels, tall=True)


def pieces_size(sizes: Sequence[int], dtype: str) -> int:
    """Elements from which `pieces` can cut arrays of the given sizes."""
    line = LINE_BYTES // np.dtype(dtype).itemsize
    return sum(-(-size // line) * line for size in sizes) + line


def pieces(workspace: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Arrays of the given sizes and then the rest, cut from a workspace at cache-line borders."""
    line = LINE_BYTES // workspace.itemsize
    start = -(address(workspace) // workspace.itemsize) % line
    cut = []
    for size in sizes:
        cut.append(workspace[start : start + size])
        start += -(-size // line) * line
    return [*cut, workspace[start:]]


class Views(NamedTuple):
    """x, residual (or None) and y as (N, T, H, W, C) in C order, and what is left of the workspace.

    `finish()` after the kernel brings y to where the caller wants it.
    """

    x: np.ndarray
    residual: np.ndarray | None
    y: np.ndarray
    workspace: np.ndarray
    finish: Callable[[], None]


def _copies(plan: Plan) -> list[tuple[int, ...]]:
    """Shapes (N, C, *size) of the arrays that need a transposed copy: x, y, residual."""
    if plan.layout == CHANNELS_LAST:
        return []
    last = plan.epilogue[-1] if isinstance(plan.epilogue, tuple) else plan.epilogue
    return [plan.geometry.x_shape, plan.geometry.y_shape, *[plan.geometry.y_shape] * last.residual]


def views_size(plan: Plan) -> int:
    """Workspace elements that `channels_last_views` takes; a family adds its own."""
    return pieces_size([prod(shape) for shape in _copies(plan)], plan.dtype)


def channels_last_views(
    plan: Plan, x: np.ndarray, residual: np.ndarray | None, y: np.ndarray, workspace: np.ndarray
) -> Views:
    """Views of x, residual and y, all (N, C, *size) in the plan's layout, see `Views`."""
    shapes = _copies(plan)
    *copies, rest = pieces(workspace, [prod(shape) for shape in shapes])
    if not shapes:
        moved = [
            a if a is None else _lifted(a.transpose(0, *range(2, a.ndim), 1))
            for a in (x, residual, y)
        ]
        return Views(moved[0], moved[1], moved[2], rest, lambda: None)
    inside = [
        c.reshape(shape[0], *shape[2:], shape[1]) for c, shape in zip(copies, shapes, strict=True)
    ]
    for array, copy in zip((x, y, residual), inside, strict=False):
        if array is not None and array is not y:
            to_channels_last(array, copy)
    shifted = _lifted(inside[2]) if residual is not None else None
    return Views(
        _lifted(inside[0]), shifted, _lifted(inside[1]), rest, lambda: to_contiguous(inside[1], y)
    )


def _lifted(array: np.ndarray) -> np.ndarray:
    """(N, *size, C) -> (N, T, H, W, C) with leading axes of size 1, never a copy."""
    missing = 5 - array.ndim
    return array[(slice(None), *(None,) * missing)]
