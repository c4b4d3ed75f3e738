"""Results as text: the machine, tables with the ratios first, what is missing and why."""

from __future__ import annotations

from statistics import median

from .baselines import PEERS
from .results import OURS, Document, Row, key

CHANGED = 0.05  # smaller changes are not worth a line, however quiet the machine
ABOVE_ROOF = 1.05
COLUMNS = ("ratio", "bar", "goal", "case", OURS)
LEFT = ("case", "ran")


def header(document: Document) -> list[str]:
    """The machine and the settings."""
    m, s = document.machine, document.settings
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    sets = " ".join(m["instruction_sets"][-4:])
    if m.get("limited_to"):
        sets = f"limited to {m['limited_to']}"
    lines = [
        f"{m.get('gpu') or m['cpu']}, {m['cpus']} CPUs, {sets}; {s['threads']} threads",
        f"{versions}; commit {m['commit'] or 'unknown'}",
        f"medians of up to {s['repeats']} calls in {s['budget_s']:g} s per contender and case; "
        f"caches {s['caches']}",
    ]
    if not_quiet(document):
        lines.append(f"NOT QUIET: load {m['load']:g} on {m['cpus']} CPUs; times will be off")
    return lines


def not_quiet(document: Document) -> bool:
    """Whether other programs ran when the run began."""
    return bool(document.machine["load"] > 0.5 * document.machine["cpus"])


def roofs(document: Document) -> list[str]:
    """The measured roofs in one line."""
    r = document.roofline
    copies = {int(size): rate for size, rate in r["copy_bytes_per_s"].items()}
    largest, fastest = max(copies), max(copies, key=lambda size: copies[size])
    peaks = ", ".join(
        f"{dtype} {2e-9 * rate:.0f} GFLOP/s" for dtype, rate in r["multiply_adds_per_s"].items()
    )
    speeds = ", ".join(
        f"{1e-9 * copies[size]:.0f} GB/s at {_bytes(size)}" for size in (largest, fastest)
    )
    return [f"peak {peaks} ({r['method']}); copies {speeds}", ""]


def summary(document: Document, with_header: bool = True) -> list[str]:
    """Everything a reader wants of a document."""
    lines = [*header(document), *roofs(document)] if with_header else []
    for kind in dict.fromkeys(row["kind"] for row in document.rows):
        groups = [rows for rows in document.cases() if rows[0]["kind"] == kind]
        lines += [kind, *table(groups), ""]
    return lines + reasons(document)


