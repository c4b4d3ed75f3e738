"""`make gpu`, after its tests: the cases on this machine's GPU, checked and timed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from fastconv import backends

from . import baselines, cases, machine, no_gpu, ours, problems, results, run
from .cases import Case
from .contenders import Settings
from .job import set_up
from .ours import Choice
from .results import Document

DTYPES = ("float32", "bfloat16")
WORKERS = 12


def main(args: argparse.Namespace) -> int:
    """2 if there is no GPU, 1 if one of our answers is wrong, else 0."""
    reason = no_gpu.reason()
    if reason is not None:
        print(f"fastconv: no GPU here: {reason}", file=sys.stderr)
        return 2
    folder = Path(args.out)
    path = results.target(str(folder / f"{machine.kind('cuda')}.json"), "")
    chosen = cases.select(cases.KINDS, args.filter, traced=False, dtypes=DTYPES, device="cuda")
    chosen.sort(key=lambda case: case.kind == "networks")  # they take longest: both precisions last
    settings = Settings(args.threads or machine.cpus(), device="cuda", budget_s=0.2)
    set_up(settings)
    facts = machine.facts("cuda")  # how busy the machine is, before we keep it busy
    compile_all(chosen, settings)
    document = Document(facts, run.described(settings, Choice()), path=path)
    peers = baselines.select("all", "cuda")
    code = run.execute(document, chosen, peers, Choice(), settings, args.limit)
    if backends.installed("matplotlib") and document.rows:
        from . import plots

        plots.write(document, folder)
    print(f"rows are in {folder}")
    return code


def compile_all(chosen: Sequence[Case], settings: Settings) -> None:
    """Have our kernels compiled by several processes at once: Triton keeps them on disk.

    A network has many, for one process: it compiles them when its turn comes, beside nobody.
    """
    small = [case for case in chosen if case.kind != "networks"]
    workers = max(1, min(WORKERS, settings.threads, len(small)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_compile, case, settings) for case in small]
        for case, future in zip(run.progress(small, "compiling"), futures, strict=True):
            if future.exception() is not None:
                print(f"{case.name}: {future.exception()}", file=sys.stderr)


def _compile(case: Case, settings: Settings) -> None:
    """Run a case once."""
    set_up(settings)
    ours.prepare(problems.make(case, None, settings.device), Choice(), settings).call()
