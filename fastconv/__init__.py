"""Fast 1D, 2D and 3D convolutions for video networks."""

from __future__ import annotations

__version__ = "0.1.0"
