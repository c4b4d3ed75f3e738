"""Where the values of a program lie: one block of memory, used again as soon as nobody reads it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
LINE = 16  # floats of a cache line


@dataclass(frozen=True)
class Life:
    """Floats that are needed from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int


def offsets(lives: Mapping[Key, Life]) -> tuple[dict[Key, int], int]:
    """Where each life begins so that no two of one time overlap, and the floats of all.

    In order of their births, each where the least room is left over; what was freed last is still
    in the caches, but is seldom of the right size.
    """
    placed: list[tuple[int, int, Life]] = []
    found: dict[Key, int] = {}
    for key, life in sorted(lives.items(), key=lambda item: (item[1].first, -item[1].size)):
        size = -(-life.size // LINE) * LINE
        taken = sorted((a, b) for a, b, other in placed if other.last >= life.first)
        at = _gap(taken, size)
        placed.append((at, at + size, life))
        found[key] = at
    return found, max((end for _, end, _ in placed), default=0)


def _gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The start of the smallest gap between intervals that holds `size`, or behind them all."""
    best, least, end = -1, -1, 0
    for start, stop in taken:
        room = start - end
        if room >= size and (least < 0 or room < least):
            best, least = end, room
        end = max(end, stop)
    return best if best >= 0 else end


def block(floats: int) -> Tensor:
    """Uninitialised memory from a cache line on; NumPy asks the system for huge pages."""
    memory = np.empty(floats + LINE, np.float32)
    start = -(memory.ctypes.data // 4) % LINE
    return torch.from_numpy(memory[start : start + floats])
