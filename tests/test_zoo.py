"""The zoo's networks are the papers' networks, parameters and counts to the integer."""

from __future__ import annotations

import ast
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastconv.zoo
from fastconv import video
from fastconv.nn.trace import trace
from fastconv.zoo import NETWORKS, build
from fastconv.zoo.c3d import c3d

ORACLE = Path(__file__).parent / "data" / "oracle.csv"


def oracle(model, variant, quantity):
    """The integer measured on the original code."""
    with ORACLE.open(newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["model"], row["variant"], row["quantity"]) == (model, variant, quantity)
        ]
    assert len(rows) == 1, f"{len(rows)} rows of {model} {variant} {quantity}"
    return int(rows[0]["measured_from_original_code"])


def on_meta(name, **options):
    with torch.device("meta"):
        return build(name, **options)


def small(name, **options):
    """A network in eval mode; C3D for clips of 16 x 16 x 16, which spares it the large fc6."""
    if name == "c3d":
        options["clip"] = (16, 16, 16)
    return build(name, **options).eval()


def rms(values):
    return values.square().mean().sqrt().item()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", ["XS", "S", "M", "L"])
def test_x3d_is_the_published_network_to_the_integer(size):
    network = NETWORKS[f"x3d_{size.lower()}"]
    model = on_meta(network.name)
    assert parameters(model) == oracle(f"X3D-{size}", "", "params")
    layers = trace(model, torch.empty(1, *network.input_shape, device="meta"))
    assert sum(layer.macs for layer in layers) == oracle(f"X3D-{size}", "", "macs")


def test_c3d_has_the_convolutions_of_the_paper_to_the_integer():
    model = on_meta("c3d", clip=(64, 112, 112))
    layers = trace(model, torch.empty(1, 3, 64, 112, 112, device="meta"))
    convolutions = [layer for layer in layers if layer.kind == "conv"]
    assert len(convolutions) == 8
    weights = sum(model.get_submodule(layer.name).weight.numel() for layer in convolutions)
    assert weights == oracle("C3D", "conv weights", "params")
    assert sum(layer.macs for layer in convolutions) == oracle("C3D", "baseline", "macs")


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


@pytest.mark.parametrize("name", sorted(NETWORKS))
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


@pytest.mark.parametrize("name", ["c3d", "x3d_s"])
def test_weights_follow_the_seed_alone(name):
    torch.manual_seed(1)
    first = small(name, seed=3).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "building must not draw from the caller's stream"
    again, other = small(name, seed=3).state_dict(), small(name, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    learned = [key for key in first if not key.endswith("num_batches_tracked")]
    assert all(not torch.equal(first[key], other[key]) for key in learned)


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
    assert str(caught.value) == "unknown network 'x3d_q'. Known: c3d, x3d_l, x3d_m, x3d_s, x3d_xs"


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
        "c3d x3d_l x3d_m x3d_s x3d_xs",
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
    assert sorted(video.PREPROCESSING) == sorted(NETWORKS)
    for name, network in NETWORKS.items():
        p = video.PREPROCESSING[name]
        assert (3, p.frames, p.crop, p.crop) == network.input_shape
