"""Networks for clips made continual: the same columns as without temporal padding, same weights."""

from __future__ import annotations

import copy
import random

import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv.errors import UnsupportedError  # noqa: E402
from fastconv.nn.continual import ContinualGRU, ContinualLSTM, Sequential  # noqa: E402
from fastconv.nn.continual_memory import (  # noqa: E402
    held,
    published_clip,
    published_continual,
)
from fastconv.nn.continual_trace import trace_clip  # noqa: E402
from fastconv.nn.to_continual import to_continual  # noqa: E402
from fastconv.zoo import NETWORKS, build  # noqa: E402
from tolerance import assert_as_exact_as  # noqa: E402

nn, functional = torch.nn, torch.nn.functional


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on_meta(name):
    with torch.device("meta"):
        return build(name).eval(), torch.empty(1, *NETWORKS[name].input_shape)


# Names of the paper, receptive field, padding, start-up frames; oracle of Hedegaard and Iosifidis.
@pytest.mark.parametrize(
    ("name", "field", "padding", "start_up"),
    [("x3d_s", 69, 28, 40), ("x3d_m", 72, 28, 43), ("x3d_l", 130, 57, 72)],
)
def test_cox3d_has_the_published_timing(name, field, padding, start_up):
    network = to_continual(*on_meta(name), start="zeros")
    assert (network.receptive_field, network.padding) == (field, padding)
    assert network.delay == network.warm_up == start_up
    assert to_continual(*on_meta(name)).warm_up == field - 1


@pytest.mark.parametrize(
    ("name", "window", "field"), [("x3d_l", 32, 146), ("x3d_l", 96, 210), ("x3d_s", 16, 72)]
)
def test_a_longer_pooling_sees_more(name, window, field):
    assert to_continual(*on_meta(name), pool_window=window).receptive_field == field


@pytest.mark.parametrize(
    ("frames", "clip_numbers", "numbers"), [(4, 1655808, 5067504), (16, 7074816, 5072688)]
)
def test_memory_is_the_published(frames, clip_numbers, numbers):
    """The worst cases of X3D-M and CoX3D-M; what is held here is less, and half of v0.17.1's."""
    model = build("x3d_m").eval()
    clip = torch.empty(1, 3, frames, 224, 224, device="meta")
    network = to_continual(model, clip, form="auto")
    network.start(torch.zeros(1, 3, 224, 224))
    assert published_clip(model, clip) == clip_numbers
    assert published_continual(network) == numbers
    assert held(network) == 4_981_536 + 432 * (frames - 1)
    assert held(network) < 11_695_104 / 2


# Trunks without a pooling over the whole clip: the size of a map, frames beyond the delay.
TRUNKS = {
    "i3d_r50": (16, 5), "i3d": (16, 17), "s3d": (32, 17), "r3d_18": (16, 9),
    "d_resnet18": (16, 3), "d_resnet18_sum": (16, 3), "resnet3d_18": (16, 17),
    "squeezenet3d": (16, 17), "shufflenet3d_v1_x0_5": (64, 17),
    "shufflenet3d_v2_x0_25": (16, 17), "mfnet3d": (16, 5), "c3d": (16, 17),
}  # fmt: skip


def answers(model, clip):
    """Of a model, in float32 and float64."""
    with torch.no_grad():
        return model(clip), copy.deepcopy(model).double()(clip.double())


