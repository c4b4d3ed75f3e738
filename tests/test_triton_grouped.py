"""Grouped on Triton: its three forms, half precision, groups that stay apart, and the gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastconv.backends import available, interpreted
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan

if available()["triton"] is not None:
    pytest.skip(available()["triton"], allow_module_level=True)

import torch

from fastconv.triton_kernels import (
    grouped,
    grouped_gather,
    grouped_weight_frames,
    grouped_weights,
)
from fastconv.triton_kernels import grouped_gradients as gradients

DEVICE = "cpu" if interpreted() else "cuda"
FORMS = {"tiles": grouped.TILES, "lanes": grouped.LANES, "frames": grouped.FRAMES}

layouts = pytest.mark.parametrize("layout", LAYOUTS)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())

# x, w, stride, padding, dilation, groups: what each moves is in its name.
CASES = {
    "tails": ((1, 10, 5, 4, 5), (15, 2, 3, 3, 3), 1, 1, 1, 5),
    "strided_dilated_one_sided": (
        (2, 6, 4, 5, 7),
        (4, 3, 2, 2, 3),
        (2, 1, 2),
        ((2, 0), (0, 1), (3, 1)),
        (1, 2, 1),
        2,
    ),
    "a_tile_with_groups_missing": ((1, 21, 2, 3, 4), (14, 3, 1, 3, 3), 1, (0, 1, 1), 1, 7),
    "one_to_many": ((1, 2, 3, 2, 3), (24, 1, 3, 1, 1), 1, (1, 0, 0), 1, 2),
    "time_only_long": ((1, 4, 11, 1, 2), (4, 2, 5, 1, 1), (3, 1, 1), (4, 0, 0), (2, 1, 1), 2),
    "blocks_of_channels": ((1, 40, 1, 3, 4), (36, 40, 1, 1, 3), 1, (0, 0, 1), 1, 1),
    "one_axis": ((2, 6, 9), (6, 2, 3), 2, 1, 1, 3),
    "two_axes": ((1, 4, 5, 6), (8, 2, 3, 2), (1, 2), 1, 1, 2),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SMALL = Geometry.of((1, 12, 2, 3, 5), (12, 3, 3, 3, 3), 1, 1, 1, 4)


def plan_for(geometry, layout=CHANNELS_LAST, dtype="float32", epilogue=None, **config) -> Plan:
    options = tuple(config.items())
    return Plan(
        "grouped", "triton", geometry, dtype, epilogue or Epilogue(), layout, DEVICE, config=options
    )


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    last = layout == CHANNELS_LAST
    tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor.contiguous()
    return tensor.to(DEVICE)


def integers(shape, plan: Plan, seed: int, layout=None) -> torch.Tensor:
    """Small integers: their sums are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, tuple(shape), generator=generator)
    values = values.to(getattr(torch, plan.dtype))
    return laid_out(values, layout or plan.layout) if len(shape) > 2 else values.to(DEVICE)


def poisoned(shape, plan: Plan, layout=None) -> torch.Tensor:
    values = torch.full(tuple(shape), torch.nan, dtype=getattr(torch, plan.dtype))
    return laid_out(values, layout or plan.layout) if len(shape) > 2 else values.to(DEVICE)


def run(plan: Plan, x, w, bias=None, residual=None) -> torch.Tensor:
    y = poisoned(plan.geometry.y_shape, plan)
    workspace = poisoned((grouped.workspace_size(plan),), plan)
    grouped.run(plan, x, grouped.prepack(w, plan), bias, residual, y, workspace)
    return y


def exact(x, w, g: Geometry) -> torch.Tensor:
    """The convolution in float64, on the CPU."""
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
    x = torch.nn.functional.pad(x, [side for pair in reversed(g.padding) for side in pair])
    return convolve[g.n - 1](x, w, None, g.stride, 0, g.dilation, g.groups)


def assert_rounded_once(got: torch.Tensor, want: torch.Tensor) -> None:
    """Exact in float32; in half precision off by one rounding, at most half a unit."""
    unit = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
    assert ((got.cpu().double() - want).abs() <= unit * want.abs()).all()


