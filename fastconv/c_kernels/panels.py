"""Panels of the matrix micro-kernel (csrc/gemm.h): how wide, how many rows, and how packed."""

from __future__ import annotations

import numpy as np

from . import launch

# As in csrc/gemm.h: rows of the register block by lanes and vectors per panel.
_BLOCK_ROWS = {16: (0, 14, 14, 8, 6), 8: (0, 12, 6, 4, 2), 4: (0, 8, 6, 4, 2)}
# Time of a multiplication in a block of so many vectors, relative; measured at 24 to 192 deep.
_BLOCK_TIME = {
    16: (0, 1.27, 1.0, 1.0, 1.0),
    8: (0, 1.25, 1.0, 1.0, 1.45),
    4: (0, 1.2, 1.0, 1.0, 1.4),
}


def block_rows(vectors: int) -> int:
    """Rows of A that one register block takes, for panels of so many vectors."""
    return _BLOCK_ROWS[launch.lanes()][vectors]


def panel_vectors(columns: int) -> int:
    """Vectors per panel: little padding behind `columns`, and enough to do per element of A."""
    needed = -(-columns // launch.lanes())
    time = _BLOCK_TIME[launch.lanes()]
    order = (2, 4, 3, 1)
    return min(order, key=lambda v: (-(-needed // v) * v * time[v], order.index(v)))


def pack_panels(b: np.ndarray, vectors: int) -> np.ndarray:
    """b (..., depth, columns) -> (panels, ..., depth, vectors * lanes) in float32, zeros behind.

    The axes in front are the segments of a sum, each panel has all of them. Behind the last panel
    is memory for another one: products ask for the panel behind the one they use.
    """
    *outer, depth, columns = b.shape
    width = vectors * launch.lanes()
    count = -(-columns // width)
    panels = launch.aligned(count + 1, *outer, depth, width)
    for panel in range(count):
        part = b[..., panel * width : (panel + 1) * width]
        panels[panel, ..., : part.shape[-1]] = part
    return panels[:count]


def panel_split(needed: int, time: tuple[float, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Vectors per panel of two kinds, and panels of each: `needed` vectors in the least time.

    time: of a multiplication in panels of 0, 1, 2, ... vectors, relative
    """
    order = (2, 4, 3, 1)
    splits = [
        ((wide, narrow), (count, (needed - count * wide) // narrow))
        for wide in order
        for narrow in order
        for count in range(needed // wide + 1)
        if (needed - count * wide) % narrow == 0
    ]

    def cost(split: tuple[tuple[int, int], tuple[int, int]]) -> float:
        return sum(n * (v * time[v] + 0.01) for v, n in zip(*split, strict=True))

    return min(splits, key=cost)


def pack_split(b: np.ndarray, vectors: tuple[int, int], panels: tuple[int, int]) -> np.ndarray:
    """b (groups, depth, columns) -> (groups, depth * vectors * lanes), the panels of `panel_split`
    one behind the other, with memory for another one behind the last."""
    lanes = launch.lanes()
    groups, depth, _ = b.shape
    widths = [v * lanes for v, n in zip(vectors, panels, strict=True) for _ in range(n)]
    size = depth * sum(widths)
    packed = launch.aligned(groups * size + depth * max(widths))
    of_group = packed[: groups * size].reshape(groups, size)
    start = at = 0
    for width in widths:
        panel = of_group[:, at : at + depth * width].reshape(groups, depth, width)
        part = b[..., start : start + width]
        panel[..., : part.shape[-1]] = part
        start, at = start + width, at + depth * width
    return packed
