"""`trace` lists what ran, with shapes and counts, and leaves the model as it found it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastconv.geometry import Geometry
from fastconv.nn.trace import trace


class Twice(nn.Module):
    """One convolution called two times, a batch norm, a dropout, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1, groups=2)
        self.bn = nn.BatchNorm3d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(5, 6, bias=False)

    def forward(self, x):
        return self.fc(self.drop(self.bn(self.conv(self.conv(x)))))


def test_layers_come_in_the_order_they_ran_with_their_shapes():
    first, second, linear = trace(Twice(), torch.zeros(2, 4, 3, 4, 5))
    assert first == second
    assert (first.name, first.kind, first.module) == ("conv", "conv", "Conv3d")
    assert (first.x_shape, first.w_shape, first.y_shape) == (
        (2, 4, 3, 4, 5),
        (4, 2, 3, 3, 3),
        (2, 4, 3, 4, 5),
    )
    assert (first.stride, first.padding, first.dilation) == ((1, 1, 1), (1, 1, 1), (1, 1, 1))
    assert (first.groups, first.bias, first.note) == (2, True, "")
    assert (linear.name, linear.kind, linear.module, linear.bias) == (
        "fc",
        "linear",
        "Linear",
        False,
    )
    assert (linear.x_shape, linear.w_shape, linear.y_shape) == (
        (2, 4, 3, 4, 5),
        (6, 5),
        (2, 4, 3, 4, 6),
    )
    assert linear.geometry is None


def test_multiply_accumulates():
    conv, _, linear = trace(Twice(), torch.zeros(2, 4, 3, 4, 5))
    assert conv.macs == (2 * 4 * 3 * 4 * 5) * (4 // 2) * 27
    assert linear.macs == 5 * 6 * (2 * 4 * 3 * 4)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_geometry_agrees_with_the_layer(n, padding):
    conv = getattr(nn, f"Conv{n}d")(6, 9, 3, padding=padding, dilation=2, groups=3)
    (layer,) = trace(conv, torch.zeros(2, 6, *(7, 8, 9)[:n]))
    assert layer.name == ""
    assert isinstance(layer.geometry, Geometry)
    assert layer.geometry.x_shape == layer.x_shape
    assert layer.geometry.w_shape == layer.w_shape
    assert layer.geometry.y_shape == layer.y_shape
    assert layer.geometry.macs == layer.macs


def test_a_call_without_batch_is_a_batch_of_one():
    (layer,) = trace(nn.Conv2d(3, 8, 3, stride=2), torch.zeros(3, 9, 11))
    assert (layer.x_shape, layer.y_shape) == ((1, 3, 9, 11), (1, 8, 4, 5))
    assert layer.geometry.y_shape == (1, 8, 4, 5)


def test_convolutions_nobody_serves_are_reported_not_dropped():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    )
    circular, transposed = trace(model, torch.zeros(1, 3, 5, 5))
    assert (circular.kind, circular.note) == ("other", "padding_mode 'circular'")
    assert circular.geometry is None
    assert circular.macs == 4 * 25 * 3 * 9
    assert (transposed.kind, transposed.note) == ("other", "transposed convolution")
    assert transposed.y_shape == (1, 6, 11, 11)
    assert transposed.geometry is None
    assert transposed.macs == (4 * 25) * (6 // 2) * 9  # every input meets every tap of its group


def test_subclasses_are_seen_under_their_own_name():
    class Mine(nn.Conv1d):
        pass

    (layer,) = trace(Mine(2, 2, 3), torch.zeros(1, 2, 5))
    assert (layer.kind, layer.module) == ("conv", "Mine")


def test_inputs_by_keyword_are_seen():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3)

        def forward(self, x):
            return self.conv(input=x)

    (layer,) = trace(Keyword(), torch.zeros(1, 2, 5))
    assert layer.x_shape == (1, 2, 5)


def test_counts_agree_with_the_flop_counter_of_torch():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Twice().eval(), torch.zeros(2, 4, 3, 4, 5)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert 2 * sum(layer.macs for layer in trace(model, x)) == counter.get_total_flops()


def test_inputs_on_meta_trace_without_arithmetic():
    on_cpu = Twice()
    with torch.device("meta"):
        on_meta = Twice()
    x = torch.zeros(2, 4, 3, 4, 5)
    expected = trace(on_cpu, x)
    assert trace(on_cpu, x.to("meta")) == expected
    assert trace(on_meta, x.to("meta")) == expected
    assert on_cpu.conv.weight.device.type == "cpu"

    huge = torch.empty(1, 4, 2000, 2000, 5, device="meta")
    assert trace(on_cpu, huge)[0].y_shape == (1, 4, 2000, 2000, 5)


def test_inputs_on_meta_may_be_in_a_list():
    class Pathways(nn.Module):
        def __init__(self):
            super().__init__()
            self.slow, self.fast = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)

        def forward(self, pathways):
            return self.slow(pathways[0]), self.fast(pathways[1])

    slow, fast = torch.empty(1, 2, 4, device="meta"), torch.empty(1, 2, 16, device="meta")
    assert [layer.x_shape[-1] for layer in trace(Pathways(), [slow, fast])] == [4, 16]


def state_of(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        [id(p) for p in model.parameters()],
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_model_is_left_as_it_was(device):
    model = Twice().train()
    model.bn.eval()
    before = state_of(model)
    trace(model, torch.ones(2, 4, 3, 4, 5, device=device))
    after = state_of(model)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert after[1:] == before[1:]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_error_leaves_the_model_as_it_was(device):
    model = Twice().train()
    before = state_of(model)
    with pytest.raises(RuntimeError):
        trace(model, torch.ones(2, 4, 3, 4, 7, device=device))  # the linear layer wants 5
    assert state_of(model)[1:] == before[1:]