@cases
@forms
@layouts
def test_every_form_is_exact_on_integers(case, form, layout):
    geometry = Geometry.of(*case)
    plan = plan_for(geometry, layout, epilogue=Epilogue(True, "relu", True), form=form)
    x, w = integers(geometry.x_shape, plan, 0), integers(geometry.w_shape, plan, 1, "contiguous")
    bias, residual = (integers(s, plan, 2) for s in ((geometry.out_channels,), geometry.y_shape))
    z = exact(x.cpu().double(), w.cpu().double(), geometry) + residual.cpu().double()
    z += bias.cpu().double().reshape(-1, *(1,) * geometry.n)
    assert_rounded_once(run(plan, x, w, bias, residual), z.relu())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@forms
@layouts
def test_half_precision_is_rounded_once(dtype, form, layout):
    plan = plan_for(SMALL, layout, dtype, form=form)
    x, w = integers(SMALL.x_shape, plan, 0), integers(SMALL.w_shape, plan, 1, "contiguous")
    want = exact(x.cpu().double(), w.cpu().double(), SMALL)
    assert_rounded_once(run(plan, x, w), want)


@pytest.mark.parametrize("config", grouped.CONFIGS, ids=str)
def test_every_config_is_exact_on_integers(config):
    plan = plan_for(SMALL, **config)
    x, w = integers(SMALL.x_shape, plan, 0), integers(SMALL.w_shape, plan, 1, "contiguous")
    assert_rounded_once(run(plan, x, w), exact(x.cpu().double(), w.cpu().double(), SMALL))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", torch.inf), ("bfloat16", torch.inf), ("float32", torch.nan)]
)
@forms
@layouts
def test_a_group_does_not_see_another(form, layout, dtype, value):
    """Groups share tiles, and 0 * Inf is NaN: yet only the outputs that read the value have it."""
    plan = plan_for(SMALL, layout, dtype, form=form)
    x, w = integers(SMALL.x_shape, plan, 0), integers(SMALL.w_shape, plan, 1, "contiguous")
    w[w == 0] = 1
    x[0, 4, 0, 1, 1] = value
    got, want = run(plan, x, w).cpu(), exact(x.cpu().double(), w.cpu().double(), SMALL)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert_rounded_once(got[want.isfinite()], want[want.isfinite()])
    assert want[0, [0, 1, 2, 6, 7, 8]].isfinite().all()


def gradients_of(plan: Plan, x, w, gy) -> tuple[torch.Tensor, torch.Tensor]:
    gx, gw = poisoned(x.shape, plan), poisoned(w.shape, plan, "contiguous")
    workspace = poisoned((gradients.workspace_size(plan),), plan)
    gradients.input_gradient(plan, gy, w, gx, workspace)
    gradients.weight_gradient(plan, x, gy, gw, workspace.fill_(torch.nan))
    return gx, gw


def exact_gradients(g: Geometry, x, w, gy) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = x.cpu().double().requires_grad_(), w.cpu().double().requires_grad_()
    return torch.autograd.grad(exact(x, w, g), (x, w), gy.cpu().double())


WIDER = {  # what has too many channels for frames
    "dense": ((1, 5, 2, 4, 5), (20, 5, 1, 3, 3), 1, (0, 1, 1), 1, 1),
    "pointwise_strided": ((2, 18, 2, 3, 3), (6, 18, 1, 1, 1), (1, 2, 2), 0, 1, 1),
    "wide_groups": ((1, 40, 2, 3, 3), (36, 20, 2, 1, 1), 1, 0, 1, 2),
}


