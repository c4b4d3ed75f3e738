"""`make gpu`: check our kernels on this machine's GPU, then time them; all rows go to a folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastconv import backends

from . import baselines, cases, machine, no_gpu, results, run
from .contenders import Settings
from .job import set_up
from .ours import Choice
from .results import OURS, Document
from .roofline import Roofline
from .rows import of_case

LIMIT_S = 360.0  # so that nine minutes hold installing, checking and the last case too


def main(args: argparse.Namespace) -> int:
    """2 if there is no GPU, 1 if one of our answers is wrong, else 0."""
    reason = no_gpu.reason()
    if reason is not None:
        print(f"fastconv: no GPU here: {reason}", file=sys.stderr)
        return 2
    folder = Path(args.out)
    path = results.target(str(folder / f"{machine.kind('cuda')}.json"), "")
    chosen = cases.select(cases.KINDS, traced=False, dtypes=cases.DTYPES)
    settings = Settings(args.threads or machine.cpus(), device="cuda", budget_s=0.3)
    set_up(settings)
    wrong = check(chosen, settings, folder / "checks.json")
    document = Document(machine.facts("cuda"), run.described(settings, Choice()), path=path)
    peers = baselines.select("all", "cuda")
    code = run.execute(document, chosen, peers, Choice(), settings, LIMIT_S)
    if backends.installed("matplotlib") and document.rows:
        from . import plots

        plots.write(document, folder)
    print(f"{wrong} wrong answers in the checks; rows are in {folder}")
    return code or int(wrong > 0)


def check(chosen: list[cases.Case], settings: Settings, path: Path) -> int:
    """How many of our answers are wrong; every answer's error is written to `path`."""
    once = Settings(settings.threads, repeats=1, budget_s=0.01, device=settings.device)
    roofs = Roofline(dict.fromkeys(cases.DTYPES, 1.0), "not measured", {1: 1.0})
    rows = []
    for case in run.progress([case for case in chosen if case.kind != "networks"]):
        (row,) = of_case(case, [], Choice(), once, roofs)
        rows.append({k: v for k, v in row.items() if not k.endswith(("_ms", "fraction"))})
    path.write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")
    bad = [row for row in rows if row["who"] == OURS and row["status"] in ("wrong", "failed")]
    for row in bad:
        print(f"{row['status'].upper()}: {row['name']}: {row['reason']}")
    return len(bad)
