"""The rows of one case: ours and every peer prepared, checked, timed, and what their times mean."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from fastconv import counts
from fastconv.counts import Counts
from fastconv.errors import BackendError, GeometryError, UnsupportedError
from fastconv.timing import Timing, measure

from . import cuda, ours, problems, results
from .baselines import Peer
from .cases import TABLE, Case
from .contenders import Prepared, Settings
from .ours import Choice
from .problems import Problem
from .results import OURS, Row
from .roofline import Roofline

REFUSALS = (UnsupportedError, BackendError, GeometryError)
# The idle threads of other libraries spin on after their work, and a core that slept is slow:
# before a turn of short calls those get time to fall asleep, and untimed calls wake our own.
PAUSE_S, WARM_S, SHORT_MS, BURST = 0.02, 0.005, 20.0, 5
FLUSH_BYTES = 1 << 27  # larger than any cache
# Networks take long and are few, their single layers are many.
NETWORK_SHARE, LAYER_SHARE = 3.0, 0.3
COMPILED = "torch-compile"


def of_case(
    case: Case, peers: Sequence[Peer], choice: Choice, settings: Settings, roofs: Roofline
) -> list[Row]:
    """Ours first, then every peer, each with its times or with the reason why there are none."""
    try:
        problem = problems.make(case)
    except REFUSALS as error:
        return [bare(case, OURS, "unsupported", _line(error))]
    settings = _shared(settings, case)
    rows: list[Row] = []
    ready: dict[str, Prepared] = {}
    makers: dict[str, Callable[[], Prepared]] = {
        OURS: lambda: ours.prepare(problem, choice, settings)
    }
    for peer in peers:
        refusal = _refusal(peer, peers, case, settings)
        if refusal is not None:
            rows.append(bare(case, peer.name, *refusal))
        else:
            makers[peer.name] = lambda peer=peer: peer.prepare(problem, settings)  # type: ignore[misc]
    for who, maker in makers.items():
        row, prepared = _checked(case, who, maker, problem)
        rows.append(row)
        if prepared is not None:
            ready[who] = prepared
    rows.sort(key=lambda row: row["who"] != OURS)
    _time(rows, ready, settings)
    if rows[0]["status"] == "ok":
        rows[0].update(_arithmetic(ready[OURS], roofs, rows[0]["median_ms"], case.dtype))
        best = results.best_peer(rows)
        if best is not None:
            ratio = best["median_ms"] / rows[0]["median_ms"]
            rows[0].update(ratio=ratio, best_peer=best["who"], best_peer_ms=best["median_ms"])
    return rows


def _shared(settings: Settings, case: Case) -> Settings:
    """The settings with this case's share of time."""
    share = NETWORK_SHARE if case.kind == "networks" else 1.0
    share = share if case.source == TABLE else LAYER_SHARE
    return Settings(**{**asdict(settings), "budget_s": settings.budget_s * share})


def _refusal(
    peer: Peer, peers: Sequence[Peer], case: Case, settings: Settings
) -> tuple[str, str] | None:
    """Status and reason for a peer that is not even tried."""
    missing = peer.missing()
    if case.kind not in peer.kinds:
        return "unsupported", f"is for {', '.join(peer.kinds)}"
    if settings.device not in peer.devices:
        return "unsupported", f"is for {' and '.join(peer.devices)}"
    if missing is not None:
        return "unavailable", missing
    if peer.name == COMPILED and case.source != TABLE and len(peers) > 1:
        return "skipped", "compiling every layer of a network takes long; alone in --peers it runs"
    return None


def _checked(
    case: Case, who: str, maker: Callable[[], Prepared], problem: Problem
) -> tuple[Row, Prepared | None]:
    """A contender's row with its errors, and the contender if its answer is right."""
    try:
        prepared = maker()
        error_max, error_rms = problem.errors(prepared.output())
    except REFUSALS as error:
        return bare(case, who, "unsupported", _line(error)), None
    except Exception as error:  # a peer's own error is a fact about the peer
        return bare(case, who, "failed", f"{type(error).__name__}: {_line(error)}"), None
    allowed = problem.allowed_rms(prepared.precision, prepared.factor)
    row = bare(case, who, "ok")
    row.update(
        algorithm=prepared.algorithm,
        precision=prepared.precision,
        error_max=error_max,
        error_rms=error_rms,
        allowed_rms=allowed,
    )
    if not error_rms <= allowed:
        row.update(status="wrong", reason=f"rms error {error_rms:.1e}, allowed is {allowed:.1e}")
        return row, None
    return row, prepared


def bare(case: Case, who: str, status: str, reason: str = "") -> Row:
    """A row without measurements."""
    row: Row = {
        "kind": case.kind,
        "target": case.target,
        "dtype": case.dtype,
        "name": case.name,
        "source": case.source,
        "who": who,
        "status": status,
        "reason": reason,
    }
    if who == OURS:
        row.update(bar=case.bar, goal=case.goal, note=case.note)
    return row


def _line(error: Exception) -> str:
    """An error in one line of moderate length."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return text if len(text) <= 200 else text[:197] + "..."


def _time(rows: list[Row], ready: Mapping[str, Prepared], settings: Settings) -> None:
    """Add their times to the rows of those that are ready."""
    functions = {who: prepared.call for who, prepared in ready.items()}
    graphs: dict[str, Timing] = {}
    refused: dict[str, str] = {}
    if settings.device == "cpu":
        timings = timed(functions, settings)
    else:
        timings, graphs, refused = cuda.timed(functions, settings)
    for row in rows:
        timing = timings.get(row["who"])
        if timing is not None:
            row.update(asdict(timing), noisy=timing.noisy)
        if row["who"] in graphs:
            row["graph_ms"] = graphs[row["who"]].median_ms
        if row["who"] in refused:
            row["graph_refusal"] = refused[row["who"]]


def timed(functions: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, Timing]:
    """Time functions by turns on the CPU, with cold caches or with warm ones.

    Warm: a turn of short calls follows a pause and calls that are not timed, so that caches, cores
    and threads are its own; long calls warm themselves. Cold: a large array is written before each.
    """
    before: dict[str, Callable[[], object]] = {}
    trash = np.zeros(FLUSH_BYTES // 4, np.float32) if settings.cold else None
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        short = 1e3 * (time.perf_counter() - start) < SHORT_MS
        if trash is not None:
            before[name] = lambda trash=trash: np.add(trash, 1, out=trash)  # type: ignore[misc]
        elif short:
            before[name] = _waking(function)
    return measure(
        functions,
        repeats=settings.repeats,
        warmup=1,
        budget_s=settings.budget_s,
        before=before,
        burst=1 if settings.cold or not before else min(BURST, settings.repeats),
    )


def _waking(function: Callable[[], object]) -> Callable[[], object]:
    def calls() -> None:
        time.sleep(PAUSE_S)
        end = time.perf_counter() + WARM_S
        while time.perf_counter() < end:
            function()

    return calls


def _arithmetic(prepared: Prepared, roofs: Roofline, ms: float, dtype: str) -> Row:
    """Multiplications, bytes and the nearer roof of our run."""
    parts = [counts.of_plan(plan) for plan in prepared.plans]
    total = sum(parts, Counts())
    roof_ms, roof = roofs.total(parts, dtype)
    return {
        "macs": int(total.macs),
        "multiplications": int(total.multiplications),
        "bytes": total.activation_bytes + total.weight_bytes,
        "arithmetic_intensity": total.arithmetic_intensity,
        "roof": roof,
        "roof_ms": roof_ms,
        "roof_fraction": roof_ms / ms,
    }
