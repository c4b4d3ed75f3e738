"""Depthwise convolution: PyTorch's own choice for as many groups as input channels."""

from __future__ import annotations

from ..epilogue import Epilogue
from ..geometry import Geometry
from . import arrays
from .grouped import CONFIGS, prepack, run, workspace_size

__all__ = ["CONFIGS", "prepack", "run", "supports", "workspace_size"]


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if not geometry.is_depthwise:
        return f"not depthwise: {geometry.groups} groups for {geometry.in_channels} input channels"
    return arrays.refuse_dtype(dtype)