@pytest.mark.parametrize("name", TRUNKS)
def test_trunks_have_the_columns_of_the_model_itself(name):
    """Against the model that was converted, run on the whole stream as one clip.

    Its columns without the padding behind are those of 'zeros'; without any, those of 'wait'.
    """
    size, more = TRUNKS[name]
    options = {"clip": (16, 16, 16)} if name == "c3d" else {}
    model = build(name, **options).eval().trunk
    network = to_continual(model, torch.empty(1, 3, 16, size, size), start="zeros")
    frames = -(-(network.delay + more) // 16) * 16  # some pad by what is left of a stride
    clip = noise(1, 3, frames, size, size, dtype=torch.float32)
    plain, want = answers(model, clip)
    got = network.forward_steps(clip).output
    count = (frames - 1 - network.delay) // network.rate + 1
    assert got.shape[2] == count > 0
    assert_as_exact_as(plain[:, :, :count], got, want[:, :, :count])
    waits = to_continual(model, torch.empty(1, 3, 16, size, size))
    first = waits.clock.begin
    if frames > waits.warm_up:
        some = slice(first, count)
        assert_as_exact_as(plain[:, :, some], waits(clip), want[:, :, some])


@pytest.mark.parametrize("name", ["x3d_xs", "i3d_r50", "d_resnet18_sum"])
def test_streams_have_the_bits_of_the_clip(name):
    """In the form 'ring', in any chunks."""
    frames = NETWORKS[name].input_shape[1]
    network = to_continual(build(name).eval(), torch.empty(1, 3, frames, 32, 32))
    clip = noise(1, 3, network.warm_up + 6, 32, 32, dtype=torch.float32)
    want, got, at = network(clip), [], 0
    for count in (3, 5, 1, network.warm_up - 8, 1, 1, 1, 2):
        got.append(network.forward_steps(clip[:, :, at : at + count]).output)
        at += count
    got = torch.cat(got, dim=2)
    assert torch.equal(got, want[:, :, : got.shape[2]])


class Choices:
    """A random network's plan, from a seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def layer(self, c_in, c_out, stride=1):
        r = self.random
        taps, dilation = r.choice([1, 2, 3, 3, 5]), r.choice([1, 1, 2])
        reach = dilation * (taps - 1)
        groups = c_in if r.random() < 0.3 and c_out % c_in == 0 else 1
        padding = (r.choice([0, reach // 2, reach]) if r.random() < 0.3 else reach // 2, 1, 1)
        conv = nn.Conv3d(
            c_in, c_out, (taps, 3, 3), (stride, 1, 1), padding, (dilation, 1, 1), groups,
            bias=r.random() < 0.5,
        )  # fmt: skip
        parts = [conv]
        if r.random() < 0.6:
            parts.append(nn.BatchNorm3d(c_out))
        if r.random() < 0.6:
            parts.append(r.choice([nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU()]))
        return nn.Sequential(*parts)


class Random(nn.Module):
    """Chains, residuals, concatenations, poolings and functions; odd reaches keep T."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        choices = Choices(seed)
        r = choices.random
        channels, blocks, self.kinds = 4, [], []
        for _ in range(4):
            kind = r.choice(["chain", "residual", "concat", "pool", "function", "split"])
            if kind == "residual":
                odd = [self._same(choices, channels) for _ in range(r.choice([1, 2]))]
                blocks.append(nn.Sequential(*odd))
            elif kind == "concat":
                blocks.append(nn.ModuleList([self._same(choices, channels) for _ in range(2)]))
                channels *= 2
            elif kind == "pool":
                pool = r.choice([nn.MaxPool3d, nn.AvgPool3d])
                blocks.append(pool(3, (r.choice([1, 2]), 1, 1), 1))
            elif kind == "split":
                blocks.append(self._same(choices, channels // 2))
            else:
                blocks.append(choices.layer(channels, channels, r.choice([1, 1, 2])))
            self.kinds.append(kind)
        self.blocks = nn.ModuleList(blocks)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1, 1))

    @staticmethod
    def _same(choices, channels):
        layer = choices.layer(channels, channels)
        conv = layer[0]
        reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
        if reach % 2:
            layer[0] = nn.Conv3d(channels, channels, 3, padding=1)
        else:
            conv.padding = (reach // 2, 1, 1)
        return layer

    def forward(self, x):
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind == "residual":
                x = functional.relu(x + block(x))
            elif kind == "concat":
                x = torch.cat([part(x) for part in block], dim=1)
            elif kind == "function":
                n, c, *size = x.shape
                x = x.reshape(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)
                x = torch.sigmoid(block(x)) * 2 - 0.5
            elif kind == "split":
                passes, goes = x.chunk(2, dim=1)
                x = torch.cat([passes, block(goes)], dim=1)
            else:
                x = block(x)
        return x * self.scale


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("chunk", [1, 3])
def test_random_networks(seed, chunk):
    """Against the model itself on one clip: columns that no padding, or none behind, touches."""
    model = Random(seed).eval().double()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    example = torch.empty(1, 4, 32, 5, 5)
    zeros, waits = (
        to_continual(model, example, start=s, backend="torch") for s in ("zeros", "wait")
    )
    frames = waits.warm_up + 3 * waits.rate + 1
    clip = noise(2, 4, frames, 5, 5, seed=seed)
    with torch.no_grad():
        want = model(clip)
    count = (frames - 1 - zeros.delay) // zeros.rate + 1
    for network in (zeros, waits):
        got = [network.forward_steps(part).output for part in clip.split(chunk, dim=2)]
        first = network.clock.begin
        got = torch.cat(got, dim=2)
        assert got.shape[2] == count - first > 0
        torch.testing.assert_close(got, want[:, :, first:count], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", [ContinualLSTM, ContinualGRU])
def test_recurrent_heads_on_a_dissected_network(head):
    torch.manual_seed(0)
    trunk = to_continual(build("d_resnet18").eval().trunk, torch.empty(1, 3, 3, 32, 32))
    network = Sequential(trunk, head(512, 32), nn.Flatten(), nn.Linear(32, 6)).eval()
    clip = noise(1, 3, 15, 32, 32, dtype=torch.float32)
    step = network.forward_steps(clip)
    features = trunk(clip).flatten(2)  # (1, 512, T)
    memory = network.get_submodule("1")
    kind = nn.LSTM if head is ContinualLSTM else nn.GRU
    with torch.no_grad():
        hidden, _ = kind.forward(memory, features.permute(2, 0, 1))
        want = network.get_submodule("3")(hidden).permute(1, 2, 0)
    assert step.output.shape == (1, 6, 5)
    torch.testing.assert_close(step.output, want)


class Lambda(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)
        self.other = nn.Parameter(torch.ones(6, 1, 1))
        self.function = function

    def forward(self, x):
        return self.function(self, self.conv(x))


KEPT = {
    "crop": lambda m, x: x[:, :, 1:-1] * 2,
    "thinned": lambda m, x: x[:, :, ::3, :, 1:],
    "padded": lambda m, x: m.conv(functional.pad(x, (0, 0, 0, 0, 2, 0))),
    "zeros": lambda m, x: m.conv(torch.cat([torch.zeros_like(x[:, :, :2]), x], dim=2)),
    "maximum": lambda m, x: torch.maximum(x, m.conv(x)),
    "sum": lambda m, x: x.sum(dim=(3, 4)),
    "in_place": lambda m, x: torch.relu_(x).add_(1),
    "permuted": lambda m, x: x.permute(0, 2, 3, 4, 1).softmax(-1).permute(0, 4, 1, 2, 3),
    "pooled": lambda m, x: (
        functional.max_pool3d(x, 3, (2, 1, 1), 1)
        + functional.avg_pool3d(x, (3, 1, 1), (2, 1, 1), (1, 0, 0))
    ),
    "dropped": lambda m, x: functional.dropout(x, 0.5, m.training) - 1,
}


@pytest.mark.parametrize("name", KEPT)
def test_functions(name):
    torch.manual_seed(0)
    model = Lambda(KEPT[name]).eval().double()
    network = to_continual(model, torch.empty(1, 4, 12, 5, 6), start="zeros", backend="torch")
    clip = noise(2, 4, 24, 5, 6)
    with torch.no_grad():
        want = model(clip)
    got = network.forward_steps(clip).output
    first = network.clock.begin
    assert got.shape[2] > 3
    torch.testing.assert_close(got, want[:, :, first : first + got.shape[2]])


NOT_KEPT = {
    "takes frame 3": lambda m, x: x[:, :, 3],
    "mixes the 12 columns": lambda m, x: x.flatten(1),
    "moves the batch away": lambda m, x: x.permute(2, 0, 1, 3, 4).reshape(-1, 4, 5, 6),
    "runs along time": lambda m, x: x.softmax(2),
    "is a function without a rule": lambda m, x: torch.fft.fft(x, dim=-1).real,
    "a column every 1 and every 2 frames": lambda m, x: x[:, :, :6] + x[:, :, ::2],
    "value of its own for each of 6": lambda m, x: x * m.other,
    "must return one tensor": lambda m, x: (x, x),
    "pads the clip with other": lambda m, x: functional.pad(x, (0, 0, 0, 0, 1, 1), value=1.0),
    "different axes": lambda m, x: x[..., :5] + x[..., :5].transpose(2, 4)[:, :, :, :, :12],
}


@pytest.mark.parametrize("reason", NOT_KEPT)
def test_functions_that_have_no_meaning(reason):
    shape = (1, 4, 6, 5, 6) if "value of its own" in reason else (1, 4, 12, 5, 6)
    if "different axes" in reason:
        shape = (1, 4, 5, 5, 5)
    with pytest.raises(UnsupportedError) as told:
        to_continual(Lambda(NOT_KEPT[reason]), torch.empty(*shape))
    assert reason in str(told.value)
    assert str(told.value).startswith("to_continual: ")


def test_squeeze_over_a_window():
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(4, 4, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.conv(x.mean(dim=(2, 3, 4), keepdim=True)))

    model = Gated().eval()
    clip = noise(1, 4, 6, 3, 3, dtype=torch.float32)
    for window in (1, 3):
        network = to_continual(model, clip, squeeze_window=window)
        got = network.forward_steps(clip).output
        for t in range(window - 1, 6):
            gate = clip[:, :, t - window + 1 : t + 1].mean((2, 3, 4), keepdim=True)
            with torch.no_grad():
                want = clip[:, :, t] * torch.sigmoid(model.conv(gate))[:, :, 0]
            torch.testing.assert_close(got[:, :, t - window + 1], want)


def test_the_model_is_left_as_it_was():
    model = build("d_resnet18")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = fastconv.to_continual(model, torch.empty(1, 3, 3, 32, 32))
    network.eval()
    network.forward_step(torch.zeros(1, 3, 32, 32))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_trace_is_a_graph():
    graph = trace_clip(build("x3d_xs"), torch.empty(1, 3, 4, 32, 32))
    assert isinstance(graph, torch.fx.Graph)
    shapes = {node.name: node.meta.get("shape") for node in graph.nodes}
    assert shapes["stem_space"] == (1, 24, 4, 16, 16)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pool_window": 0}, "windows must be at least 1"),
        ({"start": "never"}, "unknown start"),
        ({"form": "never"}, "unknown form"),
    ],
)
def test_options_are_checked(options, reason):
    with pytest.raises(UnsupportedError, match=reason):
        to_continual(nn.Conv3d(1, 1, 1), torch.empty(1, 1, 2, 2, 2), **options)


def test_the_example_is_a_clip():
    with pytest.raises(UnsupportedError, match="must be \\(N, C, T"):
        to_continual(nn.Linear(1, 1), torch.empty(1, 1))


def test_an_accelerated_model_is_continual_too():
    model = build("d_resnet18").eval()
    clip = noise(1, 3, 12, 32, 32, dtype=torch.float32)
    fast, _ = fastconv.accelerate(model, clip[:, :, :3], check=False)
    want = to_continual(model, clip[:, :, :3]).forward_steps(clip).output
    got = to_continual(fast, clip[:, :, :3]).forward_steps(clip).output
    assert torch.equal(got, want)
