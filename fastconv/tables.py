"""`python -m fastconv tables`: the papers' tables, counted here beside printed there."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib import resources
from itertools import groupby
from math import floor
from typing import Any

from .errors import UnsupportedError
from .table_values import Value, macs, value_of

PAPERS = {
    "efficient": "Kopuklu et al., Resource Efficient 3D Convolutional Neural Networks, ICCVW 2019",
    "dissected": "Kopuklu et al., Dissected 3D CNNs, CVIU 2022",
    "continual": "Hedegaard and Iosifidis, Continual 3D Convolutional Neural Networks, ECCV 2022",
    "fsb": "Design Light-weight 3D Convolutional Networks for Video Recognition, arXiv 1905.13388",
    "mfnet": "Chen et al., Multi-Fiber Networks for Video Recognition, ECCV 2018",
}
FORMS = ("markdown", "csv", "json")
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "x": 1, "": 1}
INTRODUCTION = """\
# The papers' tables

Made by `python -m fastconv tables`; only the printed figures and the reasons are typed by hand
(`fastconv/published.csv`). Every network is built from `fastconv.zoo` and counted without running
it. *Equal*: the exact figure, rounded to the digits printed, is the printed one; *equal, cut off*:
it is if the digits behind are dropped. Otherwise the difference and, where it is known, the reason.

What papers call FLOPs are operations by rules that differ (`python -m fastconv count --help`): the
column *operations* follows the paper's rule, *multiplications* are multiply-accumulates alone."""
ABOUT = {
    "efficient": "Operations by rule thop, in the earlier table thop-2019.",
    "dissected": "Operations by rule thop-2019. D-ResNets are counted for one step of the stream, "
    "all networks without their classifier.",
    "continual": "Operations by rule ptflops. Continual networks are counted for one step; a final "
    "pooling over more frames than the clip adds 432 operations, X3D's channels there, per frame.",
    "fsb": "The figures of C3D agree with each other, but no map sizes tried give them, and the "
    "SlowFast that is compared with is not published: several readings stand beside each figure. "
    "Multiplications under fast algorithms are counted with ideal tiles, as in the paper.",
    "mfnet": "Operations by rule mfnet. Where the paper prints no layers or widths of a network, "
    "the figures are those of a reading.",
}


@dataclass(frozen=True)
class Cell:
    """One printed figure, and why it differs where that is known."""

    paper: str
    table: str
    model: str
    variant: str
    quantity: str
    printed: str
    why: str

    @property
    def value(self) -> Value:
        """The exact figure."""
        return value_of(self.paper, self.table, self.model, self.variant, self.quantity)

    @property
    def verdict(self) -> str:
        """'equal', 'equal, cut off', or the difference in per cent of the printed figure."""
        return compared(self.printed, self.value)


def compared(printed: str, value: Value) -> str:
    """How an exact value agrees with a printed figure of some digits and a unit."""
    digits = printed.rstrip("KMGx").replace(",", "")
    unit = UNITS[printed[len(printed.rstrip("KMGx")) :]]
    step = Fraction(unit, 10 ** len(digits.partition(".")[2]))
    target, exact = Fraction(digits) * unit, Fraction(value)
    if abs(exact - target) <= step / 2:
        return "equal"
    if floor(exact / step) * step == target:
        return "equal, cut off"
    return f"{float(100 * (exact - target) / target):+.2f} %"


@lru_cache(maxsize=1)
def cells() -> tuple[Cell, ...]:
    """Every printed figure, paper by paper, in the order of its table."""
    text = resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(Cell(**row) for row in csv.DictReader(text.splitlines()))


def run(papers: Iterable[str] = (), form: str = "markdown") -> str:
    """The tables of some papers, of all without any, in one of FORMS.

    Raises UnsupportedError for a paper that is not in PAPERS, BackendError without PyTorch.
    """
    wanted = list(papers) or list(PAPERS)
    for paper in wanted:
        if paper not in PAPERS:
            raise UnsupportedError(f"tables: unknown paper {paper!r}. Known: {', '.join(PAPERS)}")
    chosen = [cell for cell in cells() if cell.paper in wanted]
    if form == "json":
        return json.dumps(list(map(_record, chosen)), indent=1)
    if form == "csv":
        return _csv(chosen)
    return "\n".join(_document(chosen))


def _record(cell: Cell) -> dict[str, Any]:
    value = cell.value
    number = float(value) if isinstance(value, Fraction) else value
    shown = {k: getattr(cell, k) for k in ("paper", "table", "model", "variant", "quantity")}
    verdict = {"printed": cell.printed, "value": number, "verdict": cell.verdict, "why": cell.why}
    return {**shown, **verdict}


def _csv(chosen: Iterable[Cell]) -> str:
    records = list(map(_record, chosen))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().rstrip("\n")


def _document(chosen: Iterable[Cell]) -> Iterator[str]:
    yield INTRODUCTION
    for paper, of_paper in groupby(chosen, key=lambda cell: cell.paper):
        yield f"\n## {PAPERS[paper]}\n\n{ABOUT[paper]}"
        for table, of_table in groupby(of_paper, key=lambda cell: cell.table):
            yield f"\n### {_title(table)}\n"
            yield from _table(list(of_table))


def _title(table: str) -> str:
    if table.startswith("earlier"):
        return f"Table {table.split()[1]}, as the code's page had it before October 2021"
    return table.capitalize() if table.startswith("section") else f"Table {table}"


def _table(of_table: list[Cell]) -> Iterator[str]:
    """A line per network, three columns per quantity, and the reasons below."""
    quantities = list(dict.fromkeys(cell.quantity for cell in of_table))
    counted = "operations" in quantities
    header = ["network", "variant"]
    for quantity in quantities:
        header += [f"{quantity}, printed", "here", ""]
    header += ["multiplications"] * counted
    reasons = list(dict.fromkeys(cell.why for cell in of_table if cell.why))
    lines = [header, ["---"] * 2 + ["---:", "---:", "---"] * len(quantities) + ["---:"] * counted]
    for (model, variant), group in groupby(of_table, key=lambda cell: (cell.model, cell.variant)):
        found = {cell.quantity: cell for cell in group}
        line = [model, variant]
        for quantity in quantities:
            line += _columns(found.get(quantity), reasons)
        if counted:
            line.append(f"{macs(model, variant):,}")
        lines.append(line)
    yield from (f"| {' | '.join(line)} |" for line in lines)
    if reasons:
        yield ""
        yield from (f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))


def _columns(cell: Cell | None, reasons: list[str]) -> list[str]:
    if cell is None:
        return ["", "", ""]
    mark = f"({reasons.index(cell.why) + 1})" if cell.why else ""
    return [cell.printed, written(cell.value), f"{cell.verdict} {mark}".strip()]


def written(value: Value) -> str:
    """An integer with its thousands apart, a rate with three digits behind the point."""
    if value.denominator == 1:
        return f"{int(value):,}"
    return f"{float(value):.3f}" if value < 1000 else f"{float(value):,.1f}"
