"""The rows of one case from one process: ours and its peers prepared, checked, timed, compared.

How it is timed on a CPU, and why. The threads of a library that ran keep spinning for a while, on
cores that the next one needs. On 2 cores, after ONNX Runtime ran X3D-S our first call takes 67 ms
and not 32: its threads spin for 35 ms. After ours OpenVINO's first call takes 22 ms and not 16.
So contenders take turns, a turn begins with untimed calls for `SETTLE_S`, at least one, and then
some are timed. In a process with but one other library this is enough: the later calls take as
long as without the peer, and as after a pause in which all fall asleep. Calls that take longer than
`LONG_MS` are disturbed by a few percent at most, and are not repeated for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

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
SETTLE_S, LONG_MS, BURST = 0.05, 1000.0, 5
FLUSH_BYTES = 1 << 27  # larger than any cache
# Networks take long and are few, their single layers are many.
NETWORK_SHARE, LAYER_SHARE = 2.0, 0.2


def of_case(
    case: Case,
    peers: Sequence[Peer],
    choice: Choice,
    settings: Settings,
    roofs: Roofline,
    folder: str | None = None,
) -> list[Row]:
    """Ours first, then every peer, each with its times or with the reason why there are none.

    folder: see `problems.make`
    """
    try:
        problem = problems.make(case, folder, settings.device)
    except REFUSALS as error:
        return [bare(case, OURS, "unsupported", _line(error))]
    rows: list[Row] = []
    ready: dict[str, Prepared] = {}
    makers: dict[str, Callable[[], Prepared]] = {
        OURS: lambda: ours.prepare(problem, choice, settings)
    }
    asked = {OURS: problem}
    for peer in peers:
        refusal = peer.refusal(case.kind, settings.device)
        if refusal is not None:
            rows.append(bare(case, peer.name, *refusal))
        else:
            # Who has no streams computes the clip for every frame, which is another answer.
            given = problem if peer.streams or problem.clip is None else problem.clip
            asked[peer.name] = given
            makers[peer.name] = lambda peer=peer, given=given: peer.prepare(given, settings)  # type: ignore[misc]
    for who, maker in makers.items():
        row, prepared = _checked(case, who, maker, asked[who])
        rows.append(row)
        if prepared is not None:
            ready[who] = prepared
    rows.sort(key=lambda row: row["who"] != OURS)
    budget_s = settings.budget_s * _share(case) * len(ready)
    _time(rows, ready, replace(settings, budget_s=budget_s))
    if rows[0]["status"] == "ok" and ready[OURS].plans:
        rows[0].update(_arithmetic(ready[OURS], roofs, rows[0]["median_ms"], case.dtype))
    results.rate(rows)
    return rows


def _share(case: Case) -> float:
    """This case's time as a multiple of the settings' budget."""
    if case.source != TABLE:
        return LAYER_SHARE
    return NETWORK_SHARE if case.kind == "networks" else 1.0


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
        "batch": case.batch,
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
            # What the GPU does; a call from Python also waits for launches where it is short.
            graph = graphs[row["who"]]
            row.update(call_ms=row["median_ms"], **asdict(graph), noisy=graph.noisy)
        if row["who"] in refused:
            row["graph_refusal"] = refused[row["who"]]


def timed(functions: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, Timing]:
    """Time functions by turns on the CPU, with cold caches or with warm ones.

    Warm: a turn begins with untimed calls, so that caches, cores and threads are its own. Cold: a
    large array is written before each call.
    """
    before: dict[str, Callable[[], object]] = {}
    if settings.cold:
        trash = np.zeros(FLUSH_BYTES // 4, np.float32)
        before = dict.fromkeys(functions, lambda: np.add(trash, 1, out=trash))
    else:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if 1e3 * (time.perf_counter() - start) < LONG_MS:
                before[name] = _settling(function)
    by_one = settings.cold or len(before) < len(functions)
    return measure(
        functions,
        repeats=settings.repeats,
        warmup=0,
        budget_s=settings.budget_s,
        before=before,
        burst=1 if by_one else min(BURST, settings.repeats),
    )


def _settling(function: Callable[[], object]) -> Callable[[], object]:
    def calls() -> None:
        end = time.perf_counter() + SETTLE_S
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
