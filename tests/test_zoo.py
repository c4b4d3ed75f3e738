"""The zoo's networks are the papers' networks, parameters and counts to the integer."""

from __future__ import annotations

import ast
import csv
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastconv.zoo
from fastconv import video
from fastconv.bench.cases import table as bench_cases
from fastconv.counts import network_counts
from fastconv.nn.trace import one_step, trace
from fastconv.published import READINGS, Reading, given
from fastconv.zoo import CONTINUAL, NETWORKS, build
from fastconv.zoo.c3d import c3d
from networks import small, small_input

DATA = Path(__file__).parent / "data" / "oracle.csv"  # the papers' tables, and measured values
with DATA.open(newline="", encoding="utf-8") as file:
    ORACLE = list(csv.DictReader(file))
MEASURED = "measured_from_original_code"


def on_meta(name, **options):
    with torch.device("meta"):
        return build(name, **options)


def rms(values):
    return values.square().mean().sqrt().item()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def counted(reading):
    """Parameters, weights of convolutions and linear layers, and multiply-accumulates."""
    shape = reading.input_shape or NETWORKS[reading.network].input_shape
    with torch.device("meta"):
        part = build(reading.network, **dict(reading.options)).get_submodule(reading.part)
        if reading.without:
            part.set_submodule(reading.without, torch.nn.Identity())
        layers = trace(part, torch.empty(1, *shape))
    if reading.per_frame:
        layers = [one_step(layer) for layer in layers]
    weights = {layer.name: prod(layer.w_shape) for layer in layers}
    return parameters(part), sum(weights.values()), sum(layer.macs for layer in layers)


BUILT = [
    row
    for row in ORACLE
    if (row["model"], row["variant"]) in READINGS and row["quantity"] in ("params", "macs")
]


# Readings, of networks published nowhere, that do not have the printed size.
UNPUBLISHED = {("RCU8", ""), ("MF-Net 2D", "N=12"), ("MF-Net 2D", "N=24")}


@pytest.mark.parametrize(
    ("model", "variant"), dict.fromkeys((row["model"], row["variant"]) for row in BUILT)
)
def test_the_published_network_to_the_integer(model, variant):
    params, weights, macs = counted(READINGS[model, variant])
    rows = [row for row in BUILT if (row["model"], row["variant"]) == (model, variant)]
    for row in rows:
        # Paper 002 compares convolutions' weights, without biases.
        ours = macs if row["quantity"] == "macs" else weights if "C3D" in model else params
        if row[MEASURED]:
            assert ours == int(row[MEASURED]), row["quantity"]
        elif row["quantity"] == "params" and (model, variant) not in UNPUBLISHED:
            assert rounds_to(ours, row["printed"]), row["quantity"]


def rounds_to(value, printed):
    """Whether a printed figure with its unit, as in 2.92M, is this value."""
    number, unit = float(printed[:-1]), {"K": 1e3, "M": 1e6, "G": 1e9}[printed[-1]]
    digits = len(printed[:-1].partition(".")[2])
    return round(value / unit, digits) == number


def test_every_network_of_the_papers_is_built():
    assert {
        (row["model"], row["variant"]) for row in ORACLE if row["quantity"] in ("params", "macs")
    } <= set(READINGS)
    known = {row["model"] for row in ORACLE}
    assert {model for model, _ in READINGS} <= known


@pytest.mark.parametrize("name", NETWORKS)
def test_multiplications_are_those_of_the_framework(name):
    with torch.device("meta"):
        model, x = build(name).eval(), torch.empty(1, *NETWORKS[name].input_shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        total = network_counts(trace(model, x), tiles=())[-1].counts
    assert total.multiplications == total.macs
    assert 2 * total.macs == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "want"),
    # As torchvision states them: parameters to the digit, multiply-accumulates in units of 1e6.
    [
        ("r3d_18", (33_371_472, 40_697)),
        ("r2plus1d_18", (31_505_325, 40_519)),
        ("s3d", (8_320_048, 17_979)),
    ],
)
def test_networks_of_torchvision(name, want):
    params, _, macs = counted(Reading(name))
    assert (params, round(macs / 1e6)) == want


def test_the_channel_separated_network_has_its_published_size():
    params, _, _ = counted(Reading("csn_r101"))
    assert rounds_to(params, "22.21M")


@pytest.mark.parametrize(
    ("middles", "macs"),
    [
        ("table 4", 18_952_478_720),
        ("input", 22_321_094_656),
        ("output", 29_666_058_240),
        ((0, 128, 256, 256, 512, 512, 512, 512), 29_614_678_016),
    ],
)
def test_readings_of_fully_separable_c3d(middles, macs):
    clip = (64, 112, 112)
    options = given(clip=clip, middles=middles)
    assert counted(Reading("fsb_c3d", (3, *clip), "trunk", options))[2] == macs


