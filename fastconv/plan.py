"""The question and the decision: what is to be computed, by which family and backend, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .epilogue import Epilogue
from .errors import UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .layouts import CHANNELS_LAST, CONTIGUOUS, LAYOUTS
from .transforms import Transform

__all__ = ["CHANNELS_LAST", "CONTIGUOUS", "DEFAULT_TOLERANCE", "LAYOUTS", "Plan", "Request"]

DEFAULT_TOLERANCE = 4.0
PRECISIONS = ("ieee", "tf32")


@dataclass(frozen=True)
class Plan:
    """Everything a kernel module needs besides the arrays; hashable, so that it keys caches.

    geometry    what is convolved: for `continual` the window that one output column reads, without
                temporal padding, for `hfa` a SeparableGeometry
    epilogue    one Epilogue; for `hfa` one per stage
    layout      memory layout of x, residual, state and y
    transforms  F(m, r): for `winograd` one per axis of the geometry; for `continual` the same, with
                m = 1 in time, or empty; for `hfa` (temporal, height, width); else empty
    config      the tuning choice, an entry of the module's CONFIGS; of `continual` also what the
                state is: sum (columns that are not complete), replicate (the first frame in front)
    precision   of float32 products: 'ieee', or 'tf32' on a GPU whose user allows it
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
    precision: str = "ieee"

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


@dataclass(frozen=True)
class Request:
    """What a Plan is asked for: a convolution with its arrays, and what may serve it.

    Fields as `fastconv.plan` describes them; build it with `Request.of`.
    """

    geometry: Geometry | SeparableGeometry
    dtype: str = "float32"
    device: str = "cpu"
    epilogue: Epilogue | tuple[Epilogue, Epilogue, Epilogue] = Epilogue()
    layout: str = CHANNELS_LAST
    algorithm: str = "auto"
    backend: str = "auto"
    tolerance: float = DEFAULT_TOLERANCE
    tile: tuple[int, ...] | None = None
    continual: bool = False
    max_workspace_bytes: int | None = None
    precision: str = "ieee"

    @classmethod
    def of(
        cls,
        geometry: Geometry | SeparableGeometry,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        epilogue: Epilogue | tuple[Epilogue, Epilogue, Epilogue] | None = None,
        layout: str = CHANNELS_LAST,
        algorithm: str = "auto",
        backend: str = "auto",
        tolerance: float = DEFAULT_TOLERANCE,
        tile: Sequence[int] | None = None,
        continual: bool = False,
        max_workspace_bytes: int | None = None,
        precision: str = "ieee",
    ) -> Request:
        """The request with numbers in one form, and without an epilogue the plain one.

        Raises UnsupportedError for a limit of the workspace below 0 and an unknown precision.
        """
        if epilogue is None:
            block = isinstance(geometry, SeparableGeometry)
            epilogue = (Epilogue(), Epilogue(), Epilogue()) if block else Epilogue()
        if max_workspace_bytes is not None and max_workspace_bytes < 0:
            raise UnsupportedError(
                f"max_workspace_bytes must be None or at least 0, got {max_workspace_bytes}"
            )
        if precision not in PRECISIONS:
            raise UnsupportedError(
                f"unknown precision {precision!r}. Known: {', '.join(PRECISIONS)}"
            )
        return cls(
            geometry,
            dtype,
            device,
            epilogue,
            layout,
            algorithm,
            backend,
            float(tolerance),
            None if tile is None else tuple(tile),
            continual,
            max_workspace_bytes,
            precision,
        )

    @property
    def unrestricted(self) -> Request:
        """The same convolution and tolerance, served by any algorithm, backend and tile."""
        return replace(self, algorithm="auto", backend="auto", tile=None, max_workspace_bytes=None)
