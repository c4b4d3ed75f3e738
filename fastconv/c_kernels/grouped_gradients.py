"""The weight gradient of grouped convolution with few channels per group; input channels in lanes.

The input gradient is a convolution of gy again, which the forward kernels serve.
"""

from __future__ import annotations

from ..errors import UnsupportedError
from ..geometry import Geometry
from . import launch
from .gradients import weight_gradient, workspace_size

__all__ = ["input_gradient", "supports", "weight_gradient", "workspace_size"]

MOST_CHANNELS = 32  # per group; matrix products are faster where there are more


def supports(geometry: Geometry, dtype: str) -> str | None:
    """None, or the reason against."""
    if geometry.groups == 1:
        return "one group: a matrix product is faster"
    most = max(geometry.in_channels, geometry.out_channels) // geometry.groups
    if most > MOST_CHANNELS:
        return f"{most} channels per group are more than {MOST_CHANNELS}"
    return launch.refuse_dtype(dtype)


def input_gradient(plan, gy, w, gx, workspace) -> None:
    """Raise UnsupportedError."""
    raise UnsupportedError("the input gradient of a grouped convolution is a convolution of gy")
