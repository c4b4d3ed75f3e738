"""One run: every process of peers after the other, rows kept and shown as they come."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from fastconv import backends
from fastconv.errors import BackendError, UnsupportedError
from fastconv.planner import ALGORITHMS

from . import baselines, cases, machine, no_gpu, processes, report, results, roofline
from .baselines import Peer
from .cases import Case
from .contenders import Settings
from .job import Job, set_up
from .ours import Choice
from .results import OURS, Document

INTERRUPTED = 130


def main(args: argparse.Namespace) -> int:
    """The command; 0 unless ours was wrong or failed, or the run was interrupted."""
    chosen, peers, choice, settings = requested(args)
    path = results.target(args.json, machine.kind(args.device)) if args.json else None
    if args.plot:
        require_plots(args.plot)
    set_up(settings)
    document = Document(machine.facts(args.device), described(settings, choice), path=path)
    code = execute(document, chosen, peers, choice, settings, args.limit)
    if args.plot and document.rows:
        from . import plots

        print("\n".join(f"wrote {written}" for written in plots.write(document, args.plot)))
    if path is not None and document.rows:
        print(f"wrote {path}")
    return code


def execute(
    document: Document,
    chosen: Sequence[Case],
    peers: Sequence[Peer],
    choice: Choice,
    settings: Settings,
    limit_s: float,
) -> int:
    """Measure everything, print what is known, and say how it ended."""
    until, ended, done = time.time() + limit_s, 0, 0
    found: list[processes.Part] = []
    print("\n".join(report.header(document)), flush=True)
    try:
        roofs = roofline.of(settings, tuple(dict.fromkeys(case.dtype for case in chosen)))
        document.roofline = roofs.record()
        print("\n".join(report.roofs(document)), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            names = tuple(peer.name for peer in peers)
            job = Job(tuple(chosen), names, choice, settings, roofs, until, folder)
            found = processes.parts(job)
            for part, answers in processes.measured(job, found):
                title = f"{part.process}, {found.index(part) + 1} of {len(found)}"
                for _, rows in zip(progress(part.cases, title), answers, strict=True):
                    document.add(rows)
                    done += 1
            document.add(processes.refusals(job, found))
    except KeyboardInterrupt:
        ended = INTERRUPTED
    print("\n".join(report.summary(document, with_header=False)))
    if ended:
        total = sum(len(part.cases) for part in found)
        print(f"fastconv: interrupted; {done} of {total} measurements are done", file=sys.stderr)
    bad = any(r["who"] == OURS and r["status"] in ("wrong", "failed") for r in document.rows)
    return ended or int(bad)


def requested(
    args: argparse.Namespace,
) -> tuple[list[Case], list[Peer], Choice, Settings]:
    """What the command line asks for. Raises before anything has run."""
    if args.backend != "auto":
        backends.check(args.backend)
    if args.algorithm not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise UnsupportedError(f"bench: unknown algorithm {args.algorithm!r}. Known: {known}")
    reason = no_gpu.reason() if args.device == "cuda" else None
    if reason is not None:
        raise BackendError(f"bench: no GPU here: {reason}")
    traced = not args.table_only and args.device == "cpu"
    chosen = cases.select(args.kinds, args.filter, traced, args.dtype, args.device)
    algorithm = "winograd" if args.tile and args.algorithm == "auto" else args.algorithm
    threads = args.threads or machine.cpus()
    if threads > machine.cpus():
        raise UnsupportedError(f"bench: {threads} threads asked for, {machine.cpus()} CPUs here")
    return (
        chosen,
        baselines.select(args.peers, args.device),
        Choice(args.backend, algorithm, args.tile),
        Settings(threads, args.repeats, args.budget, args.cold, args.device),
    )


def described(settings: Settings, choice: Choice) -> dict[str, object]:
    """The settings as they stand in the file."""
    warm = "cold: emptied before each call" if settings.cold else "warm: a call follows its like"
    caches = warm if settings.device == "cpu" else "cold: inputs fill the L2 cache twice"
    choices = {**asdict(choice), "tile": list(choice.tile or ())}
    return {**asdict(settings), "caches": caches, **choices}


def require_plots(folder: str) -> None:
    """Raise if plots cannot be drawn, or not written into this folder."""
    if not backends.installed("matplotlib"):
        raise BackendError("bench: --plot needs matplotlib: pip install 'fastconv[bench]'")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"bench: cannot write into {folder}: {error.strerror}"
        raise UnsupportedError(message) from error


def progress(chosen: Sequence[Case], title: str = "") -> Iterator[Case]:
    """The cases under a progress bar on stderr, where tqdm is installed."""
    if not backends.installed("tqdm"):
        yield from chosen
        return
    from tqdm import tqdm

    form = f"{title} {{bar:24}} {{n}}/{{total}} {{elapsed}} {{desc}}"
    with tqdm(chosen, file=sys.stderr, leave=False, bar_format=form) as bar:
        for case in bar:
            bar.set_description_str(case.name)
            yield case


def listing() -> list[str]:
    """Lines that name every case and every peer."""
    lines = []
    for case in cases.select(cases.KINDS):
        origin = "" if case.source == cases.TABLE else f"  ({case.source})"
        lines.append(f"{case.kind:<9} {case.name:<56} {case.target}{origin}")
    lines.append("")
    for peer in baselines.PEERS.values():
        state = peer.missing() or f"available, for {', '.join(peer.devices)}"
        lines.append(f"peer {peer.name:<20} {peer.title}: {state}")
    return lines
