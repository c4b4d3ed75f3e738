"""The decision: which family on which backend computes a geometry, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from .epilogue import Epilogue
from .geometry import Geometry, SeparableGeometry
from .layouts import CHANNELS_LAST, CONTIGUOUS, LAYOUTS
from .transforms import Transform

__all__ = ["CHANNELS_LAST", "CONTIGUOUS", "LAYOUTS", "Plan"]


@dataclass(frozen=True)
class Plan:
    """Everything a kernel module needs besides the arrays; hashable, so that it keys caches.

    geometry    what is convolved: for `continual` the window that one output column reads, without
                temporal padding, for `hfa` a SeparableGeometry
    epilogue    one Epilogue; for `hfa` one per stage
    layout      memory layout of x, residual, state and y
    transforms  F(m, r): for `winograd` one per axis of the geometry, for `hfa` (temporal, height,
                width), else empty
    config      the tuning choice, an entry of the module's CONFIGS
    """

    family: str
    backend: str
    geometry: Geometry | SeparableGeometry
    dtype: str = "float32"
    epilogue: Epilogue | tuple[Epilogue, Epilogue, Epilogue] = Epilogue()
    layout: str = CHANNELS_LAST
    device: str = "cpu"
    transforms: tuple[Transform, ...] = ()
    config: tuple[tuple[str, int], ...] = field(default=())

    @property
    def tile(self) -> tuple[int, ...]:
        """Outputs per tile and axis, m of each F(m, r); empty for direct families."""
        return tuple(t.m for t in self.transforms)

    @property
    def options(self) -> dict[str, int]:
        return dict(self.config)

    @property
    def algorithm(self) -> str:
        """Short name, e.g. 'winograd F(2x4x4, 3x3x3)' or 'depthwise'."""
        if not self.transforms:
            return self.family
        ms, rs = ("x".join(str(getattr(t, a)) for t in self.transforms) for a in "mr")
        return f"{self.family} F({ms}, {rs})"