def test_c3d_has_eight_convolutions():
    model = on_meta("c3d", clip=(64, 112, 112))
    layers = trace(model, torch.empty(1, 3, 64, 112, 112, device="meta"))
    assert len([layer for layer in layers if layer.kind == "conv"]) == 8


def test_statistics_make_up_the_printed_size_of_the_2d_multi_fiber_network():
    model = on_meta("mfnet2d")
    kept = [b.numel() for name, b in model.named_buffers() if "running" in name]
    assert parameters(model) + sum(kept) == 5_753_240


def test_c3d_has_the_classifier_of_the_paper():
    model = on_meta("c3d")
    layers = trace(model, torch.empty(1, 3, 16, 112, 112, device="meta"))
    linear = [layer.w_shape for layer in layers if layer.kind == "linear"]
    assert linear == [(4096, 8192), (4096, 4096), (487, 4096)]


def test_x3d_layers_are_those_of_the_table():
    x = torch.empty(1, 3, 16, 312, 312, device="meta")
    layers = {layer.name: layer for layer in trace(on_meta("x3d_l"), x)}
    sizes = [layers[f"stages.s{i}.0.depthwise.conv"].y_shape[2:] for i in (2, 3, 4, 5)]
    assert layers["stem.space"].y_shape == (1, 24, 16, 156, 156)
    assert sizes == [(16, 78, 78), (16, 39, 39), (16, 20, 20), (16, 10, 10)]
    assert layers["stem.time"].w_shape == (24, 1, 5, 1, 1)
    assert layers["stem.time"].groups == 24
    gated = [i for i in range(15) if f"stages.s5.{i}.excite.gate.reduce" in layers]
    assert gated == [0, 2, 4, 6, 8, 10, 12, 14]
    assert layers["stages.s5.14.excite.gate.reduce"].w_shape == (32, 432, 1, 1, 1)


FIRST = ("c3d", "x3d_xs", "x3d_s", "x3d_m", "x3d_l")


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(FIRST)))
def test_small_clips_come_out_as_finite_logits(name):
    model, x = small(name, num_classes=7), small_input(name, batch=2)
    with torch.no_grad():
        logits = model(x)
        one = model(x[1:])
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert 0.02 < logits.std().item() < 10
    torch.testing.assert_close(one, logits[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FIRST)
def test_logits_and_activations_stay_of_order_one(name):
    # C3D at its own size: on small clips most taps of its last layers fall on padding.
    clip = (16, 112, 112) if name == "c3d" else (4, 64, 64)
    model = build(name).eval()
    sizes = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Linear):
            module.register_forward_hook(lambda m, x, y: sizes.append(rms(y)))
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *clip, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (1, 487 if name == "c3d" else 400)
    assert torch.isfinite(logits).all()
    assert 0.2 < logits.std().item() < 5
    # A residual branch ends small on purpose, and the gates' convolutions see averages.
    assert min(sizes) > 0.02
    assert max(sizes) < 10


FAMILIES = {network.family: name for name, network in NETWORKS.items()}


@pytest.mark.parametrize("name", sorted({"c3d", "x3d_s", *FAMILIES.values()}))
def test_weights_follow_the_seed_alone(name):
    torch.manual_seed(1)
    first = small(name, seed=3).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "building must not draw from the caller's stream"
    again, other = small(name, seed=3).state_dict(), small(name, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    learned = [key for key in first if not key.endswith("num_batches_tracked")]
    assert all(not torch.equal(first[key], other[key]) for key in learned), "a tensor is not drawn"


def test_every_layer_of_a_residual_network_reaches_the_logits():
    model = small("x3d_l")
    x = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        for name in ("stages.s2.1", "stages.s4.7", "stages.s5.14"):
            weight = model.get_submodule(name).depthwise.conv.weight
            kept = weight.clone()
            weight.zero_()
            assert (model(x) - before).std() > 0.01 * before.std()
            weight.copy_(kept)


def test_networks_take_another_number_of_classes():
    assert small("x3d_xs", num_classes=7)(torch.zeros(2, 3, 2, 32, 32)).shape == (2, 7)
    assert small("c3d", num_classes=7)(torch.zeros(2, 3, 16, 16, 16)).shape == (2, 7)


def test_state_dict_names_are_stable():
    trunk = [f"trunk.conv{i}" for i in ("1a", "2a", "3a", "3b", "4a", "4b", "5a", "5b")]
    layers = [*trunk, "classifier.fc6", "classifier.fc7", "classifier.fc8"]
    assert list(on_meta("c3d").state_dict()) == [
        f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    ]
    keys = [key for key in on_meta("x3d_m").state_dict() if key.endswith(("weight", "bias"))]
    assert keys[:20] == [
        "stem.space.weight",
        "stem.time.weight",
        "stem.bn.weight",
        "stem.bn.bias",
        "stages.s2.0.expand.conv.weight",
        "stages.s2.0.expand.bn.weight",
        "stages.s2.0.expand.bn.bias",
        "stages.s2.0.depthwise.conv.weight",
        "stages.s2.0.depthwise.bn.weight",
        "stages.s2.0.depthwise.bn.bias",
        "stages.s2.0.excite.gate.reduce.weight",
        "stages.s2.0.excite.gate.reduce.bias",
        "stages.s2.0.excite.gate.expand.weight",
        "stages.s2.0.excite.gate.expand.bias",
        "stages.s2.0.project.conv.weight",
        "stages.s2.0.project.bn.weight",
        "stages.s2.0.project.bn.bias",
        "stages.s2.0.shortcut.conv.weight",
        "stages.s2.0.shortcut.bn.weight",
        "stages.s2.0.shortcut.bn.bias",
    ]
    assert keys[-6:] == [
        "head.features.conv.weight",
        "head.features.bn.weight",
        "head.features.bn.bias",
        "head.hidden.weight",
        "head.classifier.weight",
        "head.classifier.bias",
    ]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError) as caught:
        build("x3d_q")
    known = ", ".join(sorted(NETWORKS))
    assert str(caught.value) == f"unknown network 'x3d_q'. Known: {known}"


