"""One run: prepare, check against float64, then time ours and the peers by turns."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from fastconv import backends
from fastconv.errors import BackendError, UnsupportedError
from fastconv.planner import ALGORITHMS

from . import baselines, cases, machine, no_gpu, report, results, roofline
from .baselines import Peer
from .cases import Case
from .contenders import Settings
from .ours import Choice
from .results import OURS, Document
from .rows import bare, of_case

INTERRUPTED = 130


def main(args: argparse.Namespace) -> int:
    """The command; 0 unless one of our answers was wrong or the run was interrupted."""
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
    start, ended = time.monotonic(), 0
    print("\n".join(report.header(document)), flush=True)
    try:
        roofs = roofline.of(settings, tuple(dict.fromkeys(case.dtype for case in chosen)))
        document.roofline = roofs.record()
        print("\n".join(report.roofs(document)), flush=True)
        for case in progress(chosen):
            if time.monotonic() - start > limit_s:
                reason = f"the run's limit of {limit_s:g} s was reached"
                document.add([bare(case, OURS, "skipped", reason)])
            else:
                document.add(of_case(case, peers, choice, settings, roofs))
    except KeyboardInterrupt:
        ended = INTERRUPTED
    print("\n".join(report.summary(document, with_header=False)))
    if ended:
        done = f"{len(document.cases())} of {len(chosen)} cases are done"
        print(f"fastconv: interrupted; {done}", file=sys.stderr)
    wrong = any(row["who"] == OURS and row["status"] == "wrong" for row in document.rows)
    return ended or int(wrong)


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
    chosen = cases.select(args.kinds, args.filter, not args.table_only, args.dtype)
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


def set_up(settings: Settings) -> None:
    """Tell every library how many threads to use; some are told as they prepare. cuDNN may try."""
    threads = settings.threads
    if backends.available()["numba"] is None:
        import numba

        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if backends.available()["torch"] is None:
        import torch

        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = settings.device == "cuda"


def progress(chosen: Sequence[Case]) -> Iterator[Case]:
    """The cases under a progress bar on stderr, where tqdm is installed."""
    if not backends.installed("tqdm"):
        yield from chosen
        return
    from tqdm import tqdm

    form = "{bar:24} {n}/{total} {elapsed} {desc}"
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
