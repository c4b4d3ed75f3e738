"""From a geometry to a Plan: candidates are measured, priced, or refused with a reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import inf, prod, sqrt
from typing import Any

from . import backends, costs, winners
from .counts import ELEMENT_BYTES
from .epilogue import Epilogue
from .errors import BackendError, UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .layouts import CHANNELS_LAST
from .plan import DEFAULT_TOLERANCE, Plan, Request
from .transforms import amplification, transform

ALGORITHMS = ("auto", "direct", "winograd", "depthwise", "grouped")
# The definition is never chosen for speed; it runs where it is asked for.
AUTO_BACKENDS = ("c", "triton", "numba", "torch")
MAX_TAPS = 7  # longest filter with a table of default points
TILES = (1, 2, 4, 6)
MAX_POINTS = 216  # alpha values per tile over all axes: 6 x 6 x 6
# What an estimate has to be better than PyTorch's: where they are close, the known quantity runs.
MARGIN = 1.1


@dataclass(frozen=True)
class Candidate:
    """A plan with its time, measured or estimated, or with the reason why it does not run.

    measured_ms  from `tune`, None if it never raced in the circumstances of the request
    given_up     the race went on without it: measured_ms is rough, and far from the best
    """

    plan: Plan
    estimate_ms: float = inf
    reason: str | None = None
    measured_ms: float | None = None
    given_up: bool = False


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
    max_workspace_bytes: int | None = None,
    precision: str = "ieee",
) -> Plan:
    """The plan that would run: the fastest as `tune` measured it, else by estimate.

    algorithm  'auto', 'direct' (no fast algorithm), or a family: 'winograd', 'depthwise', 'grouped'
    backend    'auto' or a name from `fastconv.backends.BACKENDS`
    tolerance  largest error allowed, as a multiple of that of a direct sum in the same precision
    tile       m per axis for winograd (and hfa: time, height, width); None lets the planner choose.
               The first is 1 for a stream
    continual  the geometry is the window of one output column of a stream
    max_workspace_bytes  most scratch memory that our kernels may ask for; PyTorch's own convolution
               allocates what it likes
    precision  'ieee', or 'tf32' where float32 products on a GPU may be rounded to TF32 first

    Raises UnsupportedError with the reason if the request cannot be met, BackendError if the
    backend is not available.
    """
    return _plan(
        winners.situation(),
        geometry,
        dtype=dtype,
        device=device,
        epilogue=epilogue,
        layout=layout,
        algorithm=algorithm,
        backend=backend,
        tolerance=tolerance,
        tile=tile,
        continual=continual,
        max_workspace_bytes=max_workspace_bytes,
        precision=precision,
    )


@lru_cache(maxsize=4096)
def _plan(situation: Any, geometry: Geometry | SeparableGeometry, **options: Any) -> Plan:
    """`plan` in a situation of `winners`, which only keys the cache."""
    return plan_of(Request.of(geometry, **options))


def plan_of(request: Request) -> Plan:
    """`plan` of a Request."""
    found = _ranked(request, winners.situation())
    if not found or found[0].reason is not None:
        reasons = "; ".join(
            dict.fromkeys(f"{c.plan.backend} {c.plan.family}: {c.reason}" for c in found)
        )
        raise UnsupportedError(
            f"no plan for algorithm {request.algorithm!r} on backend {request.backend!r}: {reasons}"
        )
    return found[0].plan


def candidates(geometry: Geometry | SeparableGeometry, **options: Any) -> tuple[Candidate, ...]:
    """All plans considered, the one that runs first and the refused last; options as for `plan`."""
    return _ranked(Request.of(geometry, **options), winners.situation())


@lru_cache(maxsize=4096)
def _ranked(request: Request, situation: Any) -> tuple[Candidate, ...]:
    """`candidates` in a situation of `winners`, which only keys the cache."""
    return _by_measurement(request, priced(request))


def priced(request: Request) -> list[Candidate]:
    """All plans with their default configuration, the cheapest by estimate first."""
    found = []
    for name in _backends(request.backend, request.device):
        for family in _families(request.geometry, request.algorithm, request.continual):
            base = Plan(
                family,
                name,
                request.geometry,
                request.dtype,
                request.epilogue,
                request.layout,
                request.device,
                precision=request.precision,
            )
            reason = backends.kernel(family, name).supports(
                request.geometry, request.dtype, request.epilogue
            )
            if reason is not None:
                found.append(Candidate(base, reason=reason))
                continue
            variants = [_priced(p, request) for p in _variants(base, request)]
            reason = "has no tiles" if name == "torch" else "no tile fits taps and output"
            found.extend(variants or [Candidate(base, reason=reason)])
    return sorted(found, key=_rank)


def _rank(candidate: Candidate) -> float:
    return candidate.estimate_ms * (1.0 if candidate.plan.backend == "torch" else MARGIN)


def _by_measurement(request: Request, found: list[Candidate]) -> tuple[Candidate, ...]:
    """The candidates with their measured times; a plan that won its race, if any, in front."""
    record = winners.find(request)
    exact = record is not None
    if record is None and request != request.unrestricted:
        record = winners.find(request.unrestricted)
    if record is None:
        return tuple(found)
    timed: list[Candidate] = []
    for c in found:
        for p in [c.plan] if c.reason else configurations(c.plan, request.max_workspace_bytes):
            name = winners.label(p)
            ms = record.ms.get(name, record.given_up.get(name))
            given_up = name not in record.ms
            # A configuration that did not race has no price of its own.
            if p is c.plan or ms is not None:
                timed.append(replace(c, plan=p, measured_ms=ms, given_up=given_up))
    finished = {
        winners.label(c.plan): c
        for c in timed
        if c.measured_ms is not None and not c.given_up and c.reason is None
    }
    # The best of all is also the best of those that a restriction leaves; so is whoever comes next.
    first = next((name for name in (record.winner, *record.ms) if name in finished), None)
    if first is None or (exact and first != record.winner):
        if exact:
            warnings.warn(
                f"fastconv ignores a tuning result: {record.winner!r} cannot run "
                f"{winners.key(request)} any more (tune again)",
                stacklevel=2,
            )
        return tuple(found)

    def order(c: Candidate) -> tuple[bool, bool, bool, float]:
        measured = c.measured_ms is not None
        ms = c.measured_ms if c.measured_ms is not None else _rank(c)
        return c is not finished[first], c.reason is not None, not measured or c.given_up, ms

    return tuple(sorted(timed, key=order))


def configurations(p: Plan, max_workspace_bytes: int | None = None) -> Iterator[Plan]:
    """The plan, then the same with each other entry of its module's CONFIGS."""
    yield p
    for config in backends.kernel(p.family, p.backend).CONFIGS:
        other = replace(p, config=tuple(sorted(config.items())))
        if other.config == p.config or _refused(other) is not None:
            continue
        if _over(other, max_workspace_bytes) is None:
            yield other


