"""The README's tables, written from the committed results and from errors measured now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

from fastconv.errors import UnsupportedError

from . import errors, results
from .baselines import PEERS
from .cases import TABLE
from .report import not_quiet, time_of
from .results import OURS, Document, Row

BENCH, ERRORS = "bench", "errors"
TITLES = {
    "layers": "layer (channels, TxHxW)",
    "blocks": "block",
    "networks": "network",
    "streams": "one frame of a stream (window)",
    "training": "forward and backward",
}


def write(root: Path | None = None) -> Path:
    """Replace what stands between the markers of README.md; returns its path.

    Raises UnsupportedError outside a checkout, without results and without markers.
    """
    root = root or Path(__file__).resolve().parent.parent
    readme, folder = root / "README.md", root / "bench" / "results"
    if not readme.is_file() or not folder.is_dir():
        raise UnsupportedError("bench: readme needs a checkout with README.md and bench/results")
    files = sorted(folder.glob("*.json"), key=lambda file: file.stem)
    if not files:
        raise UnsupportedError("bench: no results in bench/results; `bench all --json` makes some")
    text = readme.read_text(encoding="utf-8")
    sections: dict[str, Callable[[], str]] = {
        BENCH: lambda: "\n\n".join(section(results.read(file)) for file in files),
        ERRORS: lambda: "\n".join(errors.table(errors.measured())),
    }
    for name in sections:
        _cut(text, name)
    for name, made in sections.items():
        before, after = _cut(text, name)
        text = f"{before}\n{made()}\n{after}"
    readme.write_text(text, encoding="utf-8")
    return readme


def _cut(text: str, name: str) -> tuple[str, str]:
    """What stands before and behind a generated part, with its markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UnsupportedError(f"bench: README.md needs {begin} and then {end}, each once")
    before, rest = text.split(begin)
    return before + begin, end + rest.split(end)[1]


def section(document: Document) -> str:
    """One machine: what it is, a table, and in words what the table leaves out."""
    m, s = document.machine, document.settings
    versions = [f"{name} {m['versions'][name]}" for name in _named(m["versions"])]
    busy = " **The machine was not quiet.**" if not_quiet(document) else ""
    limit = f" limited to {m['limited_to'].upper()}" if m.get("limited_to") else ""
    where = f"{m['cpu']}{limit}, {s['threads']} threads, float32, batch 1"
    turns = "each library by turns with ours in a process of its own"
    exact = "compute in float32 too"
    if s["device"] != "cpu":
        where = f"{m['gpu']}, float32 where no precision is named, TF32 off, batch 1 or as named"
        turns = "all by turns in one process, each as a replayed CUDA graph where it can be one"
        exact = "compute in the same precision"
    lines = [
        f"{where}, {m['date'][:10]}, "
        f"commit {m['commit'] or 'unknown'}; {', '.join(versions)}. Peers in this run: "
        f"{', '.join(_timed(document))}. Milliseconds, medians; {turns}. The best peer is "
        f"the one with the lowest ratio among those that {exact}; ours is as timed "
        "beside it. The error is the largest, relative to the largest output, "
        f"against float64.{busy}"
    ]
    for kind, title in TITLES.items():
        rows = [r for r in document.cases() if r[0]["kind"] == kind and r[0]["source"] == TABLE]
        shown = [_line(group) for group in rows if group[0]["status"] == "ok"]
        if shown:
            lines += [
                "",
                f"| {title} | ours | best peer | ratio | error |",
                "|---|---|---|---|---|",
            ]
            lines += shown
        absent = [group[0]["name"] for group in rows if group[0]["status"] != "ok"]
        if absent:
            lines += ["", f"Not measured: {', '.join(absent)}."]
    further = [r[0] for r in document.cases() if r[0]["source"] != TABLE and r[0].get("ratio")]
    others = [row["ratio"] for row in further if not row["noisy"]]
    if others:
        slower = sum(ratio < 1 for ratio in others)
        lines += [
            "",
            f"{len(others)} further layers of the networks, without {len(further) - len(others)} "
            f"whose times were noisy: ratio {median(others):.2f} in the "
            f"middle, {min(others):.2f} to {max(others):.2f}; {slower} are slower than the best "
            "peer.",
        ]
    return "\n".join(lines)


def _named(versions: dict[str, str]) -> list[str]:
    return [name for name in ("torch", "numba", "triton") if name in versions]


def _timed(document: Document) -> list[str]:
    """Titles of the peers that were timed on any case."""
    rows = [row for group in document.cases() for row in group if row["status"] == "ok"]
    return [peer.title for name, peer in PEERS.items() if any(row["who"] == name for row in rows)]


def _line(group: list[Row]) -> str:
    own = next(row for row in group if row["who"] == OURS)
    peer, ratio = "none", ""
    if own.get("ratio"):
        best = next(row for row in group if row["who"] == own["best_peer"])
        peer = f"{time_of(best)} {PEERS[best['who']].title}"
        ratio = f"{own['ratio']:.2f}"
    return f"| {own['name']} | {time_of(own)} | {peer} | {ratio} | {own['error_max']:.0e} |"
