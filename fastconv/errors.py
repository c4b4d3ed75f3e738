"""The three ways a call can fail: a wrong shape, a right shape nobody serves, a missing part."""

from __future__ import annotations


class GeometryError(ValueError):
    """Shapes, strides, paddings, dilations or groups that do not describe a convolution."""


class UnsupportedError(NotImplementedError):
    """A valid request that the chosen algorithm, backend or precision does not serve."""


class BackendError(RuntimeError):
    """A backend or optional package that is not available here; the message says how to get it."""
