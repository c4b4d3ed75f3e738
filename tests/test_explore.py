"""The tiles of a network: every design is counted, the fronts are fronts, the report says so."""

from __future__ import annotations

import csv
import io
import json
from itertools import product

import pytest

from fastconv.cli import main
from fastconv.counts import Counts, count
from fastconv.explore import explore
from fastconv.geometry import Geometry
from fastconv.transforms import amplification, error_factor, transform

DENSE = Geometry.of((1, 32, 8, 14, 14), (32, 32, 3, 3, 3), padding=1)
TIME = Geometry.of((1, 16, 9, 14, 14), (16, 16, 3, 1, 1), padding=(1, 0, 0))
SPACE = Geometry.of((1, 16, 9, 13, 14), (16, 1, 1, 3, 3), padding=(0, 1, 1), groups=16)
POINTWISE = Geometry.of((1, 16, 9, 14, 14), (64, 16, 1, 1, 1))
STRIDED = Geometry.of((1, 8, 8, 14, 14), (8, 8, 3, 3, 3), stride=(1, 2, 2), padding=1)
DILATED = Geometry.of((1, 8, 8, 14, 14), (8, 8, 3, 3, 3), padding=2, dilation=2)
NETWORK = (DENSE, TIME, SPACE, POINTWISE, STRIDED, DILATED, TIME)
REST = Counts(macs=1000, multiplications=1000)
TILES = (2, 4)


def space(network=NETWORK, tiles=TILES):
    return explore(network, REST, tiles)


def test_the_direct_design_is_the_direct_algorithm():
    direct = next(d for d in space().uniform if d.tiles == (1, 1))
    assert direct.counts == sum((count(g) for g in NETWORK), REST)
    assert (direct.error, direct.bits) == (1.0, 0.0)


@pytest.mark.parametrize("pair", list(product((1, 2, 4), repeat=2)))
def test_a_pair_of_tiles_is_on_its_axes_or_the_layer_stays_direct(pair):
    (design,) = (d for d in space().uniform if d.tiles == pair)
    m1, m2 = pair
    wanted = [(m1, m2, m2), (m1, 1, 1), (1, m2, m2), (1, 1, 1), (m1, m2, m2), (1, 1, 1), (m1, 1, 1)]
    for geometry, option, ms in zip(NETWORK, design.layers, wanted, strict=True):
        assert option.counts.macs == geometry.macs
        if option.transforms:
            assert tuple(t.m for t in option.transforms) == ms
            assert option.counts.multiplications < geometry.macs
        else:
            assert option.counts == count(geometry)
            assert option.error == 1.0
    if m1 > 1 and m2 > 1:
        of_dense = design.layers[0]
        ts = [transform(m, 3) for m in (m1, m2, m2)]
        assert of_dense.counts == count(DENSE, "winograd", ts)
        assert of_dense.error == max(1.0, error_factor(ts, 32))
        worst = max(amplification(option.transforms) for option in design.layers)
        assert 2**design.bits == pytest.approx(worst)
        assert design.layers[2].transforms, "a depthwise layer is transformed too"


def test_the_mixed_front_is_the_least_at_every_bound():
    """Against every combination of pairs on three layers."""
    network = (DENSE, TIME, STRIDED)
    found = explore(network, Counts(), TILES)
    table = {
        (g, d.tiles): d.layers[i] for d in found.uniform for i, g in enumerate(network)
    }  # fmt: skip
    pairs = list(product((1, 2, 4), repeat=2))
    every = []
    for choice in product(pairs, repeat=3):
        options = [table[g, pair] for g, pair in zip(network, choice, strict=True)]
        error = max(o.error for o in options)
        every.append((error, sum(o.counts.multiplications for o in options)))
    for design in found.frontier:
        assert design.multiplications == min(m for e, m in every if e <= design.error)
    least = min(m for _, m in every)
    assert found.frontier[-1].multiplications == least
    errors = [d.error for d in found.frontier]
    assert errors == sorted(errors)


def test_no_pair_beats_one_of_the_front():
    found = space()
    front = found.pareto()
    for design in front:
        better = [
            d
            for d in found.uniform
            if d.multiplications < design.multiplications and d.error <= design.error
        ]
        assert better == []
    assert {d.tiles for d in front} <= {d.tiles for d in found.uniform}
    assert front[0].tiles is not None
    assert front[0].error == 1.0


@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
def test_the_plan_is_within_the_limit(limit):
    uniform, mixed = space().within(limit)
    assert max(uniform.error, mixed.error) <= limit
    assert mixed.multiplications <= uniform.multiplications


def test_a_network_without_convolutions():
    found = explore((), REST, TILES)
    assert {d.multiplications for d in found.uniform} == {1000}
    assert found.within(1)[1].error == 1.0


def test_the_command_in_every_form(capsys):
    pytest.importorskip("torch")
    assert main(["explore", "c3d@16x16x16", "--tiles", "2,4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(d["m1"], d["m2"]) for d in found["designs"] if d["kind"] == "uniform"} == set(
        product((1, 2, 4), repeat=2)
    )
    assert main(["explore", "c3d@16x16x16", "--tiles", "2,4", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["multiplications"]) for row in rows] == [
        d["multiplications"] for d in found["designs"]
    ]
    assert main(["explore", "c3d@16x16x16", "--tiles", "2,4", "--limit", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "c3d@16x16x16: input 1x3x16x16x16, whole tiles"
    assert "Fewest multiplications at an error bound of at most 3:" in lines
    assert any(line.startswith("trunk.conv1a ") for line in lines)


def test_ideal_tiles_are_those_of_the_paper(capsys):
    """F(4,3) x F(4x4,3x3) on FSB-C3D, linear layers left out: the hybrid fast algorithm's count."""
    pytest.importorskip("torch")
    from fastconv.published import READINGS
    from fastconv.targets import of_reading

    reading = READINGS["C3D", "FSB-only, middle = input"]
    geometries = [layer.geometry for layer in of_reading(reading).layers()]
    found = explore(geometries, Counts(), (4,), whole_tiles=False)
    (design,) = (d for d in found.uniform if d.tiles == (4, 4))
    assert design.multiplications == 15_406_741_504


def test_a_plot_is_drawn(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    path = tmp_path / "c3d.png"
    assert main(["explore", "c3d@16x16x16", "--tiles", "2", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


WRONG = [
    (["explore", "x4d"], 1, "explore: 'x4d' is no network. Networks: c3d, "),
    (["explore", "c3d@4x4x4"], 1, "count: c3d does not take 4x4x4: "),
    (["explore", "c3d", "--limit", "0.5"], 2, "expected a number of at least 1, got '0.5'"),
    (["explore", "c3d", "--limit", "x"], 2, "expected a number of at least 1, got 'x'"),
    (["explore", "c3d", "--plot", "no/such/folder/x.png"], 1, "explore: no folder no/such/folder"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_mistakes_are_told_in_one_line(arguments, code, message, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    try:
        got = main(arguments)
    except SystemExit as stop:
        got = stop.code
    err = capsys.readouterr().err
    assert got == code
    assert message in err
    assert err.count("\n") == 1
