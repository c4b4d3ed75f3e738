"""Why a convolution runs the plan that it runs: a table of all candidates."""

from __future__ import annotations

from math import inf
from typing import Any

from . import backends, costs, planner
from .epilogue import Epilogue
from .geometry import Geometry
from .layouts import CHANNELS_LAST, is_tensor, layout_of
from .planner import Candidate


def explain(input: Any, weight: Any, *args: Any, **kwargs: Any) -> None:
    """Print which plan a convolution would run, and for every other candidate why it does not.

    input, weight: arrays, or their shapes; further arguments as for `conv1d`, `conv2d`, `conv3d`
    """
    print(explanation(input, weight, *args, **kwargs))


def explanation(
    input: Any,
    weight: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    bias: bool = False,
    residual: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    layout: str | None = None,
    **options: Any,
) -> str:
    """The text that `explain` prints, one line per candidate.

    bias, residual: whether there is one
    dtype, device, layout: of the input where it is an array; for a shape float32, cpu, channels
        last, unless given
    options: algorithm, backend, tolerance, max_workspace_bytes
    """
    x_shape, w_shape = (tuple(getattr(a, "shape", a)) for a in (input, weight))
    geometry = Geometry.of(x_shape, w_shape, stride, padding, dilation, groups)
    dtype = dtype or str(getattr(input, "dtype", "float32")).removeprefix("torch.")
    if device is None:
        device = input.device.type if is_tensor(input) else "cpu"
    if layout is None:
        layout = layout_of(input) if hasattr(input, "dtype") else CHANNELS_LAST
    found = planner.candidates(
        geometry,
        dtype=dtype,
        device=device,
        epilogue=Epilogue(bool(bias), activation, bool(residual)),
        layout=layout,
        **options,
    )
    rows: list[tuple[str, ...]] = [
        ("", "backend", "algorithm", "multiplications", "estimate", "measured", "why not")
    ]
    rows += [_row(c, found[0]) for c in found]
    for name, reason in backends.available().items():
        if reason is not None and options.get("backend", "auto") == "auto":
            rows.append(("", name, "", "", "", "", reason))
    if all(c.measured_ms is None for c in found):
        rows = [(*row[:5], *row[6:]) for row in rows]
    *widths, _ = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    title = f"conv{geometry.n}d {x_shape} * {w_shape} -> {geometry.y_shape}, {dtype}, {layout}"
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _row(c: Candidate, first: Candidate) -> tuple[str, ...]:
    name = " ".join([c.plan.algorithm, *(f"{key}={value}" for key, value in c.plan.config)])
    if c.estimate_ms == inf:
        return ("", c.plan.backend, name, "", "", "", c.reason or "")
    measured = "" if c.measured_ms is None else f"{c.measured_ms:.3f} ms"
    return (
        ">" if c is first else "",
        c.plan.backend,
        name,
        f"{costs.multiplications(c.plan):,}",
        f"{c.estimate_ms:.3f} ms",
        "~" + measured if c.given_up and measured else measured,
        "" if c is first else _why_not(c, first),
    )


def _why_not(c: Candidate, first: Candidate) -> str:
    if c.measured_ms is None or first.measured_ms is None:
        if c.estimate_ms < first.estimate_ms:  # only PyTorch runs in spite of a better estimate
            return "not clearly faster by estimate"
        return "slower by estimate"
    if c.given_up:
        return "clearly slower"
    return "slower" if c.measured_ms > first.measured_ms else "not clearly faster"
