"""Counted networks and layers as a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .algorithms import Choice
from .counts import Counts, Number, Row
from .notation import by_x, layer_text

FORMS = ("table", "csv", "json")
_LEFT = ("layer", "convolution", "algorithm")


@dataclass(frozen=True)
class Line:
    """A row, its multiplications under other algorithms, its operations by a published rule."""

    row: Row
    choices: Mapping[str, Choice] = field(default_factory=dict)
    operations: int = 0


@dataclass(frozen=True)
class Report:
    """One target's lines; `note` says what was counted, `rule` by which published rule besides."""

    target: str
    note: str
    lines: list[Line]
    rule: str = ""


def total_choices(lines: Iterable[Line]) -> dict[str, Choice]:
    """What the layers' multiplications come to under each algorithm."""
    sums: dict[str, Counts] = {}
    for line in lines:
        for name, choice in line.choices.items():
            sums[name] = sums.get(name, Counts()) + choice.counts
    return {name: Choice((), counts) for name, counts in sums.items()}


def write(reports: Sequence[Report], form: str) -> str:
    """The reports in one of FORMS."""
    if form == "json":
        return json.dumps(
            [
                {"target": r.target, "note": r.note, "rows": [_record(r, x) for x in r.lines]}
                for r in reports
            ],
            indent=1,
        )
    if form == "csv":
        return _csv(reports)
    return "\n\n".join(map(_table, reports))


def _record(report: Report, line: Line) -> dict[str, Any]:
    row = line.row
    record: dict[str, Any] = {
        "layer": row.name,
        "kind": row.kind,
        "convolution": _convolution(row),
        "algorithm": row.algorithm,
        "parameters": row.parameters,
        **{key: _plain(value) for key, value in asdict(row.counts).items()},
        "saving": float(row.counts.saving),
        "arithmetic_intensity": row.counts.arithmetic_intensity,
    }
    for name, choice in line.choices.items():
        counts, key = choice.counts, name.replace(" ", "_").lower()
        record[f"{key}_tile"] = by_x([t.m for t in choice.transforms])
        record[f"{key}_multiplications"] = _plain(counts.multiplications)
        record[f"{key}_transform_multiplications"] = _plain(counts.transform_multiplications)
        record[f"{key}_transform_additions"] = _plain(counts.transform_additions)
        record[f"{key}_transform_shifts"] = _plain(counts.transform_shifts)
    if report.rule:
        record["rule"], record["operations"] = report.rule, line.operations
    return record


def _plain(value: Number) -> int | float:
    """A JSON number: an integer wherever the value is one."""
    return value if isinstance(value, int) else float(value)


def _csv(reports: Sequence[Report]) -> str:
    records = [{"target": r.target, **_record(r, line)} for r in reports for line in r.lines]
    columns = dict.fromkeys(key for record in records for key in record)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().rstrip("\n")


def _convolution(row: Row) -> str:
    if row.geometry is not None:
        return layer_text(row.geometry)
    if row.kind == "linear":
        return f"linear {row.w_shape[1]}-{row.w_shape[0]}"
    return by_x(row.w_shape)


def _table(report: Report) -> str:
    cells = [_cells(report, line) for line in report.lines]
    of_network = report.lines[-1].row.kind == "total"
    columns = [
        _aligned([name, *(line.get(name, "") for line in cells)], left=name in _LEFT)
        for name in dict.fromkeys(name for line in cells for name in line)
        # The rows of a single layer are all the same convolution.
        if any(line.get(name) for line in cells) and (of_network or name != "convolution")
    ]
    text = [f"{report.target}: {report.note}"]
    text += ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    if of_network:
        text += ["", *_summary(report)]
    return "\n".join(text)


def _aligned(column: Sequence[str], left: bool) -> list[str]:
    width = max(map(len, column))
    return [cell.ljust(width) if left else cell.rjust(width) for cell in column]


def _cells(report: Report, line: Line) -> dict[str, str]:
    row, c = line.row, line.row.counts
    cells = {
        "layer": row.name,
        "convolution": _convolution(row),
        "algorithm": row.algorithm,
        "params": short(row.parameters),
        "MACs": short(c.macs),
        "mults": short(c.multiplications),
        "saved": f"{float(c.saving):.1%}" if c.multiplications != c.macs else "",
        "t.add": short(c.transform_additions),
        "t.shift": short(c.transform_shifts),
        "t.mult": short(c.transform_multiplications),
        "weights": short(c.weight_bytes, "B"),
        "activ.": short(c.activation_bytes, "B"),
        "ops/byte": f"{c.arithmetic_intensity:.1f}" if c.macs else "",
    }
    for name, choice in line.choices.items():
        fewer = choice.counts.multiplications != c.macs
        title = name.removeprefix("winograd ")
        cells[title] = short(choice.counts.multiplications) if fewer else ""
    if report.rule:
        cells[report.rule] = short(line.operations)
    return cells


def _summary(report: Report) -> list[str]:
    """The total, exactly."""
    total, c = report.lines[-1], report.lines[-1].row.counts
    once = (
        c.filter_transform_additions,
        c.filter_transform_shifts,
        c.filter_transform_multiplications,
    )
    values: dict[str, Number] = {
        "parameters": total.row.parameters,
        "multiply-accumulates (direct)": c.macs,
        "multiplications": c.multiplications,
        "transform additions": c.transform_additions,
        "transform shifts": c.transform_shifts,
        "transform multiplications": c.transform_multiplications,
        "filter transforms, once": sum(once),
        "weight bytes": c.weight_bytes,
        "activation bytes": c.activation_bytes,
    }
    for name, choice in total.choices.items():
        values[f"multiplications, {name}"] = choice.counts.multiplications
    if report.rule:
        values[f"operations, rule {report.rule}"] = total.operations
    numbers = _aligned([f"{_plain(value):,}" for value in values.values()], left=False)
    width = max(31, *(len(title) + 2 for title in values))
    return [f"{title:<{width}}{number}" for title, number in zip(values, numbers, strict=True)]


def short(value: Number, unit: str = "") -> str:
    """Three digits and a prefix; nothing for 0."""
    if not value:
        return ""
    number, prefixes = float(value), iter(("k", "M", "G", "T", "P"))
    prefix = ""
    while number >= 999.5:
        number, prefix = number / 1000, next(prefixes, "E")
    digits = 0 if not prefix or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{prefix}{unit}"
