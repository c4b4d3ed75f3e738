"""Drop-in torch modules and the rewriting of whole models; everything here needs PyTorch."""

from __future__ import annotations

from fastconv.errors import BackendError

try:
    import torch as _torch  # noqa: F401  (asked for here so that its absence is told once, clearly)
except ImportError as error:
    raise BackendError(
        "fastconv.nn needs PyTorch, which is not installed: pip install 'fastconv[torch]'"
    ) from error

from .continual import (
    Concat,
    ContinualAvgPool1d,
    ContinualAvgPool2d,
    ContinualAvgPool3d,
    ContinualConv1d,
    ContinualConv2d,
    ContinualConv3d,
    ContinualGRU,
    ContinualLSTM,
    ContinualMaxPool1d,
    ContinualMaxPool2d,
    ContinualMaxPool3d,
    Delay,
    GlobalPool,
    Residual,
    Sequential,
    SqueezeExcite,
)
from .continual_network import Continual, Step
from .conv import Conv1d, Conv2d, Conv3d
from .rewrite import Report, accelerate
from .separable import SeparableBlock
from .to_continual import to_continual
from .trace import Layer, trace

__all__ = [
    "Concat",
    "Continual",
    "ContinualAvgPool1d",
    "ContinualAvgPool2d",
    "ContinualAvgPool3d",
    "ContinualConv1d",
    "ContinualConv2d",
    "ContinualConv3d",
    "ContinualGRU",
    "ContinualLSTM",
    "ContinualMaxPool1d",
    "ContinualMaxPool2d",
    "ContinualMaxPool3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Delay",
    "GlobalPool",
    "Layer",
    "Report",
    "Residual",
    "SeparableBlock",
    "Sequential",
    "SqueezeExcite",
    "Step",
    "accelerate",
    "to_continual",
    "trace",
]
