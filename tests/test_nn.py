"""Modules in place of PyTorch's, and whole models rewritten: same outputs, nothing else touched."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch.nn.utils import parametrizations, prune  # noqa: E402

import fastconv  # noqa: E402  (after the skip)
from fastconv.errors import GeometryError, UnsupportedError  # noqa: E402
from fastconv.plan import CHANNELS_LAST  # noqa: E402

nn = torch.nn


def close(got, want):
    torch.testing.assert_close(
        got, want, rtol=0, atol=1e-5 * max(1.0, float(want.detach().abs().max()))
    )


MODULES = [
    ("Conv1d", (2, 4, 9), dict(kernel_size=3, padding="same")),
    ("Conv2d", (2, 4, 9, 8), dict(kernel_size=(3, 2), stride=2, padding=1, padding_mode="reflect")),
    ("Conv3d", (2, 4, 5, 9, 8), dict(kernel_size=3, groups=2, dilation=2, padding=2)),
    ("Conv3d", (4, 5, 9, 8), dict(kernel_size=(3, 1, 1), bias=False)),
]


@pytest.mark.parametrize(("name", "shape", "options"), MODULES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_module_is_pytorchs(name, shape, options, channels_last):
    torch.manual_seed(0)
    theirs = getattr(nn, name)(4, 6, **options)
    ours = getattr(fastconv.nn, name)(4, 6, channels_last=channels_last, **options)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    x = torch.randn(shape)
    close(ours(x), theirs(x))
    with torch.no_grad():
        close(ours(x), theirs(x))
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    close(again(x), theirs(x))
    assert ours.extra_repr() == theirs.extra_repr()


def test_convert_shares_parameters_and_hooks():
    theirs, called = nn.Conv3d(2, 3, 3), []
    theirs.register_forward_hook(lambda *_: called.append(1))
    ours = fastconv.nn.Conv3d.convert(theirs)
    assert ours.weight is theirs.weight
    ours(torch.randn(1, 2, 4, 4, 4))
    assert called == [1]


def test_module_training_step():
    torch.manual_seed(0)
    theirs = nn.Conv3d(3, 4, 3, padding=1)
    ours = fastconv.nn.Conv3d.convert(copy.deepcopy(theirs))
    x = torch.randn(1, 3, 4, 6, 6)
    for module in (theirs, ours):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            module(x).square().mean().backward()
            optimiser.step()
    close(ours.weight, theirs.weight)
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_copies_and_loaded_weights_are_packed_anew():
    """What a module holds for its weights is not shared with a copy, and follows `load`."""
    torch.manual_seed(0)
    x, module = torch.randn(1, 8, 4, 6, 6), fastconv.nn.Conv3d(8, 8, 3, groups=8)
    with torch.inference_mode():
        before = module(x)
        other = copy.deepcopy(module)
        other.weight.mul_(2)
        close(other(x), nn.functional.conv3d(x, other.weight, other.bias, groups=8))
        assert torch.equal(module(x), before)
    module.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(module(x), other(x))
        module.weight.data = torch.zeros_like(module.weight)
        close(module(x), module.bias.view(1, -1, 1, 1, 1).expand(1, 8, 2, 4, 4))
        module.half().float()
        close(module(x), module.bias.view(1, -1, 1, 1, 1).expand(1, 8, 2, 4, 4))


def test_module_says_what_is_wrong():
    with pytest.raises(
        GeometryError, match="weight expects 2 input channels per group, input has 3 channels"
    ):
        fastconv.nn.Conv3d(2, 3, 3)(torch.randn(1, 3, 4, 4, 4))


@pytest.mark.parametrize("bias", [True, False])
def test_separable_block_is_three_convolutions(bias):
    torch.manual_seed(0)
    options = dict(kernel_size=(3, 3, 5), stride=(1, 2, 1), bias=bias)
    block = fastconv.nn.SeparableBlock(4, 6, 8, activations=("relu", "none", "silu"), **options)
    theirs = nn.ModuleDict(
        {
            "temporal": nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0), bias=bias),
            "depthwise": nn.Conv3d(6, 6, (1, 3, 5), (1, 2, 1), (0, 1, 2), groups=6, bias=bias),
            "pointwise": nn.Conv3d(6, 8, 1, bias=bias),
        }
    )
    block.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5, 9, 8, requires_grad=True)
    want = theirs.depthwise(torch.relu(theirs.temporal(x)))
    want = nn.functional.silu(theirs.pointwise(want))
    got = block(x)
    close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sum(), [x, *block.parameters()]),
        torch.autograd.grad(want.sum(), [x, *theirs.parameters()]),
        strict=True,
    ):
        close(a, b)
    with torch.no_grad():
        close(block(x), want)
        close(pickle.loads(pickle.dumps(copy.deepcopy(block)))(x), want)
        block.depthwise.weight.mul_(2)
        theirs["depthwise"].weight.mul_(2)
        want = theirs.depthwise(torch.relu(theirs.temporal(x)))
        close(block(x), nn.functional.silu(theirs.pointwise(want)))
    assert "4, 6, 8, kernel_size=(3, 3, 5)" in repr(block)


def test_separable_block_refuses_unknown_activations():
    with pytest.raises(UnsupportedError, match="activations must be three of none, relu"):
        fastconv.nn.SeparableBlock(2, 2, 2, activations=("relu", "tanh", "none"))


def narrower(module):
    module.weight = nn.Parameter(module.weight[:, :, 1:2].clone())
    module.kernel_size = (1, 3, 3)


SURGERY = {
    "stride": lambda m: setattr(m, "stride", (1, 2, 2)),
    "padding": lambda m: setattr(m, "padding", (0, 1, 0)),
    "dilation": lambda m: setattr(m, "dilation", (1, 1, 2)),
    "bias": lambda m: setattr(m, "bias", None),
    "weight": narrower,
}


@pytest.mark.parametrize("change", SURGERY)
def test_module_changed_after_a_call_is_pytorchs(change):
    torch.manual_seed(0)
    theirs, x = nn.Conv3d(4, 6, 3, padding=1), torch.randn(1, 4, 5, 9, 8)
    ours = fastconv.nn.Conv3d.convert(copy.deepcopy(theirs))
    with torch.no_grad():
        ours(x)
        for module in (ours, theirs):
            SURGERY[change](module)
        close(ours(x), theirs(x))


def test_module_whose_options_change_plans_anew():
    x, module = torch.randn(1, 4, 5, 9, 8), fastconv.nn.Conv3d(4, 6, 3)
    with torch.no_grad():
        want = module(x)
        for name, value in (("backend", "torch"), ("algorithm", "direct"), ("channels_last", True)):
            setattr(module, name, value)
            close(module(x), want)
    plan = module.plan_of(x.shape)
    assert (plan.backend, plan.layout) == ("torch", CHANNELS_LAST)
    module.algorithm = "fft"
    with pytest.raises(UnsupportedError, match="unknown algorithm"):
        module(x)


COMPUTED = {
    "parametrised": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "bias": lambda m: prune.l1_unstructured(m, "bias", 0.5),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_weights_that_are_computed(how):
    torch.manual_seed(0)
    theirs, x = nn.Conv3d(4, 6, 3), torch.randn(1, 4, 5, 9, 8)
    ours = fastconv.nn.Conv3d.convert(copy.deepcopy(theirs))
    for module in (ours, theirs):
        torch.manual_seed(1)
        COMPUTED[how](module)
        module.eval()
    with torch.no_grad():
        close(ours(x), theirs(x))
    ours(x).sum().backward()
    theirs(x).sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(mine.grad, other.grad)


class Residual(nn.Module):
    """What rewriting must respect: a shared layer, a derived class, a transposed layer, `view`."""

    class Own(nn.Conv3d):
        pass

    def __init__(self, view: bool):
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.shared = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))
        self.alias = self.shared
        self.own = self.Own(8, 8, 1)
        self.up = nn.ConvTranspose3d(8, 8, 1)
        self.view = view

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.up(self.own(x))
        x = self.alias(self.shared(x))
        return {"y": x.view(x.shape[0], -1) if self.view else x.flatten(1), "shape": x.shape}


@pytest.mark.parametrize("view", [False, True])
def test_accelerate_a_model_nobody_here_wrote(view):
    torch.manual_seed(0)
    model, x = Residual(view).eval(), torch.randn(1, 3, 6, 9, 10)
    with torch.no_grad():
        before = model(x)
        new, report = fastconv.accelerate(model, x)
        after = new(x)
    close(after["y"], before["y"])
    assert {(t.dtype, t.device.type) for t in model.state_dict().values()} == {
        (torch.float32, "cpu")
    }
    assert type(model.first) is nn.Conv3d
    assert new.first.weight is model.first.weight
    assert new.shared is new.alias
    assert new.state_dict().keys() == model.state_dict().keys()
    assert report.error <= report.allowed
    assert report.channels_last
    assert report.traced
    reasons = {layer.name: layer.reason for layer in report.layers if layer.plan is None}
    assert reasons == {"up": "transposed convolution"}
    assert [layer.name for layer in report.layers] == ["first", "own", "up", "shared", "shared"]
    assert "4 of 5 convolutions replaced" in str(report)


def test_accelerate_refuses_training_mode():
    with pytest.raises(
        UnsupportedError, match=r"the model is in training mode; call model.eval\(\) first"
    ):
        fastconv.accelerate(Residual(False), torch.randn(1, 3, 6, 9, 10))


def test_accelerate_refuses_loudly_beyond_the_bound(monkeypatch):
    from fastconv import torch_ops

    right = torch_ops.Runner.__call__
    monkeypatch.setattr(torch_ops.Runner, "__call__", lambda *a: right(*a) * 1.001)
    with pytest.raises(UnsupportedError, match="accelerate: the error of the outputs is"):
        fastconv.accelerate(
            nn.Sequential(nn.Conv3d(2, 2, 3)).eval(), torch.randn(1, 2, 5, 5, 5), backend="torch"
        )