def table(groups: list[list[Row]]) -> list[str]:
    """One line per case, the ratio to the best peer first; all times in milliseconds."""
    timed = {row["who"] for rows in groups for row in rows if row["status"] in ("ok", "wrong")}
    peers = [who for who in PEERS if who in timed]
    head = (*COLUMNS, *(PEERS[who].short for who in peers), "roof", "rms error", "ran")
    cells = [head, *(_cells(rows, peers) for rows in groups)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if title in LEFT else cell.rjust(width)
            for title, cell, width in zip(head, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]


def _cells(rows: list[Row], peers: list[str]) -> tuple[str, ...]:
    by_who = {row["who"]: row for row in rows}
    own = by_who[OURS]
    measured = own["status"] == "ok"
    return (
        f"{own['ratio']:.2f}" if own.get("ratio") else "-",
        f"{own['bar']:g}" if own["bar"] else "",
        own["goal"],
        own["name"],
        *(time_of(by_who.get(who)) for who in (OURS, *peers)),
        f"{own['roof_fraction']:.0%} {own['roof'][:3]}" if "roof" in own else "",
        f"{own['error_rms']:.1e}" if measured else "",
        own["algorithm"] if measured else own["status"],
    )


def time_of(row: Row | None) -> str:
    """A median, with ~ if it is noisy; a dash where there is none."""
    if row is None or row["status"] != "ok":
        return "WRONG" if row is not None and row["status"] == "wrong" else "-"
    ms = row["median_ms"]
    return ("~" if row["noisy"] else "") + (f"{ms:.3f}" if ms < 9.9995 else f"{ms:.1f}")


def reasons(document: Document) -> list[str]:
    """Why times are missing, each reason once; which peers are less exact; what ~ means."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in document.rows:
        if row["status"] != "ok":
            found.setdefault((row["who"], row["status"], row["reason"]), []).append(row["name"])
    lines = []
    for (who, status, reason), names in found.items():
        where = names[0] if len(names) == 1 else f"{len(names)} cases, e.g. {names[0]}"
        lines.append(f"{who}: {status} ({where}): {reason}")
    errors: dict[tuple[str, str], list[float]] = {}
    for row in document.rows:
        if row["who"] != OURS and row["status"] == "ok" and row["precision"] != row["dtype"]:
            errors.setdefault((row["who"], row["precision"]), []).append(row["error_max"])
    for (who, precision), largest in errors.items():
        error = f"largest error {max(largest):.1e} of the largest output"
        lines.append(f"{who} computes in {precision}, {error}: not counted in the ratio")
    lines += beside(document)
    above = [row["name"] for row in document.rows if (row.get("roof_fraction") or 0) > ABOVE_ROOF]
    if above:
        lines.append(
            f"above its roof: {len(above)} cases, e.g. {above[0]}: the roofs were measured while "
            "the machine was busy, or the data stayed in caches"
        )
    if any(row.get("noisy") for row in document.rows):
        lines.append(
            "~ noisy: fewer than 3 calls, or the 80 % quantile above 1.25 times the 20 % quantile"
        )
    return lines


def beside(document: Document) -> list[str]:
    """How much the process changes our time: over the shortest of all processes."""
    factors: dict[str, list[float]] = {}
    for case in document.cases():
        timed = [row for row in case if "ours_ms" in row and row["who"] in PEERS]
        ours = {PEERS[row["who"]].process or row["who"]: row["ours_ms"] for row in timed}
        for process, ms in ours.items():
            factors.setdefault(process, []).append(ms / min(ours.values()))
    if len(factors) < 2 or document.settings.get("device") != "cpu":
        return []
    parts = [f"{median(values):.2f} beside {process}" for process, values in factors.items()]
    return [f"our time over its shortest of all processes, in the middle: {', '.join(parts)}"]


def comparison(before: Document, after: Document) -> list[str]:
    """What got faster or slower beyond noise.

    Beyond noise: the ranges from the 20 % to the 80 % quantile do not touch. The peers, which
    nobody changed, say how much the machine itself differs between the runs.
    """
    old, new = ({key(r): r for r in d.rows if r["status"] == "ok"} for d in (before, after))
    lines = []
    for fact in ("kind", "commit"):
        a, b = before.machine[fact], after.machine[fact]
        lines.append(f"{'machine' if fact == 'kind' else fact}: {a if a == b else f'{a} -> {b}'}")
    for name in ("threads", "caches", "device"):
        a, b = before.settings[name], after.settings[name]
        if a != b:
            lines.append(f"NOT COMPARABLE: {name}: {a} -> {b}")
    common = [k for k in old if k in new]
    drift = [new[k]["median_ms"] / old[k]["median_ms"] for k in common if k[-1] != OURS]
    if drift:
        lines.append(f"peers: {median(drift):.2f} times as long, median of {len(drift)} rows")
    mine = [k for k in common if k[-1] == OURS]
    changes = sorted(change for k in mine if (change := _change(old[k], new[k])))
    lines += ["", *(text for _, text in changes)]
    lines.append(f"{len(mine) - len(changes)} of {len(mine)} cases did not change beyond noise")
    for file, own, other in (("A", old, new), ("B", new, old)):
        only = [row["name"] for k, row in own.items() if k[-1] == OURS and k not in other]
        if only:
            lines.append(f"{len(only)} cases are in {file} alone, e.g. {only[0]}")
    return lines


def rates(document: Document) -> list[str]:
    """What the planner's cost model wants: multiplications and bytes per nanosecond and thread.

    Of rows under the roof that decides: the median, and the best.
    """
    threads = document.settings["threads"]
    found: dict[tuple[str, ...], list[float]] = {}
    for row in document.rows:
        if row["who"] == OURS and "roof" in row and row["kind"] != "networks":
            amount = row["multiplications"] if row["roof"] == "compute" else row["bytes"]
            per_ns = 1e-6 * amount / row["median_ms"] / threads
            what = "multiplications" if row["roof"] == "compute" else "bytes"
            found.setdefault((*row["algorithm"].split()[:2], what), []).append(per_ns)
    return [
        f"{backend:<8} {family:<10} {what:<16} median {median(values):6.1f}  "
        f"best {max(values):6.1f}  per ns and thread, of {len(values)}"
        for (backend, family, what), values in sorted(found.items())
    ]


def _change(old: Row, new: Row) -> tuple[float, str] | None:
    apart = new["q20_ms"] > old["q80_ms"] or new["q80_ms"] < old["q20_ms"]
    factor = old["median_ms"] / new["median_ms"]
    if not apart or abs(factor - 1) < CHANGED:
        return None
    word = "faster" if factor > 1 else "SLOWER"
    times = f"{old['median_ms']:.3f} -> {new['median_ms']:.3f} ms"
    a, b = old["algorithm"], new["algorithm"]
    return (
        factor,
        f"{factor:5.2f}x {word}  {new['name']}: {times}{'' if a == b else f' ({a} -> {b})'}",
    )


def _bytes(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"
