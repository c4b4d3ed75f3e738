"""PNG plots of a document: bars of speed-ups, and every case of ours under the roofs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastconv.errors import UnsupportedError

from .baselines import PEERS
from .results import OURS, Document, Row

FASTER, SLOWER, NOISY = "#1b7837", "#b2182b", 0.45
COLOURS = {
    "winograd": "#2166ac",
    "depthwise": "#1b7837",
    "grouped": "#e08214",
    "hfa": "#762a83",
    "continual": "#b2182b",
    "accelerate": "#4d4d4d",
}
MOST_BARS = 45
LEAST_MACS = 1_000_000  # what is smaller measures the cost of a call


def write(document: Document, folder: str | Path) -> list[Path]:
    """Write the plots; returns their paths. Raises UnsupportedError if a file cannot be written."""
    import matplotlib

    matplotlib.use("agg")
    written = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, figure in _figures(document):
            path = Path(folder) / f"{name}.png"
            figure.savefig(path, dpi=130, bbox_inches="tight")
            written.append(path)
    except OSError as error:
        raise UnsupportedError(f"bench: cannot write into {folder}: {error.strerror}") from error
    return written


def _figures(document: Document) -> list[tuple[str, Any]]:
    from matplotlib import pyplot

    figures = []
    timed = [row for row in document.rows if row["who"] == OURS and row["status"] == "ok"]
    groups: dict[str, list[Row]] = {}
    for row in timed:
        if row.get("ratio"):
            name = row["kind"] if row["source"] == "table" else "network-layers"
            groups.setdefault(name, []).append(row)
    for name, rows in groups.items():
        title = name
        if len(rows) > MOST_BARS:  # the longest, in the order of the networks
            title = f"{name}, the {MOST_BARS} longest of {len(rows)}"
            least = sorted(row["median_ms"] for row in rows)[-MOST_BARS]
            rows = [row for row in rows if row["median_ms"] >= least]
        figures.append((f"speedup-{name}", _bars(document, title, rows)))
    if timed:
        figures.append(("roofline", _roofline(document, timed)))
    pyplot.close("all")
    return figures


def _subtitle(document: Document) -> str:
    m, s = document.machine, document.settings
    return f"{m.get('gpu') or m['cpu']}, {s['threads']} threads, commit {m['commit'] or 'unknown'}"


def _bars(document: Document, title: str, rows: list[Row]) -> Any:
    """One bar per case: how many times faster than the best peer; the small line is the bar set."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.32 * len(rows)))
    for y, row in enumerate(rows):
        ratio = row["ratio"]
        colour = FASTER if ratio >= 1 else SLOWER
        axes.barh(y, ratio, color=colour, alpha=NOISY if row["noisy"] else 1.0, height=0.7)
        peer = PEERS[row["best_peer"]].title if row["best_peer"] in PEERS else row["best_peer"]
        times = f"{row['median_ms']:.3g} ms, {peer} {row['best_peer_ms']:.3g}"
        axes.text(
            max(ratio, row["bar"] or 0, 1),
            y,
            f"  {ratio:.2f}   ({times})",
            va="center",
            fontsize=7.5,
        )
        if row["bar"]:
            axes.plot([row["bar"]] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.5)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.75 * max(1.2, *(row["ratio"] for row in rows)))
    axes.set_xlabel(
        "times faster than the best peer (pale: noisy; black line: what counts as good)"
    )
    axes.set_title(f"{title}: ours against the best peer\n{_subtitle(document)}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _roofline(document: Document, rows: list[Row]) -> Any:
    """Arithmetic done per second over arithmetic per byte; two operations per multiplication."""
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(9, 6))
    roofs = document.roofline
    peak = 2e-9 * roofs["multiply_adds_per_s"]["float32"]
    copies = {int(size): 1e-9 * rate for size, rate in roofs["copy_bytes_per_s"].items()}
    memory, cache = copies[max(copies)], max(copies.values())
    points = [(row, *_point(row)) for row in rows if row.get("macs", 0) >= LEAST_MACS]
    intensities = [x for _, x, _ in points] or [1.0]
    x = np.geomspace(0.5 * min(intensities), 2 * max(*intensities, peak / memory), 200)
    axes.plot(x, np.minimum(peak, memory * x), color="black", label=f"memory, {memory:.0f} GB/s")
    axes.plot(x, np.minimum(peak, cache * x), ":", color="black", label=f"caches, {cache:.0f} GB/s")
    for family in dict.fromkeys(_family(row) for row, _, _ in points):
        chosen = [(i, y) for row, i, y in points if _family(row) == family]
        colour = COLOURS.get(family, "#888888")
        across, up = zip(*chosen, strict=True)
        axes.scatter(across, up, s=26, color=colour, label=family, alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("operations per byte of weights, input and output (2 per multiplication)")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(
        f"ours under the roofs; peak {peak:.0f} GFLOP/s; cases of 1 M multiply-adds and more\n"
        f"{_subtitle(document)}",
        fontsize=10,
    )
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _point(row: Row) -> tuple[float, float]:
    operations = 2 * row["multiplications"]
    return operations / row["bytes"], 1e-6 * operations / row["median_ms"]


def _family(row: Row) -> str:
    """The second word of what ran: 'numba winograd F(2, 3)'."""
    return str(row["algorithm"].split()[1])