@pytest.mark.parametrize("case", (CASES | WIDER).values(), ids=(CASES | WIDER).keys())
@layouts
def test_gradients_are_exact_on_integers(case, layout):
    geometry = Geometry.of(*case)
    plan = plan_for(geometry, layout)
    x, gy = (integers(s, plan, 0) for s in (geometry.x_shape, geometry.y_shape))
    w = integers(geometry.w_shape, plan, 1, "contiguous")
    for got, want in zip(
        gradients_of(plan, x, w, gy), exact_gradients(geometry, x, w, gy), strict=True
    ):
        assert_rounded_once(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@forms
@layouts
def test_gradients_in_every_form_and_precision(form, layout, dtype):
    plan = plan_for(SMALL, layout, dtype, form=form)
    x, gy = (integers(s, plan, 0) for s in (SMALL.x_shape, SMALL.y_shape))
    w = integers(SMALL.w_shape, plan, 1, "contiguous")
    for got, want in zip(
        gradients_of(plan, x, w, gy), exact_gradients(SMALL, x, w, gy), strict=True
    ):
        assert_rounded_once(got, want)


def test_an_empty_batch_starts_nothing_and_has_no_weight_gradient():
    geometry = Geometry.of((0, 4, 3, 3, 3), (4, 2, 3, 3, 3), 1, 1, 1, 2)
    plan = plan_for(geometry)
    x, w = integers(geometry.x_shape, plan, 0), integers(geometry.w_shape, plan, 1, "contiguous")
    assert not any(start.programs for start in grouped.launches(plan))
    gx, gw = gradients_of(plan, x, w, x)
    assert gx.shape == x.shape
    assert (gw == 0).all()


@pytest.fixture
def wide_offsets(monkeypatch):
    """Every launch takes 64 bits."""
    caches = (grouped.launches, gradients.launches_input)
    for module in (grouped_gather, grouped_weights, grouped_weight_frames):
        monkeypatch.setattr(module, "wide", lambda *elements: True)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@forms
@layouts
def test_wide_offsets_give_the_same(form, layout, wide_offsets):
    plan = plan_for(SMALL, layout, form=form)
    assert all(dict(start.constants)["WIDE"] for start in grouped.launches(plan))
    x, gy = (integers(s, plan, 0) for s in (SMALL.x_shape, SMALL.y_shape))
    w = integers(SMALL.w_shape, plan, 1, "contiguous")
    got = (run(plan, x, w), *gradients_of(plan, x, w, gy))
    want = (exact(x.cpu().double(), w.cpu().double(), SMALL), *exact_gradients(SMALL, x, w, gy))
    for a, b in zip(got, want, strict=True):
        assert_rounded_once(a, b)


@pytest.mark.parametrize("batch", [8, 400])
def test_offsets_are_wide_where_the_arrays_are(batch):
    geometry = Geometry.of((batch, 96, 16, 56, 56), (96, 6, 3, 3, 3), 1, 1, 1, 16)
    for form in FORMS.values():
        plan = plan_for(geometry, form=form)
        starts = (*grouped.launches(plan), gradients.launches_input(plan)[1])
        starts += (gradients.launches_weight(plan)[0],)
        assert {dict(start.constants)["WIDE"] for start in starts} == {batch > 8}


def test_float32_products_follow_the_plan():
    """Three TF32 products by default, one if the user allows it, plain ones on request."""
    plan = plan_for(SMALL, form=grouped.TILES)
    plans = (plan, replace(plan, precision="tf32"), replace(plan, config=(("ieee", 1),)))
    found = [dict(grouped.launches(p)[0].constants)["PRECISION"] for p in plans]
    assert found == ["tf32x3", "tf32", "ieee"]


def test_the_form_follows_channels_precision_and_size():
    few = Geometry.of((8, 96, 8, 56, 56), (96, 6, 3, 3, 3), 1, 1, 1, 16)
    names = {grouped_gather.Gather.forward: {}, grouped_gather.Gather.backward: {}}
    for make in names:
        form = {
            dtype: type(grouped.cut(make(few), plan_for(few, dtype=dtype))).__name__
            for dtype in ("float32", "bfloat16")
        }
        assert form == {"float32": "Lanes", "bfloat16": "Frames"}
    many = Geometry.of((8, 96, 8, 56, 56), (96, 48, 3, 3, 3), 1, 1, 1, 2)
    for geometry in (many, SMALL):
        gather = grouped_gather.Gather.forward(geometry)
        assert type(grouped.cut(gather, plan_for(geometry))).__name__ == "Tiles"