def test_c3d_refuses_clips_it_was_not_built_for():
    with pytest.raises(ValueError) as caught:
        small("c3d")(torch.zeros(1, 3, 64, 112, 112))
    assert str(caught.value) == (
        "c3d: built for clips (frames, height, width) of (16, 16, 16), got (64, 112, 112): "
        "build with c3d(clip=(64, 112, 112)), or use the convolutions alone, .trunk"
    )
    with pytest.raises(ValueError) as caught:
        c3d(clip=(15, 112, 112))
    assert str(caught.value) == (
        "c3d: clip (frames, height, width) must be at least (16, 16, 16), got (15, 112, 112)"
    )


@pytest.mark.parametrize("clip", [(16, 16, 16), (31, 48, 33), (32, 64, 112)])
def test_c3d_classifier_fits_every_clip_it_is_built_for(clip):
    with torch.device("meta"):
        model = c3d(clip=clip)
    assert model.eval()(torch.empty(1, 3, *clip, device="meta")).shape == (1, 487)


def test_names_are_listed_and_the_lack_of_torch_is_told(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')\n")
    program = (
        "from fastconv.zoo import NETWORKS, build\n"
        "print(*sorted(NETWORKS))\n"
        "try: build('x3d_m')\n"
        "except ImportError as error: print(error)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(fastconv.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        " ".join(sorted(NETWORKS)),
        "fastconv.zoo needs PyTorch, which is not installed: pip install 'fastconv[torch]'",
    ]


def test_the_zoo_imports_nothing_of_fastconv():
    for path in Path(fastconv.zoo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                where = f"{path.name} line {node.lineno}"
                assert node.level <= 1, where
                assert not (node.module or "").startswith("fastconv"), where
            elif isinstance(node, ast.Import):
                assert not any(a.name.startswith("fastconv") for a in node.names), path.name


def test_clips_of_the_demo_are_the_input_shapes_of_the_networks():
    assert set(video.PREPROCESSING) <= set(NETWORKS)
    for name, p in video.PREPROCESSING.items():
        assert (3, p.frames, p.crop, p.crop) == NETWORKS[name].input_shape


def test_benchmarked_networks_are_there():
    listed = {case.target for case in bench_cases() if case.kind == "networks"}
    assert listed <= {*NETWORKS, *CONTINUAL}
    assert set(CONTINUAL.values()) <= set(NETWORKS)


WRONG = [
    ("shufflenet3d_v2_x1_0", {"width": 3.0}, "shufflenet3d_v2: width must be one of 0.25, 0.5, "),
    ("resnet3d_18", {"shortcut": "C"}, "resnet: shortcut must be 'A' or 'B', got 'C'"),
    ("d_resnet18", {"fusion": "max"}, "d_resnet: fusion must be one of concat, sum, none, got "),
    ("fsb_c3d", {"middles": (64,)}, "fsb_c3d: middles must be 8 numbers, got 1"),
    ("fsb_c3d", {"middles": "all"}, "fsb_c3d: middles must be one of table 4, input, output, got "),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_wrong_option_is_told(name, options, message):
    with pytest.raises(ValueError) as caught:
        build(name, **options)
    assert str(caught.value).startswith(message)