def _backends(backend: str, device: str) -> list[str]:
    if backend != "auto":
        backends.check(backend)
        allowed = backends.devices(backend)
        if device not in allowed:
            raise BackendError(
                f"backend {backend!r} computes on {' and '.join(allowed)}, "
                f"but the arrays are on device {device!r}"
            )
        return [backend]
    # Triton's interpreter is for tests: it is never the fastest.
    names = [
        name
        for name in AUTO_BACKENDS
        if device in backends.devices(name)
        and not (name == "triton" and device == "cpu")
        and backends.why_not(name) is None
    ]
    if not names and device != "cpu":
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


def _variants(base: Plan, request: Request) -> Iterator[Plan]:
    """The plan once per choice of transforms; as it is for direct families."""
    tile, grouped = request.tile, False
    if base.family in ("winograd", "continual"):
        assert isinstance(base.geometry, Geometry)
        taps = [-(-k // s) for k, s in zip(base.geometry.kernel, base.geometry.stride, strict=True)]
        sizes, grouped = base.geometry.out_size, base.geometry.groups > 1
    elif base.family == "hfa":
        assert isinstance(base.geometry, SeparableGeometry)
        t, d, _ = base.geometry.stages
        strides = (t.stride[0], *d.stride[1:])
        taps = [-(-k // s) for k, s in zip((t.kernel[0], *d.kernel[1:]), strides, strict=True)]
        sizes = (t.out_size[0], *d.out_size[1:])
    else:
        yield base
        return
    if base.family == "continual":
        if request.algorithm != "winograd":
            yield base
        # Who says which transforms it refuses takes some.
        takes = hasattr(backends.kernel(base.family, base.backend), "refuses")
        if not takes or request.algorithm not in ("auto", "winograd") or grouped:
            return
    if base.backend == "torch":  # which has no transforms: the block is three convolutions
        choices = [(1,) * len(taps)] if tile is None or max(tile) == 1 else []
    else:
        choices = [tile] if tile is not None else list(_tiles(base.family, taps, sizes, grouped))
    for ms in choices:
        if len(ms) != len(taps):
            raise UnsupportedError(f"tile must have {len(taps)} entries, got {tuple(ms)}")
        yield replace(base, transforms=tuple(map(transform, ms, taps)))


def _tiles(
    family: str, taps: list[int], sizes: tuple[int, ...], grouped: bool = False
) -> Iterator[tuple[int, ...]]:
    """Tile sizes worth a price: 1 on axes of one tap and in the time of streams, below twice the
    output, square in space, and but for hfa not all 1; with several groups 1 on the last axis,
    which kernels sum directly, and not 6, which is as fast as 4 and less accurate.
    """
    options: list[tuple[int, ...]] = []
    for r, size in zip(taps, sizes, strict=True):
        fast = 1 < r <= MAX_TAPS
        options.append(tuple(m for m in TILES if m == 1 or (fast and m < 2 * size)))
    if family == "hfa":
        # Depthwise is a small share of a block's multiplications; direct costs least memory.
        options = [options[0], (1,), (1,)]
    elif family == "continual":
        options[0] = (1,)
    if grouped:
        options = [*(tuple(m for m in ms if m < 6) for ms in options[:-1]), (1,)]
    square = len(taps) > 1 and taps[-1] == taps[-2] and not grouped
    for ms in product(*options):
        if square and ms[-1] != ms[-2]:
            continue
        points = prod(m + r - 1 for m, r in zip(ms, taps, strict=True))
        if points <= MAX_POINTS and (family == "hfa" or max(ms) > 1):
            yield ms


def _priced(p: Plan, request: Request) -> Candidate:
    factor, limit = error_factor(p), request.max_workspace_bytes
    if factor > request.tolerance:
        return Candidate(
            p,
            reason=f"error up to {factor:.1f} times direct exceeds the tolerance of "
            f"{request.tolerance:g}",
        )
    reason = _refused(p)
    if reason is not None:
        return Candidate(p, reason=reason)
    reason = _over(p, limit)
    if reason is not None:
        # Another configuration may need less: the first one behind p that fits.
        fitting = next((other for other in configurations(p, limit) if other is not p), None)
        if fitting is None:
            return Candidate(p, reason=reason)
        p = fitting
    return Candidate(p, costs.estimate_ms(p))


def _refused(p: Plan) -> str | None:
    """None, or the reason against a tile or a configuration that others run, as kernels whose
    transforms are compiled beforehand have it."""
    refuses = getattr(backends.kernel(p.family, p.backend), "refuses", None)
    return refuses(p) if refuses else None


def _over(p: Plan, limit: int | None) -> str | None:
    """None, or that the plan's workspace is larger than the limit."""
    if limit is None:
        return None
    elements = backends.kernel(p.family, p.backend).workspace_size(p)
    size = elements * ELEMENT_BYTES[p.dtype]
    return None if size <= limit else f"needs {size:,} bytes of workspace, allowed are {limit:,}"


def error_factor(p: Plan) -> float:
    """Expected rms error of a plan as a multiple of that of a direct sum in the same precision.

    A running sum of n random products has relative error d sqrt(n / 2), d the rounding unit.
    Winograd sums only C products per point, rounds both operands and its transforms (about 4 units
    of variance together), and amplifies all of it by the factor of its transforms. Transformed axes
    therefore shorten the sum that they amplify; where m is 1 the C backend sums the taps with the
    channels.

    Where operands are shorter than the float32 of the sums, their roundings are all that counts:
    two under TF32, as in a direct sum; in half precision those of both transformed operands and of
    the result, against that of the result alone.
    """
    if not p.transforms or max(p.tile) == 1:
        return 1.0
    if p.dtype in ("float16", "bfloat16"):
        return amplification(p.transforms) * sqrt(3)
    if p.precision == "tf32":
        return amplification(p.transforms)
    first = p.geometry.temporal if isinstance(p.geometry, SeparableGeometry) else p.geometry
    each = first.in_channels // first.groups
    channels = each * prod(first.stride)
    if p.backend == "c" and p.family != "hfa":
        channels *= prod(t.r for t in p.transforms if t.m == 1)
    direct = each * first.taps / 2 + 1
    return amplification(p.transforms) * sqrt((channels / 2 + 4) / direct)
