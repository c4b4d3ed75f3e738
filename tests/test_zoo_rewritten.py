"""Every network of the zoo through `accelerate` and `to_continual`: the outputs are its own."""

from __future__ import annotations

import copy
from itertools import cycle

import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv.errors import UnsupportedError  # noqa: E402
from fastconv.nn.to_continual import to_continual  # noqa: E402
from fastconv.zoo import NETWORKS, build  # noqa: E402
from networks import C3D_CLIP, noise, small, small_input  # noqa: E402
from tolerance import assert_as_exact_as  # noqa: E402

CLASSES = 7


def architectures():
    """A name of each: the narrowest of several widths, the first of the deep ones."""
    found = {}
    for name, network in NETWORKS.items():
        width = "width" in network.options
        found.setdefault(network.function if width else name, name)
    return [name for name in found.values() if name not in DEEP]


# The blocks of networks that are not, more of them.
DEEP = {
    "resnet3d_50", "resnet3d_101", "resnet3d_101_b", "d_resnet50_sum", "d_resnet50_none",
    "d_resnet101", "d_resnet101_sum", "d_resnet101_none",
}  # fmt: skip
IMAGES = {name for name, network in NETWORKS.items() if len(network.input_shape) == 3}
REFUSED = {
    "rcn_18": "trunk.stem (RecurrentUnit), split: takes the frames of a clip apart",
    "fast_trg": "motion (TemporalGradient), cat: puts columns of several values one behind",
}
CONTINUAL = [name for name in architectures() if name not in {*IMAGES, *REFUSED}]


def answers(model, *args):
    """Of a model, in float32 and float64."""
    with torch.no_grad():
        return model(*args), copy.deepcopy(model).double()(*(x.double() for x in args))


@pytest.mark.parametrize("name", NETWORKS)
def test_accelerated(name):
    """With the check of `accelerate` itself, all of it one program, every convolution replaced."""
    model, x = small(name, num_classes=CLASSES), small_input(name)
    new, report = fastconv.accelerate(model, x)
    assert report.traced
    assert report.stays == ()
    assert all(layer.plan is not None for layer in report.layers)
    assert report.numbers == CLASSES
    assert report.error <= report.allowed
    with torch.no_grad():
        got = new(x)
        assert got.shape == (1, CLASSES)
        assert torch.equal(new(x), got)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - IMAGES))
def test_made_continual(name):
    """Converted, its timing whole, its state dict the model's; or refused: the place, and why."""
    with torch.device("meta"):
        model, clip = build(name).eval(), torch.empty(1, *NETWORKS[name].input_shape)
    if name in REFUSED:
        with pytest.raises(UnsupportedError) as told:
            to_continual(model, clip)
        assert str(told.value).startswith(f"to_continual: {REFUSED[name]}")
        return
    network = to_continual(model, clip)
    assert network.receptive_field == network.delay + network.padding + 1
    assert network.warm_up >= network.receptive_field - 1
    mine, theirs = network.state_dict(), model.state_dict()
    assert list(mine) == list(theirs)
    assert all(network.get_parameter(n) is p for n, p in model.named_parameters())


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_networks_for_images_have_no_frames(name):
    with torch.device("meta"):
        model, clip = build(name).eval(), torch.empty(1, 3, 8, 64, 64)
    with pytest.raises(UnsupportedError) as told:
        to_continual(model, clip)
    assert str(told.value) == (
        "to_continual: trunk.stem.conv (Conv2d) takes 4 axes, (N, C, *size), and is given 5: it is "
        "for images, which have no frames"
    )


def is_made_of(name, part):
    with torch.device("meta"):
        return hasattr(build(name), part)


