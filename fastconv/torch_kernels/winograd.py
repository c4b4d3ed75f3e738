"""Fast convolution on request: PyTorch offers none, so every plan is refused with that reason."""

from __future__ import annotations

from typing import Any

from ..epilogue import Epilogue
from ..errors import UnsupportedError
from ..geometry import Geometry
from ..plan import Plan

CONFIGS: tuple[dict[str, int], ...] = ({},)
REASON = "PyTorch has no Winograd convolution to choose; it picks its own algorithm"


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """The reason against, always."""
    return REASON


def prepack(weights: Any, plan: Plan) -> Any:
    """Raise UnsupportedError."""
    raise UnsupportedError(REASON)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch."""
    return 0


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Raise UnsupportedError."""
    raise UnsupportedError(REASON)
