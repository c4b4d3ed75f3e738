"""Fast 1D, 2D and 3D convolutions for video networks.

Importing this package imports NumPy and nothing else; each name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastconv import nn as nn
    from fastconv import zoo as zoo
    from fastconv.continual import continual_state as continual_state
    from fastconv.continual import continual_step as continual_step
    from fastconv.continual import continual_step_functional as continual_step_functional
    from fastconv.continual import continual_steps as continual_steps
    from fastconv.counts import count as count
    from fastconv.epilogue import Epilogue as Epilogue
    from fastconv.errors import BackendError as BackendError
    from fastconv.errors import GeometryError as GeometryError
    from fastconv.errors import UnsupportedError as UnsupportedError
    from fastconv.explanation import explain as explain
    from fastconv.geometry import Geometry as Geometry
    from fastconv.geometry import SeparableGeometry as SeparableGeometry
    from fastconv.nn.rewrite import accelerate as accelerate
    from fastconv.nn.to_continual import to_continual as to_continual
    from fastconv.ops import conv1d as conv1d
    from fastconv.ops import conv2d as conv2d
    from fastconv.ops import conv3d as conv3d
    from fastconv.ops import separable_block as separable_block
    from fastconv.planner import plan as plan
    from fastconv.stream import StreamPool as StreamPool
    from fastconv.transforms import Transform as Transform
    from fastconv.transforms import transform as transform
else:
    # The function `plan` and the module `fastconv.plan` share a name, and loading a submodule binds
    # it here. Load it now and unbind it: the name then means the function, always.
    import fastconv.plan

    del fastconv, plan

_NUMPY_ALONE = {
    "conv1d": "ops",
    "conv2d": "ops",
    "conv3d": "ops",
    "separable_block": "ops",
    "continual_step": "continual",
    "continual_step_functional": "continual",
    "continual_steps": "continual",
    "continual_state": "continual",
    "explain": "explanation",
    "plan": "planner",
    "tune": "autotune",
    "count": "counts",
    "Geometry": "geometry",
    "SeparableGeometry": "geometry",
    "Epilogue": "epilogue",
    "Transform": "transforms",
    "transform": "transforms",
    "GeometryError": "errors",
    "UnsupportedError": "errors",
    "BackendError": "errors",
}
_HOMES = {
    **_NUMPY_ALONE,
    "accelerate": "nn.rewrite",
    "to_continual": "nn.to_continual",
    "StreamPool": "stream",
}
_SUBPACKAGES = ("nn", "zoo")

__all__ = ["__version__", *_NUMPY_ALONE]  # a star import must not ask for PyTorch


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastconv.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastconv' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastconv.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBPACKAGES})
