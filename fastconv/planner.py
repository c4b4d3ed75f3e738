"""From a geometry to a Plan: candidates are priced, or refused with a reason; the cheapest runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import inf, prod, sqrt
from typing import Any

from . import backends, costs
from .epilogue import Epilogue
from .errors import BackendError, UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .layouts import CHANNELS_LAST, is_tensor, layout_of
from .plan import Plan
from .transforms import amplification, transform

ALGORITHMS = ("auto", "direct", "winograd", "depthwise", "grouped")
DEFAULT_TOLERANCE = 4.0
# The definition is never chosen for speed; it runs where it is asked for.
AUTO_BACKENDS = ("c", "triton", "numba", "torch")
MAX_TAPS = 7  # longest filter with a table of default points
TILES = (1, 2, 4, 6)
MAX_POINTS = 216  # alpha values per tile over all axes: 6 x 6 x 6


@dataclass(frozen=True)
class Candidate:
    """A plan with its estimated time, or with the reason why it cannot or should not run."""

    plan: Plan
    estimate_ms: float = inf
    reason: str | None = None


def plan(
    geometry: Geometry | SeparableGeometry,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    epilogue: Epilogue | tuple[Epilogue, Epilogue, Epilogue] | None = None,
    layout: str = CHANNELS_LAST,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = DEFAULT_TOLERANCE,
    tile: tuple[int, ...] | None = None,
    continual: bool = False,
) -> Plan:
    """The plan that would run.

    algorithm  'auto', 'direct' (no fast algorithm), or a family: 'winograd', 'depthwise', 'grouped'
    backend    'auto' or a name from `fastconv.backends.BACKENDS`
    tolerance  largest error allowed, as a multiple of that of a direct sum in the same precision
    tile       m per axis for winograd (and hfa: time, height, width); None lets the planner choose
    continual  the geometry is the window of one output column of a stream

    Raises UnsupportedError with the reason if the request cannot be met, BackendError if the
    backend is not available.
    """
    found = candidates(
        geometry,
        dtype,
        device,
        epilogue,
        layout,
        algorithm,
        backend,
        float(tolerance),
        tile,
        continual,
    )
    best = min(found, key=lambda c: c.estimate_ms, default=None)
    if best is None or best.reason is not None:
        reasons = "; ".join(
            dict.fromkeys(f"{c.plan.backend} {c.plan.family}: {c.reason}" for c in found)
        )
        raise UnsupportedError(
            f"no plan for algorithm {algorithm!r} on backend {backend!r}: {reasons}"
        )
    return best.plan


@lru_cache(maxsize=4096)
def candidates(
    geometry: Geometry | SeparableGeometry,
    dtype: str = "float32",
    device: str = "cpu",
    epilogue: Epilogue | tuple[Epilogue, Epilogue, Epilogue] | None = None,
    layout: str = CHANNELS_LAST,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = DEFAULT_TOLERANCE,
    tile: tuple[int, ...] | None = None,
    continual: bool = False,
) -> tuple[Candidate, ...]:
    """All plans considered, the cheapest first and the refused last; arguments as for `plan`."""
    if epilogue is None:
        block = isinstance(geometry, SeparableGeometry)
        epilogue = (Epilogue(), Epilogue(), Epilogue()) if block else Epilogue()
    found = []
    for name in _backends(backend, device):
        for family in _families(geometry, algorithm, continual):
            base = Plan(family, name, geometry, dtype, epilogue, layout, device)
            reason = backends.kernel(family, name).supports(geometry, dtype, epilogue)
            if reason is not None:
                found.append(Candidate(base, reason=reason))
                continue
            variants = [_priced(p, tolerance) for p in _variants(base, tile)]
            found.extend(variants or [Candidate(base, reason="no tile fits taps and output")])
    return tuple(sorted(found, key=lambda c: c.estimate_ms))


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
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = DEFAULT_TOLERANCE,
    activation: str = "none",
    dtype: str | None = None,
    device: str | None = None,
    layout: str | None = None,
) -> str:
    """The text that `explain` prints, one line per candidate.

    dtype, device, layout: of the input where it is an array; for a shape float32, cpu, channels
        last, unless given
    """
    x_shape, w_shape = (tuple(getattr(a, "shape", a)) for a in (input, weight))
    geometry = Geometry.of(x_shape, w_shape, stride, padding, dilation, groups)
    dtype = dtype or str(getattr(input, "dtype", "float32")).removeprefix("torch.")
    if device is None:
        device = input.device.type if is_tensor(input) else "cpu"
    if layout is None:
        layout = layout_of(input) if hasattr(input, "dtype") else CHANNELS_LAST
    found = candidates(
        geometry,
        dtype,
        device,
        Epilogue(activation=activation),
        layout,
        algorithm,
        backend,
        float(tolerance),
    )
    header = ("", "backend", "algorithm", "multiplications", "estimate", "why not")
    rows: list[tuple[str, ...]] = [header]
    rows += [_row(c, chosen=i == 0 and c.reason is None) for i, c in enumerate(found)]
    for name, reason in backends.available().items():
        if reason is not None and backend == "auto":
            rows.append(("", name, "", "", "", reason))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(r, widths, strict=False)), r[5]]).rstrip()
        for r in rows
    ]
    title = f"conv{geometry.n}d {x_shape} * {w_shape} -> {geometry.y_shape}, {dtype}, {layout}"
    return "\n".join([title, *lines])


def _row(candidate: Candidate, chosen: bool) -> tuple[str, ...]:
    p = candidate.plan
    if candidate.estimate_ms == inf:
        return ("", p.backend, p.algorithm, "", "", candidate.reason or "")
    why = candidate.reason or ("" if chosen else "slower by estimate")
    numbers = (f"{costs.multiplications(p):,}", f"{candidate.estimate_ms:.3f} ms")
    return (">" if chosen else "", p.backend, p.algorithm, *numbers, why)


def _backends(backend: str, device: str) -> list[str]:
    if backend != "auto":
        backends.check(backend)
        return [backend]
    usable = backends.available()
    names = [name for name in AUTO_BACKENDS if usable[name] is None]
    if device != "cpu":
        names = [name for name in names if name in ("triton", "torch")]
        if not names:
            raise BackendError(f"no backend available for device {device!r}")
    return names or ["reference"]


def _families(geometry: Geometry | SeparableGeometry, algorithm: str, continual: bool) -> list[str]:
    if algorithm not in ALGORITHMS:
        raise UnsupportedError(f"unknown algorithm {algorithm!r}. Known: {', '.join(ALGORITHMS)}")
    if continual:
        return ["continual"]
    if isinstance(geometry, SeparableGeometry):
        return ["hfa"]
    direct = "depthwise" if geometry.is_depthwise and geometry.groups > 1 else "grouped"
    if algorithm == "direct":
        return [direct]
    if algorithm == "auto":
        return [direct, "winograd"]
    return [algorithm]


def _variants(base: Plan, tile: tuple[int, ...] | None) -> Iterator[Plan]:
    """The plan once per choice of transforms; as it is for direct families."""
    if base.family == "winograd":
        assert isinstance(base.geometry, Geometry)
        taps = [-(-k // s) for k, s in zip(base.geometry.kernel, base.geometry.stride, strict=True)]
        sizes = base.geometry.out_size
    elif base.family == "hfa":
        assert isinstance(base.geometry, SeparableGeometry)
        t, d, _ = base.geometry.stages
        strides = (t.stride[0], *d.stride[1:])
        taps = [-(-k // s) for k, s in zip((t.kernel[0], *d.kernel[1:]), strides, strict=True)]
        sizes = (t.out_size[0], *d.out_size[1:])
    else:
        yield base
        return
    for ms in [tile] if tile is not None else _tiles(base.family, taps, sizes):
        if len(ms) != len(taps):
            raise UnsupportedError(f"tile must have {len(taps)} entries, got {tuple(ms)}")
        yield replace(base, transforms=tuple(map(transform, ms, taps)))


def _tiles(family: str, taps: list[int], sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Tile sizes worth a price: 1 on axes of one tap, below twice the output, square in space, and
    for winograd not all 1.
    """
    options: list[tuple[int, ...]] = []
    for r, size in zip(taps, sizes, strict=True):
        fast = 1 < r <= MAX_TAPS
        options.append(tuple(m for m in TILES if m == 1 or (fast and m < 2 * size)))
    if family == "hfa":
        # Depthwise is a small share of a block's multiplications; direct costs least memory.
        options = [options[0], (1,), (1,)]
    square = len(taps) > 1 and taps[-1] == taps[-2]
    for ms in product(*options):
        if square and ms[-1] != ms[-2]:
            continue
        points = prod(m + r - 1 for m, r in zip(ms, taps, strict=True))
        if points <= MAX_POINTS and (family == "hfa" or max(ms) > 1):
            yield ms


def _priced(p: Plan, tolerance: float) -> Candidate:
    factor = error_factor(p)
    if factor > tolerance:
        return Candidate(
            p,
            reason=f"error up to {factor:.1f} times direct exceeds the tolerance of {tolerance:g}",
        )
    return Candidate(p, costs.estimate_ms(p))


def error_factor(p: Plan) -> float:
    """Expected rms error of a plan as a multiple of that of a direct sum in the same precision.

    A running sum of n random products has relative error d sqrt(n / 2), d the rounding unit.
    Winograd sums only C products per point, rounds both operands and its transforms (about 4 units
    of variance together), and amplifies all of it by the factor of its transforms. Transformed axes
    therefore shorten the sum that they amplify.
    """
    if not p.transforms or max(p.tile) == 1:
        return 1.0
    first = p.geometry.temporal if isinstance(p.geometry, SeparableGeometry) else p.geometry
    channels = first.in_channels * prod(first.stride)
    direct = first.in_channels * first.taps / 2 + 1
    return amplification(p.transforms) * sqrt((channels / 2 + 4) / direct)
