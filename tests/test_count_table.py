"""`python -m fastconv count`: how layers are written, and the three forms of the answer."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given

from cases import geometries
from fastconv.cli import main
from fastconv.count_table import Options, layer_text, parse_layer, run
from fastconv.counts import count
from fastconv.errors import GeometryError, UnsupportedError
from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.transforms import transform

LAYER = "conv2d:64-128:3x3@8x8:p1"
WRITTEN = [
    (LAYER, Geometry.of((1, 64, 8, 8), (128, 64, 3, 3), padding=1)),
    (
        "conv3d:6-6:3x1x2@9x9x9:p0x1x2:g6:s1x2x2:n4:d2",
        Geometry.of((4, 6, 9, 9, 9), (6, 1, 3, 1, 2), (1, 2, 2), (0, 1, 2), 2, 6),
    ),
    ("conv1d:8-8:4@100:psame", Geometry.of((1, 8, 100), (8, 8, 4), padding="same")),
    ("conv1d:8-8:4@100:pvalid", Geometry.of((1, 8, 100), (8, 8, 4))),
    (
        "conv2d:1-1:3x3@5x5:p1+2",
        Geometry.of((1, 1, 5, 5), (1, 1, 3, 3), padding=((1, 2), (1, 2))),
    ),
    (
        "conv2d:1-1:3x3@5x5:p1x0+2",
        Geometry.of((1, 1, 5, 5), (1, 1, 3, 3), padding=((1, 1), (0, 2))),
    ),
    (
        "separable:3-4-5:3x3x3@8x9x9:s1x2x2:p1:n2",
        SeparableGeometry.of(
            (2, 3, 8, 9, 9), (4, 3, 3, 1, 1), (4, 1, 1, 3, 3), (5, 4, 1, 1, 1), (1, 2, 2), 1
        ),
    ),
]


@pytest.mark.parametrize(("text", "geometry"), WRITTEN)
def test_a_layer_is_read(text, geometry):
    assert parse_layer(text) == geometry


@given(geometries(max_stride=3, max_dilation=3))
def test_a_geometry_written_is_read_back(geometry):
    assert parse_layer(layer_text(geometry)) == geometry


MISTAKES = [
    (
        "conv2d:4:3x3@8x8",
        "layer 'conv2d:4:3x3@8x8' is not written like conv3d:64-128:3x3x3@16x56x56",
    ),
    ("conv2d:4-8:3x3@8x8:q1", "is not written like"),
    ("conv4d:4-8:3x3@8x8", "is not written like"),
    ("conv2d:4-8:3x3@8x8:p1:p2", "layer 'conv2d:4-8:3x3@8x8:p1:p2' has an option twice"),
    ("conv2d:4-8:3@8x8", "conv2d needs 2 channels and 2 extents, got 'conv2d:4-8:3@8x8'"),
    ("conv2d:4-8-8:3x3@8x8", "conv2d needs 2 channels and 2 extents"),
    ("separable:4-8:3x3x3@8x8x8", "separable needs 3 channels and 3 extents"),
    ("separable:4-8-8:3x3x3@8x8x8:d2", "separable takes no dilation and no groups"),
    (
        "conv2d:4-8:3xx3@8x8",
        "expected whole numbers joined by 'x', got '3xx3' in 'conv2d:4-8:3xx3@8x8'",
    ),
    ("conv2d:4-8:3x3@8x8:g2x2", "expected one whole number, got 'g2x2'"),
    ("conv2d:4-8:3x3@8x8:p1+2+3", "expected padding BEFORE+AFTER per axis, got 'p1+2+3'"),
    ("conv2d:4-8:3x3@8x8:g0", "conv2d: groups must be an integer of at least 1, got 0"),
    ("conv2d:4-8:3x3@8x8:g3", "conv2d: 4 input channels do not divide into 3 groups"),
    ("conv2d:4-8:3x3@2x2", "conv2d: axis 0 has 2 inputs and padding (0, 0), but kernel 3"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_in_a_layer_is_told(text, message, capsys):
    with pytest.raises(GeometryError) as caught:
        run([text], "table", Options((2, 4)))
    assert message in str(caught.value)
    assert main(["count", text]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_target_is_told_what_there_is():
    with pytest.raises(UnsupportedError, match="'x4d' is neither a network nor a layer") as caught:
        run(["x4d"], "table", Options((2, 4)))
    assert "x3d_m" in str(caught.value)
    assert "conv3d:64-128:3x3x3@16x56x56" in str(caught.value)


def test_a_layer_is_counted_under_each_algorithm():
    (report,) = json.loads(run([LAYER], "json", Options((2, 4))))
    assert report["target"] == LAYER
    geometry = parse_layer(LAYER)
    names = ["direct", "winograd F(2x2, 3x3)", "winograd F(4x4, 3x3)"]
    assert [row["algorithm"] for row in report["rows"]] == names
    for row, m in zip(report["rows"][1:], (2, 4), strict=True):
        want = count(geometry, "winograd", [transform(m, 3)] * 2)
        assert row["multiplications"] == want.multiplications
        assert row["transform_additions"] == want.transform_additions
        assert row["saving"] == float(want.saving)
        assert row["parameters"] == 128 * 64 * 9


@pytest.mark.parametrize(
    ("layer", "algorithms"),
    [
        ("conv2d:8-8:3x3@8x8:g8", ["direct"]),
        ("conv2d:8-8:1x1@8x8", ["direct"]),
        ("conv1d:8-8:30@64", ["direct"]),
        ("conv2d:8-8:30x3@64x64", ["direct", "winograd F(1x2, 30x3)", "winograd F(1x3, 30x3)"]),
        (
            "separable:8-8-8:3x3x3@8x8x8",
            ["direct", *(f"hfa F({a}x{b}x{b}, 3x3x3)" for a in (2, 3) for b in (2, 3))],
        ),
    ],
)
def test_only_algorithms_that_serve_a_layer_are_listed(layer, algorithms):
    (report,) = json.loads(run([layer], "json", Options((2, 3))))
    assert [row["algorithm"] for row in report["rows"]] == algorithms


def test_the_table_of_a_layer():
    assert run(["conv1d:2-4:1@1000"], "table", Options((2,))).splitlines() == [
        "conv1d:2-4:1@1000: under each algorithm",
        "algorithm  params   MACs  mults  weights  activ.  ops/byte",
        "direct          8  8.00k  8.00k      32B  24.0kB       0.7",
    ]


def test_a_network_in_every_form(capsys):
    pytest.importorskip("torch")
    assert main(["count", "x3d_m", "c3d@64x112x112", "--json"]) == 0
    x3d, c3d = json.loads(capsys.readouterr().out)
    assert (x3d["note"], c3d["note"]) == (
        "input 1x3x16x224x224, float32",
        "input 1x3x64x112x112, float32",
    )
    total = x3d["rows"][-1]
    assert (total["parameters"], total["macs"]) == (3_794_322, 4_732_468_736)
    convolutions = sum(row["macs"] for row in c3d["rows"] if row["kind"] == "conv")
    assert convolutions == 153_986_531_328
    for row in x3d["rows"]:
        if row["kind"] == "conv":
            assert parse_layer(row["convolution"]).macs == row["macs"]

    assert main(["count", "x3d_m", "c3d@64x112x112", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["target"], row["macs"]) for row in rows] == [
        (report["target"], str(row["macs"])) for report in (x3d, c3d) for row in report["rows"]
    ]

    assert main(["count", "x3d_m"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "multiply-accumulates (direct)  4,732,468,736" in lines
    assert f"multiplications                {total['multiplications']:,}" in lines


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("x3d_m@4x4", "count: expected x3d_m@FRAMESxHEIGHTxWIDTH, got 'x3d_m@4x4'"),
        ("x3d_m@0x4x4", "count: expected x3d_m@FRAMESxHEIGHTxWIDTH, got 'x3d_m@0x4x4'"),
        ("c3d@4x4x4", "count: c3d does not take 4x4x4: "),
    ],
)
def test_a_clip_no_network_takes_is_told(target, message):
    pytest.importorskip("torch")
    with pytest.raises(GeometryError) as caught:
        run([target], "table", Options((2, 4)))
    assert str(caught.value).startswith(message)


def count_json(capsys, *arguments):
    assert main(["count", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_network_under_each_algorithm_and_rule(capsys):
    pytest.importorskip("torch")
    (report,) = count_json(capsys, "c3d@64x112x112", "--ideal-tiles", "--tiles", "4")
    *rows, total = report["rows"]
    dense = [row for row in rows if row["kind"] == "conv"]
    assert {row["winograd_3d_tile"] for row in dense} == {"4x4x4"}
    assert sum(row["winograd_3d_multiplications"] for row in dense) == 19_248_316_416
    for name in ("winograd_1d", "winograd_2d", "winograd_3d", "hfa"):
        of_rows = sum(row[f"{name}_multiplications"] for row in rows)
        assert of_rows == total[f"{name}_multiplications"]
    assert total["hfa_multiplications"] == total["macs"], "C3D has nothing separable"

    (report,) = count_json(capsys, "shufflenet3d_v1_x0_5", "--rule", "thop")
    assert report["rows"][-1]["operations"] == 77_781_744
    assert sum(row["operations"] for row in report["rows"][:-1]) == 77_781_744
    assert main(["count", "shufflenet3d_v1_x0_5", "--rule", "thop"]) == 0
    out = capsys.readouterr().out
    assert "operations, rule thop          77,781,744" in out.splitlines()


def test_a_rule_counts_what_has_no_parameters(capsys):
    pytest.importorskip("torch")
    (report,) = count_json(capsys, "squeezenet3d", "--rule", "thop-2019")
    assert report["rows"][-1]["operations"] == 728_498_048
    (report,) = count_json(capsys, "test_count_table:plain@3x8x8", "--rule", "thop")
    assert [row["layer"] for row in report["rows"]] == ["0", "(other)", "total"]
    assert [row["operations"] for row in report["rows"]] == [64 * 4 * 28, 256, 64 * 4 * 29]


def plain():
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())


def test_a_step_of_a_stream(capsys):
    pytest.importorskip("torch")
    (report,) = count_json(capsys, "x3d_m", "--per-frame", "--rule", "ptflops")
    total = report["rows"][-1]
    assert (total["macs"], total["operations"]) == (297_525_776, 325_456_057)
    stem = report["rows"][1]
    assert stem["convolution"] == "conv3d:24-24:5x1x1@5x112x112:g24"
    assert main(["count", "x3d_m", "--per-frame", "--rule", "thop"]) == 1
    assert capsys.readouterr().err == "fastconv: count: only rule ptflops counts steps, not thop\n"


def test_a_network_that_cannot_be_continual_has_no_step(capsys):
    pytest.importorskip("torch")
    assert main(["count", "rcn_18", "--per-frame"]) == 1
    assert capsys.readouterr().err == (
        "fastconv: count: rcn_18 has no step of a stream: to_continual: trunk.stem "
        "(RecurrentUnit), split: takes the frames of a clip apart\n"
    )


@pytest.mark.parametrize("target", ["package.models:make", "package.models:make@3x8", "m:f@"])
def test_a_model_needs_an_input(target, capsys):
    assert main(["count", target]) == 1
    name = target.split("@")[0]
    assert capsys.readouterr().err == (
        f"fastconv: count: expected {name}@CHANNELSx[FRAMESx]HEIGHTxWIDTH, got {target!r}\n"
    )


def test_networks_for_images(capsys):
    pytest.importorskip("torch")
    small, whole = count_json(capsys, "resnet18@112x112", "resnet18")
    assert whole["rows"][-1]["macs"] == 1_814_073_344
    assert small["note"] == "input 1x3x112x112, float32"
    assert small["rows"][-1]["macs"] < whole["rows"][-1]["macs"]


MODELS = [
    ("test_count_table:plain@3x8x8", None),
    ("test_count_table:missing@3x8x8", "test_count_table:missing cannot be imported: module "),
    ("no_such_module:net@3x8x8", "no_such_module:net cannot be imported: No module named"),
    ("builtins:int@3x8x8", "builtins:int made a int, not a torch.nn.Module"),
    ("test_count_table:count_json@3x8x8", "test_count_table:count_json made no model without "),
    ("test_count_table:plain@4x8x8", "test_count_table:plain does not take 8x8: "),
    ("resnet18@8x8x8", "expected resnet18@HEIGHTxWIDTH, got 'resnet18@8x8x8'"),
]


@pytest.mark.parametrize(("target", "message"), MODELS)
def test_models_of_ones_own(target, message, capsys):
    pytest.importorskip("torch")
    code = main(["count", target])
    out, err = capsys.readouterr()
    if message is None:
        assert code == 0
        assert "multiply-accumulates (direct)  6,912" in out
    else:
        assert code == 1
        assert err.startswith(f"fastconv: count: {message}")
        assert err.count("\n") == 1


def test_rules_are_for_networks(capsys):
    assert main(["count", LAYER, "--rule", "thop"]) == 1
    assert "rules are for networks" in capsys.readouterr().err