def stream_for(network, clip, more=0):
    """Whole clips of frames with two outputs at least, the last ones far from the end."""
    frames = network.warm_up + 1 + network.rate + more
    return noise(1, 3, -(-frames // clip.shape[2]) * clip.shape[2], *clip.shape[3:])


@pytest.mark.parametrize("name", [name for name in CONTINUAL if is_made_of(name, "trunk")])
def test_continual(name):
    """Against the model's trunk on the whole stream as one clip, and its head on a clip of that.

    Without temporal padding the stream's columns are the trunk's that no padding reaches.
    """
    model, clip = small(name, num_classes=CLASSES), small_clip(name)
    network, trunk = to_continual(model, clip), to_continual(model.trunk, clip)
    head = model.get_submodule("head" if hasattr(model, "head") else "classifier")
    exact_head = copy.deepcopy(head).double()
    stream = stream_for(network, clip)
    got = network.forward_steps(stream).output
    plain, want = answers(model.trunk, stream)
    with torch.no_grad():
        columns = model.trunk(clip).shape[2]
        for t in range(2):
            first = trunk.clock.begin + t
            some = slice(first, first + columns)
            assert_as_exact_as(head(plain[:, :, some]), got[:, :, t], exact_head(want[:, :, some]))


def small_clip(name):
    network = NETWORKS[name]
    if name in ("c3d", "fsb_c3d"):
        return torch.zeros(1, 3, *C3D_CLIP)
    size = {"shufflenet3d_v1": 64, "s3d": 32}.get(network.function, 16)
    return torch.zeros(1, 3, min(network.input_shape[1], 16), size, size)


@pytest.mark.parametrize("name", [name for name in CONTINUAL if is_made_of(name, "lateral")])
def test_two_pathways_meet_where_the_clips_do(name):
    """One clip's pooled columns are joined: the head of the model on columns without padding."""
    model = small(name, num_classes=CLASSES)
    clip = torch.zeros(1, 3, NETWORKS[name].input_shape[1], 16, 16)
    network = to_continual(model, clip)
    assert network.rate == model.every * model.alpha
    begin = network.clock.begin  # in columns of the slow pathway, which is pooled first
    window = clip.shape[2] // network.rate
    stream = stream_for(network, clip, clip.shape[2])
    got = network.forward_steps(stream).output
    per_column = cycle((1, model.alpha))

    def inner(module, args, y):
        per = next(per_column)
        some = slice(begin * per, (begin + window) * per)
        return args[0][:, :, some].mean((2, 3, 4), keepdim=True)

    model.pool.register_forward_hook(inner)
    plain, want = answers(model, stream)
    assert begin > 0
    assert_as_exact_as(plain, got[:, :, 0], want)


@pytest.mark.parametrize("name", ["x3d_xs", "x3d_l"])
def test_x3d_is_the_model_on_columns_without_padding(name):
    """Its gates see single frames, as published, the last pooling inner columns."""
    model = small(name, num_classes=CLASSES)
    window = NETWORKS[name].input_shape[1]
    network = to_continual(model, torch.empty(1, 3, window, 32, 32))
    edge = network.padding
    stream = noise(1, 3, network.receptive_field + 1, 32, 32)
    got = network.forward_steps(stream).output
    assert got.shape == (1, CLASSES, 2)

    def every_frame(module, args, y):
        return args[0].mean((3, 4), keepdim=True)

    def inner(module, args, y):
        return args[0][:, :, first : first + window].mean((2, 3, 4), keepdim=True)

    for module in model.modules():
        if type(module).__name__ == "SqueezeExcite":
            module.gate.pool.register_forward_hook(every_frame)
    model.head.pool.register_forward_hook(inner)
    for t in range(2):
        first = edge + t
        plain, want = answers(model, stream)
        assert_as_exact_as(plain, got[:, :, t], want)


def test_every_architecture_has_been_through_a_stream():
    trunks, pathways = (
        {name for name in CONTINUAL if is_made_of(name, part)} for part in ("trunk", "lateral")
    )
    assert set(CONTINUAL) - trunks - pathways == {f"x3d_{size}" for size in ("xs", "s", "m", "l")}
