"""Hypothesis profiles, and arrays whose every unwritten or overwritten element shows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings

# Kernels compile on their first call, so no example has a deadline. CI repeats the same examples.
settings.register_profile(
    "default", max_examples=20, deadline=None, derandomize=bool(os.environ.get("CI"))
)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("default")

FENCE = 64  # elements on each side: one cache line of any element type, or more
_BITS = {4: (np.uint32, 0x7FC0_BEEF), 8: (np.uint64, 0x7FF8_0000_0000_BEEF)}


class FencedArrays:
    """Hands out NaN-filled arrays between two fences, and checks the fences afterwards.

    The fences are NaN with a payload of their own: reading past an edge poisons the result, writing
    past an edge changes the bits, even when what is written is NaN.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[np.ndarray, tuple[int, ...]]] = []

    def poisoned(
        self,
        shape: tuple[int, ...],
        dtype: np.typing.DTypeLike = np.float32,
        layout: str = "contiguous",
    ) -> np.ndarray:
        """An array `shape` (N, C, ...) of NaN, in memory `contiguous` or `channels_last*` order."""
        size = int(np.prod(shape))
        unsigned, fence = _BITS[np.dtype(dtype).itemsize]
        bits = np.full(size + 2 * FENCE, fence, unsigned)
        self._buffers.append((bits, shape))
        inner = bits.view(dtype)[FENCE : FENCE + size]
        inner[...] = np.nan
        if layout == "contiguous":
            return inner.reshape(shape)
        if not layout.startswith("channels_last"):
            raise ValueError(f"layout {layout!r}: expected 'contiguous' or 'channels_last...'")
        in_memory = (shape[0], *shape[2:], shape[1])  # (N, ..., C)
        return np.moveaxis(inner.reshape(in_memory), -1, 1)

    def check(self) -> None:
        """Raise AssertionError if any element of any fence has changed."""
        for bits, shape in self._buffers:
            fence = _BITS[bits.itemsize][1]
            before, after = bits[:FENCE], bits[-FENCE:]
            assert (before == fence).all(), f"written before the start of an array {shape}"
            assert (after == fence).all(), f"written past the end of an array {shape}"


@pytest.fixture
def fenced() -> Iterator[FencedArrays]:
    """`fenced.poisoned(shape, dtype, layout)`: NaN-filled; the fences are checked on teardown."""
    arrays = FencedArrays()
    yield arrays
    arrays.check()
