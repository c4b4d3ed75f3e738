"""The papers' tables: exact figures, verdicts, and docs/tables.md as the command writes it."""

from __future__ import annotations

import csv
import io
import json
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("torch")

from fastconv import tables
from fastconv.cli import main
from fastconv.errors import UnsupportedError
from fastconv.tables import PAPERS, cells, compared, written

ROOT = Path(__file__).parent.parent
with (ROOT / "tests" / "data" / "oracle.csv").open(newline="", encoding="utf-8") as file:
    ORACLE = list(csv.DictReader(file))
QUANTITIES = {
    "params": ("params", "weights"),
    "flops_paper_rule": ("operations",),
    "flops_paper_rule_2019": ("operations",),
    "macs": ("macs",),
    "multiplications": ("multiplications",),
    "layers": ("layers",),
    "nonlinearities": ("nonlinearities",),
    "skip_connections": ("skips",),
    "receptive_field": ("receptive field",),
    "aggregated_padding": ("padding",),
    "init_frames": ("start-up frames",),
    "worst_case_memory_floats": ("memory",),
}
PAPER = {"efficient": "003", "dissected": "000", "continual": "001", "fsb": "002", "mfnet": "004"}


@pytest.fixture(scope="module")
def document():
    return tables.run()


def test_the_page_is_what_the_command_writes(document):
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    assert page == document + "\n", "run: python -m fastconv tables > docs/tables.md"


def measured(cell):
    """What was measured on the original code for a printed figure."""
    return {
        int(row["measured_from_original_code"])
        for row in ORACLE
        if (row["paper"], row["model"], row["variant"])
        == (PAPER[cell.paper], cell.model, cell.variant)
        and cell.quantity in QUANTITIES.get(row["quantity"], ())
        and cell.printed in row["printed"]
        and row["measured_from_original_code"]
    }


def test_exact_figures_are_the_measured_ones(document):
    checked = 0
    for cell in cells():
        want = measured(cell)
        if want:
            assert want == {cell.value}, cell
            checked += 1
    assert checked == 161, "the others are readings of one figure, or of a figure by another rule"


def test_every_printed_figure_is_there():
    """By paper and figure: variants are named otherwise where several readings compete."""
    ours = {(PAPER[cell.paper], cell.printed) for cell in cells()}
    for row in ORACLE:
        for printed in row["printed"].replace(" (older README image)", "").split(" / "):
            assert printed == "see note" or (row["paper"], printed) in ours, row


def test_every_difference_has_a_reason(document):
    for cell in cells():
        assert cell.verdict.startswith("equal") or cell.why, cell


@pytest.mark.parametrize(
    ("printed", "value", "verdict"),
    [
        ("0.55M", 545_772, "equal"),
        ("25.5M", 25_557_032, "equal, cut off"),
        ("111331M", 111_331_961_328, "equal, cut off"),
        ("66.25M", 34_566_488, "-47.82 %"),
        ("166,565K", 166_565_305, "equal"),
        ("166,565K", 166_566_500, "+0.00 %"),
        ("69", 69, "equal"),
        ("69", 70, "+1.45 %"),
        ("13.3x", Fraction(1338, 100), "equal, cut off"),
        ("199.9G", 153_986_531_328, "-22.97 %"),
    ],
)
def test_verdicts(printed, value, verdict):
    assert compared(printed, value) == verdict


def test_figures_are_written_readably():
    assert written(1_234_567) == "1,234,567"
    assert written(Fraction(44_087_945_216, 3)) == "14,695,981,738.7"
    assert written(Fraction(1338, 100)) == "13.380"


def test_one_paper_in_every_form(capsys):
    assert main(["tables", "mfnet", "--json"]) == 0
    of_json = json.loads(capsys.readouterr().out)
    assert main(["tables", "mfnet", "--csv"]) == 0
    of_csv = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["printed"] for row in of_csv] == [row["printed"] for row in of_json]
    assert {row["paper"] for row in of_json} == {"mfnet"}
    (row,) = (r for r in of_json if (r["table"], r["model"]) == ("3", "MF-Net-18 3D")
              and r["quantity"] == "operations")  # fmt: skip
    assert (row["value"], row["verdict"]) == (11_062_007_808, "equal")
    assert main(["tables", "mfnet"]) == 0
    out = capsys.readouterr().out
    assert f"## {PAPERS['mfnet']}" in out
    assert PAPERS["fsb"] not in out


def test_an_unknown_paper_is_told(capsys):
    with pytest.raises(UnsupportedError, match="unknown paper 'x'. Known: efficient, dissected,"):
        tables.run(["x"])
    assert main(["tables", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
