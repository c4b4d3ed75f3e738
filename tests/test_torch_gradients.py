"""Gradients of tensors: every geometry, whoever computes them, against float64."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cases
from fastconv.backends import available
from fastconv.geometry import Geometry

torch = pytest.importorskip("torch")

from fastconv import torch_autograd, torch_ops_gradients  # noqa: E402  (after the skip)
from fastconv.plan import Plan  # noqa: E402
from fastconv.reference import gradients  # noqa: E402
from fastconv.torch_ops_runner import dense  # noqa: E402

BACKENDS = [b for b in ("auto", "c", "torch", "reference") if b == "auto" or not available()[b]]
needs_c = pytest.mark.skipif(available()["c"] is not None, reason=str(available()["c"]))


def arrays(g: Geometry, layout: str):
    shapes = (g.x_shape, g.w_shape, g.y_shape)
    x, w, gy = (torch.from_numpy(cases.random(s, i)) for i, s in enumerate(shapes))
    return dense(x, layout), w, dense(gy, layout)


def by_operators(g: Geometry, x, w, gy, backend: str):
    steps = (g.stride, [p for pair in g.padding for p in pair], g.dilation)
    choice = (backend, 4.0)
    gx = torch_autograd.gradient_of_input(gy, w, x, *steps, *choice)
    return gx, torch_autograd.gradient_of_weight(gy, x, w.shape, *steps, *choice)


def exact(g: Geometry, x, w, gy):
    plan = Plan("grouped", "reference", g, "float64")
    gx, gw = torch.empty(g.x_shape).double().numpy(), torch.empty(g.w_shape).double().numpy()
    x, w, gy = (t.double().numpy() for t in (x, w, gy))
    gradients.input_gradient(plan, gy, w, gx, None)
    gradients.weight_gradient(plan, x, gy, gw, None)
    return torch.from_numpy(gx), torch.from_numpy(gw)


def check(g: Geometry, layout: str, backend: str, device: str = "cpu") -> None:
    x, w, gy = arrays(g, layout)
    got, want = by_operators(g, *(t.to(device) for t in (x, w, gy)), backend), exact(g, x, w, gy)
    sums = exact(g, x.abs(), w.abs(), gy.abs())
    # Sums of n products in any order (tests/tolerance.py); minimal filtering may cost four times
    # that, as the tolerance asked for says.
    terms = (g.out_channels // g.groups * g.taps, g.batch * gy[0, 0].numel() if g.batch else 1)
    for a, b, size, n in zip(got, want, sums, terms, strict=True):
        assert a.shape == b.shape
        if not b.numel():
            continue
        bound = 4 * torch.finfo(torch.float32).eps * (n + 9) * size.max()
        assert (a.double().cpu() - b).abs().max() <= bound
    assert dense(got[0], layout).data_ptr() == got[0].data_ptr()


@given(cases.geometries(family="grouped"), cases.layouts(), st.sampled_from(BACKENDS))
def test_gradients_of_any_geometry(g, layout, backend):
    check(g, layout, backend)


@given(
    cases.geometries(family="depthwise", max_channels=20, max_stride=3, max_dilation=3),
    cases.layouts(),
    st.sampled_from(BACKENDS),
)
def test_gradients_of_any_depthwise_geometry(g, layout, backend):
    check(g, layout, backend)


LAYERS = {  # input, weight, groups, stride, padding
    "depthwise": ((1, 24, 4, 10, 10), (24, 1, 3, 3, 3), 24, 1, 1),
    "depthwise, strided": ((1, 24, 4, 10, 10), (24, 1, 3, 3, 3), 24, (1, 2, 2), 1),
    "grouped": ((1, 24, 4, 8, 8), (24, 6, 3, 3, 3), 4, 1, 1),
    "grouped, strided": ((1, 24, 4, 9, 8), (48, 6, 3, 3, 3), 4, (1, 2, 2), 1),
    "padded more than it reaches": ((1, 24, 4, 8, 8), (24, 6, 1, 3, 3), 4, 1, (1, 3, 4)),
    "dense": ((1, 16, 4, 14, 14), (32, 16, 3, 3, 3), 1, 1, 1),
}


@needs_c
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_layers_are_ours(layer, layout, monkeypatch):
    x, w, groups, stride, padding = LAYERS[layer]
    g = Geometry.of(x, w, stride, padding, 1, groups)

    def refused(*arguments):
        raise AssertionError("PyTorch's gradient was asked for")

    if groups > 1:
        monkeypatch.setattr(torch_ops_gradients, "_framework", refused)
    check(g, layout, "auto" if groups > 1 else "c")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_layers_on_a_gpu(layer, layout, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    x, w, groups, stride, padding = LAYERS[layer]
    check(Geometry.of(x, w, stride, padding, 1, groups), layout, "auto", "cuda")


@pytest.mark.parametrize("expanded", [True, False])
def test_gradients_that_are_views(expanded):
    """`sum().backward()` sends one number, expanded; slices send a part of a larger tensor."""
    g = Geometry.of((2, 8, 3, 6, 6), (8, 1, 3, 3, 3), 1, 1, 1, 8)
    x, w, gy = arrays(g, "channels_last_3d")
    gy = torch.ones(1).expand(g.y_shape) if expanded else torch.stack([gy, gy], 2)[:, :, 1]
    got, want = by_operators(g, x, w, gy, "auto"), exact(g, x, w, gy.contiguous())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_gradients_that_nobody_asked_for_are_not_computed(monkeypatch):
    import fastconv

    asked = []
    for name in ("input_gradient", "weight_gradient"):
        original = getattr(torch_autograd, name)
        monkeypatch.setattr(
            torch_autograd, name, lambda *a, n=name, f=original: (asked.append(n), f(*a))[1]
        )
    x, w = torch.randn(1, 4, 6), torch.randn(4, 1, 3, requires_grad=True)
    fastconv.conv1d(x, w, groups=4).sum().backward()
    assert asked == ["weight_gradient"]
