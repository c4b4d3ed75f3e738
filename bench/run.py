"""One run: prepare, check against float64, then time ours and the peers by turns; rows are kept as they come."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastconv import backends, counts
from fastconv.counts import Counts
from fastconv.errors import BackendError, GeometryError, UnsupportedError
from fastconv.planner import ALGORITHMS
from fastconv.timing import Timing, measure

from . import baselines, cases, machine, ours, problems, report, results, roofline
from .cases import Case
from .contenders import Prepared
from .ours import Choice
from .problems import Problem
from .results import OURS, Document, Row
from .roofline import Roofline

REFUSALS = (UnsupportedError, BackendError, GeometryError)
# Idle threads of other libraries spin for a while after their work; short calls wait until they sleep.
PAUSE_S = 0.003
SHORT_MS = 20.0
FLUSH_BYTES = 1 << 27  # larger than any cache


@dataclass(frozen=True)
class Settings:
    """How to time."""

    threads: int
    repeats: int = 30
    budget_s: float = 4.0
    cold: bool = False


def main(args: argparse.Namespace) -> int:
    """The command; 0 unless one of our answers was wrong."""
    chosen, peers, choice, settings = _requested(args)
    path = results.target(args.json, machine.kind(args.device)) if args.json else None
    if args.plot:
        _require_plots(args.plot)
    set_threads(settings.threads)
    document = Document(machine.facts(args.device), _describe(args, settings, choice), path=path)
    print("\n".join(report.header(document)), flush=True)
    roofs = roofline.of(settings.threads)
    document.roofline = roofs.record()
    print("\n".join(report.roofs(document)), flush=True)
    try:
        _all(chosen, peers, choice, settings, roofs, document, args.limit)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    print("\n".join(report.summary(document, with_header=False)))
    if args.plot and document.rows:
        from . import plots

        print("\n".join(f"wrote {written}" for written in plots.write(document, args.plot)))
    if path is not None:
        print(f"wrote {path}")
    if interrupted:
        print(
            f"fastconv: interrupted; {len(document.cases())} of {len(chosen)} cases are done",
            file=sys.stderr,
        )
    wrong = any(row["who"] == OURS and row["status"] == "wrong" for row in document.rows)
    return int(wrong or interrupted)


def _requested(
    args: argparse.Namespace,
) -> tuple[list[Case], list[baselines.Peer], Choice, Settings]:
    """What the command line asks for. Raises before anything has run."""
    if args.backend != "auto":
        backends.check(args.backend)
    if args.algorithm not in ALGORITHMS:
        raise UnsupportedError(
            f"bench: unknown algorithm {args.algorithm!r}. Known: {', '.join(ALGORITHMS)}"
        )
    chosen = cases.select(args.kinds, tuple(args.filter), traced=not args.table_only)
    peers = baselines.select(args.peers)
    algorithm = "winograd" if args.tile and args.algorithm == "auto" else args.algorithm
    choice = Choice(args.backend, algorithm, args.tile, device=args.device)
    threads = args.threads or machine.cpus()
    return chosen, peers, choice, Settings(threads, args.repeats, args.budget, args.cold)


def _describe(args: argparse.Namespace, settings: Settings, choice: Choice) -> dict[str, Any]:
    caches = (
        "cold: emptied before each call"
        if settings.cold
        else "warm: each call follows one of its own"
    )
    return {
        **asdict(settings),
        "caches": caches,
        "device": args.device,
        "backend": choice.backend,
        "algorithm": choice.algorithm,
        "tile": list(choice.tile or ()),
        "layout": choice.layout,
    }


def _require_plots(folder: str) -> None:
    if not backends.installed("matplotlib"):
        raise BackendError("bench: --plot needs matplotlib: pip install 'fastconv[bench]'")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnsupportedError(f"bench: cannot write into {folder}: {error.strerror}") from error


def set_threads(threads: int) -> None:
    """As many threads in every library that can be told here; the others are told when they prepare."""
    if backends.available()["numba"] is None:
        import numba

        if threads > numba.config.NUMBA_NUM_THREADS:
            raise UnsupportedError(
                f"bench: at most {numba.config.NUMBA_NUM_THREADS} threads here, got {threads}"
            )
        numba.set_num_threads(threads)
    if backends.available()["torch"] is None:
        import torch

        torch.set_num_threads(threads)


def _all(
    chosen: Sequence[Case],
    peers: Sequence[baselines.Peer],
    choice: Choice,
    settings: Settings,
    roofs: Roofline,
    document: Document,
    limit_s: float,
) -> None:
    start = time.monotonic()
    for case in progress(chosen):
        if time.monotonic() - start > limit_s:
            document.add([_row(case, OURS, "skipped", f"the limit of {limit_s:g} s was reached")])
        else:
            document.add(one(case, peers, choice, settings, roofs))


def progress(chosen: Sequence[Case]) -> Iterator[Case]:
    """The cases under a progress bar on stderr, where tqdm is installed."""
    if not backends.installed("tqdm"):
        yield from chosen
        return
    from tqdm import tqdm

    with tqdm(
        chosen, file=sys.stderr, leave=False, bar_format="{bar:24} {n}/{total} {elapsed} {desc}"
    ) as bar:
        for case in bar:
            bar.set_description_str(case.name)
            yield case


def one(
    case: Case, peers: Sequence[baselines.Peer], choice: Choice, settings: Settings, roofs: Roofline
) -> list[Row]:
    """The rows of one case: ours, then every peer, each with its times or with the reason why there are none."""
    try:
        problem = problems.make(case)
    except REFUSALS as error:
        return [_row(case, OURS, "unsupported", _line(error))]
    rows, ready = [], {}
    makers: dict[str, Callable[[], Prepared]] = {OURS: lambda: ours.prepare(problem, choice)}
    for peer in peers:
        if case.kind in peer.kinds:
            makers[peer.name] = lambda peer=peer: _peer(peer, problem, settings.threads)  # type: ignore[misc]
    for who, maker in makers.items():
        row, prepared = _checked(case, who, maker, problem)
        rows.append(row)
        if prepared is not None:
            ready[who] = prepared
    timings = timed({who: p.call for who, p in ready.items()}, settings)
    for row in rows:
        if row["who"] in timings:
            timing = timings[row["who"]]
            row.update(asdict(timing), noisy=timing.noisy)
    if OURS in timings:
        rows[0].update(_arithmetic(ready[OURS], problem, roofs, timings[OURS].median_ms))
    peer_row = results.best_peer(rows)
    if OURS in timings and peer_row is not None:
        ratio = peer_row["median_ms"] / timings[OURS].median_ms
        rows[0].update(ratio=ratio, best_peer=peer_row["who"], best_peer_ms=peer_row["median_ms"])
    return rows


def _peer(peer: baselines.Peer, problem: Problem, threads: int) -> Prepared:
    missing = peer.missing()
    if missing is not None:
        raise _Unavailable(missing)
    return peer.prepare(problem, threads)


class _Unavailable(Exception):
    """A peer that is not installed."""


def _checked(
    case: Case, who: str, maker: Callable[[], Prepared], problem: Problem
) -> tuple[Row, Prepared | None]:
    """A contender's row with its errors, and the contender if its answer is right."""
    try:
        prepared = maker()
        error_max, error_rms = problem.errors(prepared.output())
    except _Unavailable as error:
        return _row(case, who, "unavailable", _line(error)), None
    except REFUSALS as error:
        return _row(case, who, "unsupported", _line(error)), None
    except Exception as error:  # a peer's own error is a fact about the peer
        return _row(case, who, "failed", f"{type(error).__name__}: {_line(error)}"), None
    allowed = problem.allowed_rms(prepared.precision, prepared.factor)
    row = _row(case, who, "ok")
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


