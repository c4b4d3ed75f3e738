"""Drop-in torch modules and the rewriting of whole models; everything here needs PyTorch."""

from __future__ import annotations

from fastconv.errors import BackendError

try:
    import torch as _torch  # noqa: F401  (asked for here so that its absence is told once, clearly)
except ImportError as error:
    raise BackendError(
        "fastconv.nn needs PyTorch, which is not installed: pip install 'fastconv[torch]'"
    ) from error

from .conv import Conv1d, Conv2d, Conv3d
from .rewrite import Report, accelerate
from .separable import SeparableBlock
from .trace import Layer, trace

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Layer", "Report", "SeparableBlock", "accelerate", "trace"]
