"""Results as text: what was run on, a table with the ratios first, what is missing and why, and two runs compared."""

from __future__ import annotations

from statistics import median

from .results import OURS, Document, Row

SHORT = {
    "torch": "torch",
    "torch-last": "t.last",
    "torch-compile": "t.comp",
    "openvino": "ov.f32",
    "openvino-default": "ov.def",
    "onnxruntime": "ort",
    "continual-inference": "co",
}
CHANGED = 0.05  # smaller changes are not worth a line, however quiet the machine


def header(document: Document) -> list[str]:
    """The machine and the settings."""
    m, s = document.machine, document.settings
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    lines = [
        f"{m.get('gpu') or m['cpu']}, {m['cpus']} CPUs, {' '.join(m['instruction_sets'][-4:])}; {s['threads']} threads",
        f"{versions}; commit {m['commit'] or 'unknown'}",
        f"up to {s['repeats']} calls of each by turns in {s['budget_s']:g} s, medians; caches {s['caches']}",
    ]
    if m["load"] > 0.5 * m["cpus"]:
        lines.append(f"NOT QUIET: load {m['load']:g} on {m['cpus']} CPUs; times will be off")
    return lines


def roofs(document: Document) -> list[str]:
    """The measured roofs in one line."""
    r = document.roofline
    copies = {int(size): rate for size, rate in r["copy_bytes_per_s"].items()}
    largest, fastest = max(copies), max(copies, key=lambda size: copies[size])
    return [
        f"peak {2e-9 * r['multiply_adds_per_s']:.0f} GFLOP/s ({r['method']}); copies "
        f"{1e-9 * copies[largest]:.0f} GB/s at {largest >> 20} MB, {1e-9 * copies[fastest]:.0f} GB/s at {_bytes(fastest)}",
        "",
    ]


def summary(document: Document, with_header: bool = True) -> list[str]:
    """Everything a reader wants of a document."""
    lines = [*header(document), *roofs(document)] if with_header else []
    for kind in dict.fromkeys(row["kind"] for row in document.rows):
        groups = [rows for rows in document.cases() if rows[0]["kind"] == kind]
        lines += [kind, *table(groups), ""]
    return lines + reasons(document)


def table(groups: list[list[Row]]) -> list[str]:
    """One line per case, the ratio to the best peer first; all times in milliseconds."""
    peers = [who for who in SHORT if any(row["who"] == who for rows in groups for row in rows)]
    cells = [
        (
            "ratio",
            "bar",
            "goal",
            "case",
            "ours",
            *(SHORT[who] for who in peers),
            "roof",
            "rms error",
            "ran",
        )
    ]
    for rows in groups:
        by_who = {row["who"]: row for row in rows}
        own = by_who[OURS]
        ratio = f"{own['ratio']:.2f}" if own.get("ratio") else "-"
        times = [time_of(by_who.get(who)) for who in (OURS, *peers)]
        roof = f"{own['roof_fraction']:.0%} {own['roof'][:3]}" if own.get("roof_fraction") else ""
        error = f"{own['error_rms']:.1e}" if own.get("error_rms") is not None else ""
        bar = f"{own['bar']:g}" if own["bar"] else ""
        ran = own.get("algorithm") or own["status"]
        cells.append((ratio, bar, own["goal"], own["name"], *times, roof, error, ran))
    left = (3, len(cells[0]) - 1)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def time_of(row: Row | None) -> str:
    """A median, with ~ if it is noisy; a dash where there is none."""
    if row is None or row["status"] != "ok":
        return "WRONG" if row is not None and row["status"] == "wrong" else "-"
    ms = row["median_ms"]
    return (
        f"{'~' if row['noisy'] else ''}{ms:.3f}"
        if ms < 9.9995
        else f"{'~' if row['noisy'] else ''}{ms:.1f}"
    )


def reasons(document: Document) -> list[str]:
    """Why times are missing, each reason once; which peers compute in another precision; what ~ means."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in document.rows:
        if row["status"] != "ok":
            found.setdefault((row["who"], row["status"], row["reason"]), []).append(row["name"])
    lines = []
    for (who, status, reason), names in found.items():
        where = names[0] if len(names) == 1 else f"{len(names)} cases, e.g. {names[0]}"
        lines.append(f"{who}: {status} ({where}): {reason}")
    others = {
        (row["who"], row["precision"])
        for row in document.rows
        if row.get("precision", "float32") != "float32"
    }
    for who, precision in sorted(others):
        worst = max(
            r["error_max"]
            for r in document.rows
            if r["who"] == who and r.get("error_max") is not None
        )
        lines.append(
            f"{who} computes in {precision}, largest error {worst:.1e}: not counted in the ratio"
        )
    if any(row.get("noisy") for row in document.rows):
        lines.append(
            "~ noisy: fewer than 3 calls, or the 80 % quantile more than 1.25 times the 20 % quantile"
        )
    return lines


def comparison(before: Document, after: Document) -> list[str]:
    """What got faster or slower beyond noise: the ranges between the 20 % and 80 % quantiles do not touch.

    The peers, which nobody changed, say how much the machine itself differs between the runs.
    """
    old, new = (
        {_key(row): row for row in d.rows if row["status"] == "ok"} for d in (before, after)
    )
    common = [key for key in old if key in new]
    lines = []
    for name, fact in (("machine", "kind"), ("commit", "commit")):
        a, b = before.machine[fact], after.machine[fact]
        lines.append(f"{name}: {a}" if a == b else f"{name}: {a} -> {b}")
    for name in ("threads", "caches"):
        a, b = before.settings[name], after.settings[name]
        if a != b:
            lines.append(f"NOT COMPARABLE: {name} {a} -> {b}")
    drift = [new[k]["median_ms"] / old[k]["median_ms"] for k in common if k[2] != OURS]
    if drift:
        lines.append(f"peers: {median(drift):.2f} times as long, median of {len(drift)} rows")
    changes = sorted(line for k in common if k[2] == OURS and (line := _change(old[k], new[k])))
    mine = [k for k in common if k[2] == OURS]
    lines += ["", *(text for _, text in changes)]
    lines.append(
        f"{len(mine) - len(changes)} of {len(mine)} common cases did not change beyond noise"
    )
    for title, only in (
        ("A", [k for k in old if k not in new]),
        ("B", [k for k in new if k not in old]),
    ):
        missing = [k for k in only if k[2] == OURS]
        if missing:
            lines.append(f"{len(missing)} cases only in {title}, e.g. {missing[0][1]}")
    return lines


def _key(row: Row) -> tuple[str, str, str]:
    return row["kind"], row["target"], row["who"]


def _change(old: Row, new: Row) -> tuple[float, str] | None:
    apart = new["q20_ms"] > old["q80_ms"] or new["q80_ms"] < old["q20_ms"]
    factor = old["median_ms"] / new["median_ms"]
    if not apart or abs(factor - 1) < CHANGED:
        return None
    word = "faster" if factor > 1 else "SLOWER"
    times = f"{old['median_ms']:.3f} -> {new['median_ms']:.3f} ms"
    ran = (
        ""
        if old["algorithm"] == new["algorithm"]
        else f"  ({old['algorithm']} -> {new['algorithm']})"
    )
    return factor, f"{factor:5.2f}x {word}  {new['name']}: {times}{ran}"


def _bytes(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"
