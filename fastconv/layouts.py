"""Memory layouts of arrays (N, C, *size), by PyTorch's names."""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import numpy as np

CONTIGUOUS = "contiguous"  # NCTHW
CHANNELS_LAST = "channels_last_3d"  # NTHWC; the same name is used for 1 and 2 axes
LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)

Array = Any  # np.ndarray or torch.Tensor


def is_tensor(array: Any) -> bool:
    """Whether this is a PyTorch tensor, without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def dense_layout(array: Array) -> str | None:
    """The layout an array (N, C, *size) is dense in, contiguous if in both; None if it has gaps."""
    size = array.shape[2:]
    if is_tensor(array):
        plain, last = array.is_contiguous(), array.movedim(1, -1).is_contiguous()
    else:
        plain = array.flags.c_contiguous
        last = np.moveaxis(array, 1, -1).flags.c_contiguous
    if plain and last and prod(size) == 1:
        return CHANNELS_LAST  # both orders are the same memory
    return CONTIGUOUS if plain else CHANNELS_LAST if last else None


def layout_of(array: Array) -> str:
    """The layout to compute in: the array's own, or contiguous for a view with gaps."""
    return dense_layout(array) or CONTIGUOUS