def _row(case: Case, who: str, status: str, reason: str = "") -> Row:
    row: Row = {
        "kind": case.kind,
        "target": case.target,
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


def timed(functions: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, Timing]:
    """Time functions by turns, with cold caches or with warm ones.

    Warm: a call follows another of the same function, which is not timed, so that caches and threads are its own. Long calls
    warm themselves. Cold: a large array is written before each call.
    """
    turns: dict[str, Callable[[], object]] = {}
    trash = np.zeros(FLUSH_BYTES // 4, np.float32) if settings.cold else None
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        short = 1e3 * (time.perf_counter() - start) < SHORT_MS
        if trash is not None:
            turns[f"{name} before"] = lambda trash=trash: np.add(trash, 1, out=trash)  # type: ignore[misc]
        elif short:
            turns[f"{name} before"] = lambda f=function: (time.sleep(PAUSE_S), f())  # type: ignore[misc]
        turns[name] = function
    found = measure(turns, repeats=settings.repeats, warmup=1, budget_s=settings.budget_s)
    return {name: found[name] for name in functions}


def _arithmetic(prepared: Prepared, problem: Problem, roofs: Roofline, ms: float) -> Row:
    """Multiplications, bytes and the nearer roof of our run."""
    parts = [counts.of_plan(plan) for plan in prepared.plans]
    total = sum(parts, Counts())
    roof_ms, roof = roofline.total_roof(roofs, parts)
    return {
        "macs": int(total.macs),
        "multiplications": int(total.multiplications),
        "bytes": total.activation_bytes + total.weight_bytes,
        "arithmetic_intensity": total.arithmetic_intensity,
        "roof": roof,
        "roof_ms": roof_ms,
        "roof_fraction": roof_ms / ms,
    }


def listing() -> list[str]:
    """Lines that name every case and every peer."""
    lines = []
    for case in cases.select(cases.KINDS):
        origin = "" if case.source == "table" else f"  ({case.source})"
        lines.append(f"{case.kind:<9} {case.name:<58} {case.target}{origin}")
    lines.append("")
    for peer in baselines.PEERS.values():
        lines.append(f"peer {peer.name:<22} {peer.title}: {peer.missing() or 'available'}")
    return lines
