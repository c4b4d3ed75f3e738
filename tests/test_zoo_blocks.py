"""The papers' building blocks do what their formulas say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from counting import Tally, counting_array
from fastconv.nn.trace import trace
from fastconv.zoo.dresnet import TemporalSkip
from fastconv.zoo.fsb import FullySeparable, TemporalGradient
from fastconv.zoo.i3d import i3d
from fastconv.zoo.mfnet import MultiFiberUnit, Multiplexer
from fastconv.zoo.rcn import RecurrentUnit
from fastconv.zoo.units import ChannelShuffle, PaddedSubsampling, SamePadding, WindowAverage


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Operations(TorchDispatchMode):
    """The names of what PyTorch executes."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_temporal_gradients_are_differences_and_the_mean():
    x = noise(2, 3, 5, 4, 4)
    y = TemporalGradient()(x)
    assert y.shape == x.shape
    for t in range(4):
        assert torch.equal(y[:, :, t], x[:, :, t + 1] - x[:, :, t])
    torch.testing.assert_close(y[:, :, 4], x.mean(2))


def test_temporal_gradients_do_not_multiply():
    """Differences and a mean, whose division by T is no product; their formula, and the module."""
    tally = Tally()
    x = counting_array(noise(2, 8, 3).mul(4).round().int().numpy(), tally)
    differences, total = x[:, 1:] - x[:, :-1], x.sum(1)
    assert differences.shape == (2, 7, 3)
    assert total.shape == (2, 3)
    assert (tally.multiplications, tally.additions) == (0, 2 * 3 * (7 + 7))
    clip = noise(2, 3, 8, 4, 4)
    assert trace(TemporalGradient(), clip) == []
    with Operations() as done:
        TemporalGradient()(clip)
    assert done.names == {"slice", "sub", "mean", "cat"}
    assert not list(TemporalGradient().parameters())


def test_a_fully_separable_block_is_three_convolutions():
    block = FullySeparable(3, 7, 5, (3, 5, 3), (2, 1, 2), bias=False)
    x = noise(2, 3, 6, 8, 8)
    y = functional.conv3d(x, block.time.weight, None, (2, 1, 1), (1, 0, 0)).relu()
    y = functional.conv3d(y, block.space.weight, None, (1, 1, 2), (0, 2, 1), groups=5)
    torch.testing.assert_close(block(x), functional.conv3d(y, block.mix.weight))


def test_the_papers_example_of_a_fully_separable_block():
    """64 channels in, between and out, 3 x 3 x 3: 6.5 times fewer weights than dense."""
    weights = sum(p.numel() for p in FullySeparable(64, 64, bias=False).parameters())
    assert weights == 16_960
    assert round(64 * 64 * 27 / weights, 1) == 6.5


@pytest.mark.parametrize("groups", [2, 3])
def test_channel_shuffle_is_undone_by_the_other_shuffle(groups):
    x = torch.arange(12.0).reshape(1, 12, 1, 1, 1)
    y = ChannelShuffle(groups)(x)
    per_group = 12 // groups
    assert y.flatten().tolist() == [
        g * per_group + i for i in range(per_group) for g in range(groups)
    ]
    assert torch.equal(ChannelShuffle(per_group)(y), x)


def test_temporal_skips_bring_the_frame_before():
    x = noise(1, 2, 4, 3, 3)
    concat, total = TemporalSkip("concat")(x), TemporalSkip("sum")(x)
    assert concat.shape == (1, 2, 5, 3, 3)
    assert not concat[:, :, 0].any()
    assert torch.equal(concat[:, :, 1:], x)
    assert torch.equal(total[:, :, 0], x[:, :, 0])
    assert torch.equal(total[:, :, 2], x[:, :, 2] + x[:, :, 1])
    assert TemporalSkip("none")(x) is x


@pytest.mark.parametrize("fusion", ["concat", "sum", "none"])
def test_a_dissected_network_sees_no_frame_after(fusion):
    from fastconv.zoo import build

    trunk = build("d_resnet18", fusion=fusion).eval().trunk
    x = noise(1, 3, 6, 32, 32)
    with torch.no_grad():
        whole, start = trunk(x), trunk(x[:, :, :5])
        late = trunk(x[:, :, 2:])
    assert whole.shape[2] == 4
    torch.testing.assert_close(whole[:, :, :3], start)
    assert torch.allclose(whole[:, :, 3:], late[:, :, 1:], atol=1e-5) == (fusion == "none")


def test_a_recurrent_unit_runs_its_hidden_state_through_time():
    unit = RecurrentUnit(3, 4, stride=2).eval()
    x = noise(1, 3, 3, 6, 6)
    with torch.no_grad():
        y = unit(x)
        state = torch.zeros(1, 4, 1, 3, 3)
        for t in range(3):
            state = unit.bn(unit.space(x[:, :, t : t + 1])) + unit.hidden(state)
            torch.testing.assert_close(y[:, :, t : t + 1], state)


def test_a_multiplexer_mixes_fibers_and_their_convolutions_do_not():
    unit = MultiFiberUnit(8, 8, 4, multiplexer=False).eval()
    x, other = noise(1, 8, 3, 5, 5), noise(1, 8, 3, 5, 5, seed=1)
    other[:, 2:] = x[:, 2:]
    with torch.no_grad():
        same = (unit(x) == unit(other)).flatten(2).all(-1).flatten()
        # A fiber of two channels: what changes in it changes nothing in the others.
        assert same.tolist() == [False] * 2 + [True] * 6
        multiplexer = Multiplexer(8, 2).eval()
        assert not (multiplexer(x) == multiplexer(other)).flatten(2).all(-1).any()


def test_multi_fiber_units_stride_and_widen_in_their_first_convolution():
    unit = MultiFiberUnit(8, 16, 4, adapt=(2, 1, 1)).eval()
    x = noise(1, 8, 4, 5, 5)
    with torch.no_grad():
        y = unit.second(unit.first(unit.multiplexer(x))) + unit.adapt(x)
        assert torch.equal(unit(x), y)
    assert y.shape == (1, 16, 2, 5, 5)
    assert unit.multiplexer.down.conv.weight.shape == (4, 8, 1, 1, 1)
    assert (unit.first.conv.groups, unit.second.conv.groups) == (4, 1)


def test_shortcut_a_subsamples_and_adds_empty_channels():
    x = noise(2, 3, 4, 5, 5)
    y = PaddedSubsampling(3, 5, 2)(x)
    assert y.shape == (2, 5, 2, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2, ::2])
    assert not y[:, 3:].any()


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (2, 2), (3, 1)])
def test_same_padding_gives_the_ceiling(size, kernel, stride):
    x = noise(1, 1, size, 8, 8)
    padded = SamePadding((kernel, 1, 1), (stride, 1, 1))(x)
    y = nn.MaxPool3d((kernel, 1, 1), (stride, 1, 1))(padded)
    assert y.shape[2] == -(-size // stride)


def test_a_window_average_is_no_larger_than_its_map():
    x = noise(1, 2, 3, 9, 4)
    y = WindowAverage((2, 7, 7))(x)
    assert y.shape == (1, 2, 2, 3, 1)
    torch.testing.assert_close(y[0, 0, 0, 0, 0], x[0, 0, :2, :7].mean())


def test_i3d_classifies_windows_and_averages_them():
    with torch.device("meta"):
        layers = trace(i3d(), torch.empty(1, 3, 64, 224, 224))
    assert layers[-1].y_shape == (1, 400, 7, 1, 1)
