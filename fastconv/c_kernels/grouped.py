"""Not written yet: a placeholder of this branch."""

from __future__ import annotations

CONFIGS: tuple[dict[str, int], ...] = ({},)


def supports(geometry, dtype, epilogue) -> str | None:
    return "not written yet"


def prepack(weights, plan):
    raise NotImplementedError


def workspace_size(plan) -> int:
    return 0


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    raise NotImplementedError
