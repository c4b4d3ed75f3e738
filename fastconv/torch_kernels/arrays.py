"""NumPy arrays as tensors without a copy, and the memory format a layout asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..plan import CHANNELS_LAST, Plan

DTYPES = ("float16", "bfloat16", "float32", "float64")


def refuse_dtype(dtype: str) -> str | None:
    """The reason against a dtype, or None."""
    return None if dtype in DTYPES else f"dtype {dtype} is not one of {', '.join(DTYPES)}"


def written(array: Any) -> torch.Tensor:
    """The tensor of an array that the caller will see changed: never a copy."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def read(array: Any) -> torch.Tensor:
    """The tensor of an array that is only read.

    Copied if it is read-only or has negative strides, which tensors cannot have.
    """
    if isinstance(array, np.ndarray) and (
        not array.flags.writeable or min(array.strides, default=0) < 0
    ):
        array = array.copy(order="K")
    return written(array)


def packed_weight(weights: Any, plan: Plan, lead: int = 0) -> torch.Tensor:
    """A copy of w (K, C / G, *kernel) on the plan's device, in its dtype and memory format.

    lead: axes of size 1 to put in front of the kernel's
    """
    w = read(weights).detach()
    w = w.reshape(*w.shape[:2], *(1,) * lead, *w.shape[2:])
    channels_last = torch.channels_last if w.ndim == 4 else torch.channels_last_3d
    memory_format = channels_last if plan.layout == CHANNELS_LAST else torch.contiguous_format
    return w.to(plan.device, getattr(torch, plan.dtype)).clone(memory_format=memory_format)
