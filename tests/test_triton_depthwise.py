"""Depthwise on Triton: half precisions, 64-bit offsets, what is compiled, and the gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tolerance
from fastconv.backends import available, interpreted
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, CONTIGUOUS, LAYOUTS, Plan
from fastconv.reference import direct

if available()["triton"] is not None:
    pytest.skip(available()["triton"], allow_module_level=True)

import torch

from fastconv.triton_kernels import depthwise
from fastconv.triton_kernels import depthwise_gradients as gradients

DEVICE = "cpu" if interpreted() else "cuda"
FEW = (("elements", 8), ("frames", 99))  # large programs: the interpreter's time is their number

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def plan_of(
    channels,
    size,
    kernel,
    stride=1,
    padding=0,
    dilation=1,
    *,
    multiplier=1,
    batch=1,
    dtype="float32",
    layout=CHANNELS_LAST,
    epilogue=None,
    config=FEW,
) -> Plan:
    w_shape = (channels * multiplier, 1, *kernel)
    geometry = Geometry.of((batch, channels, *size), w_shape, stride, padding, dilation, channels)
    epilogue = epilogue or Epilogue()
    return Plan(
        "depthwise", "triton", geometry, dtype, epilogue, layout, device=DEVICE, config=config
    )


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    last = layout == CHANNELS_LAST
    tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor.contiguous()
    return tensor.to(DEVICE)


def values(shape, plan: Plan, seed: int, integers: bool = True) -> torch.Tensor:
    """Small integers, whose sums are exact in float32, or standard normal numbers; none is zero."""
    g = torch.Generator().manual_seed(seed)
    if integers:
        x = torch.randint(1, 5, shape, generator=g) * (
            2 * torch.randint(0, 2, shape, generator=g) - 1
        )
    else:
        x = torch.randn(shape, generator=g)
    x = x.to(getattr(torch, plan.dtype))
    return laid_out(x, plan.layout if len(shape) > 2 and shape[1] > 1 else CONTIGUOUS)


def poisoned(shape, plan: Plan, layout: str | None = None) -> torch.Tensor:
    empty = torch.full(shape, float("nan"), dtype=getattr(torch, plan.dtype))
    return laid_out(empty, layout or plan.layout)


def scratch(plan: Plan) -> torch.Tensor | None:
    size = gradients.workspace_size(plan)
    return poisoned((size,), plan, CONTIGUOUS) if size else None


def forward(plan: Plan, x, w, bias=None, residual=None) -> torch.Tensor:
    y = poisoned(plan.geometry.y_shape, plan)
    depthwise.run(plan, x, depthwise.prepack(w, plan), bias, residual, y, None)
    return y


def input_gradient(plan: Plan, gy, w) -> torch.Tensor:
    gx = poisoned(plan.geometry.x_shape, plan)
    gradients.input_gradient(plan, gy, w, gx, scratch(plan))
    return gx


def weight_gradient(plan: Plan, x, gy) -> torch.Tensor:
    gw = poisoned(plan.geometry.w_shape, plan, CONTIGUOUS)
    gradients.weight_gradient(plan, x, gy, gw, scratch(plan))
    return gw


def exact(plan: Plan, x, w, gy):
    """y and both gradients by PyTorch in float64."""
    g = plan.geometry.lifted()
    x, w, gy = (t.detach().double().cpu() for t in (x, w, gy))
    x, w = x.requires_grad_(), w.requires_grad_()
    sides = [side for pair in reversed(g.padding) for side in pair]
    padded = torch.nn.functional.pad(x.reshape(g.x_shape), sides)
    y = torch.nn.functional.conv3d(
        padded, w.reshape(g.w_shape), None, g.stride, 0, g.dilation, g.groups
    )
    y.backward(gy.reshape(g.y_shape))
    return y.detach().reshape(plan.geometry.y_shape), x.grad, w.grad


def arrays(plan: Plan, integers: bool = True):
    """x, w and the gradient of y."""
    g = plan.geometry
    return tuple(
        values(s, plan, i, integers) for i, s in enumerate((g.x_shape, g.w_shape, g.y_shape))
    )


def assert_close(got, want, terms: int, magnitude: float, dtype: str) -> None:
    """A sum of products of numbers of this precision, added in float32 and rounded once.

    |error| <= eps / 2 |want| + (terms + 8) eps32 sum |products|
    """
    unit, eps32 = torch.finfo(getattr(torch, dtype)).eps / 2, torch.finfo(torch.float32).eps
    error = (got.double().cpu() - want).abs()
    assert (error <= unit * want.abs() + (terms + 8) * eps32 * magnitude).all()


# What each reaches beyond the family's own tests, which take few and large programs.
WALKS = {
    "split_in_time": dict(size=(9, 4, 5), kernel=(3, 3, 3), padding=1, config=(("frames", 2),)),
    "rule": dict(size=(5, 6, 7), kernel=(3, 3, 3), padding=1, config=()),
    "rule_for_lines": dict(size=(9, 3, 5), kernel=(5, 1, 1), padding=(2, 0, 0), config=()),
    "residues": dict(
        size=(9, 4, 5),
        kernel=(3, 1, 1),
        dilation=(2, 1, 1),
        padding=(3, 0, 0),
        config=(("frames", 2),),
    ),
    "strided_ring": dict(size=(9, 4, 4), kernel=(5, 1, 2), stride=(2, 1, 1), padding=(2, 0, 1)),
    "gathered_in_time": dict(
        size=(9, 3, 3), kernel=(2, 2, 1), stride=(2, 1, 1), dilation=(3, 1, 1)
    ),
    "fewer_frames_than_taps": dict(size=(2, 4, 4), kernel=(5, 2, 2), padding=(4, 1, 1)),
    "moved_sums": dict(size=(6, 4, 4), kernel=(3, 2, 2), config=(*FEW, ("unroll", 0))),
    "loaded_at_each_step": dict(size=(4, 5, 5), kernel=(2, 3, 3), config=(*FEW, ("held", 0))),
    "loaded_ahead": dict(size=(4, 5, 5), kernel=(2, 2, 2), config=(*FEW, ("ahead", 1))),
    "vectors": dict(size=(3, 5, 5), kernel=(2, 2, 2), config=(("vector", 4),)),
    "loop_of_taps": dict(size=(3, 4, 4), kernel=(5, 5, 5), padding=(2, 4, 2), dilation=(1, 2, 1)),
    "larger_tile": dict(
        size=(3, 7, 5), kernel=(1, 2, 3), config=(*FEW, ("columns", 4), ("rows", 3))
    ),
}


@layouts
@pytest.mark.parametrize("case", WALKS.values(), ids=WALKS.keys())
def test_walks_and_blocks_are_exact_on_integers(case, layout):
    plan = plan_of(12, layout=layout, **case)
    x, w, gy = arrays(plan)
    assert torch.equal(forward(plan, x, w).double().cpu(), exact(plan, x, w, gy)[0])


WINDOWS = {
    "same": dict(size=(4, 5, 6), kernel=(3, 3, 3), padding=1, batch=2),
    "time_only": dict(size=(6, 3, 5), kernel=(5, 1, 1), padding=(2, 0, 0)),
    "space_only": dict(size=(3, 6, 7), kernel=(1, 3, 3), padding=(0, 1, 1)),
    "space_strided": dict(size=(4, 7, 8), kernel=(3, 3, 3), stride=(1, 2, 2), padding=1),
    "strided": dict(size=(7, 6, 6), kernel=(3, 2, 3), stride=(2, 2, 3), padding=(1, 0, 1)),
    "stride_beyond_kernel": dict(size=(5, 7, 7), kernel=(1, 2, 2), stride=(2, 3, 3)),
    "dilated": dict(size=(7, 8, 9), kernel=(3, 2, 2), padding=(2, 1, 0), dilation=(2, 1, 3)),
    "dilated_and_strided": dict(
        size=(7, 8, 9), kernel=(2, 2, 2), stride=(2, 3, 1), padding=(2, 3, 1), dilation=(3, 2, 1)
    ),
    "one_sided": dict(size=(3, 4, 5), kernel=(3, 2, 2), padding=((4, 0), (0, 3), (3, 1))),
    "multiplier": dict(size=(4, 4, 5), kernel=(2, 3, 2), padding=1, multiplier=3, batch=2),
    "multiplier_strided": dict(size=(4, 4, 5), kernel=(2, 3, 2), stride=2, padding=1, multiplier=2),
    "fewer_frames_than_taps": dict(size=(2, 4, 4), kernel=(4, 2, 2), padding=(3, 0, 0)),
    "taps_shared_out": dict(
        size=(3, 5, 5), kernel=(3, 5, 5), padding=(1, 2, 2), dilation=(2, 1, 1)
    ),
    "loop_of_taps": dict(
        size=(2, 3, 4), kernel=(3, 5, 7), stride=(2, 1, 2), padding=(1, 2, 3), multiplier=2
    ),
    "one_axis": dict(size=(9,), kernel=(3,), padding=1),
    "two_axes": dict(size=(5, 6), kernel=(3, 3), padding=1),
}


@layouts
@pytest.mark.parametrize("case", WINDOWS.values(), ids=WINDOWS.keys())
def test_gradients_are_exact_on_integers(case, layout):
    # Contiguous channels are programs of their own.
    plan = plan_of(6 if layout == CHANNELS_LAST else 2, layout=layout, **case)
    assert gradients.supports(plan.geometry, plan.dtype) is None
    x, w, gy = arrays(plan)
    _, gx, gw = exact(plan, x, w, gy)
    assert torch.equal(input_gradient(plan, gy, w).double().cpu(), gx)
    assert torch.equal(weight_gradient(plan, x, gy).double().cpu(), gw)


@layouts
def test_weight_gradient_shares_and_repeats(layout):
    """Several programs per channel, in time as well, and the same bits again."""
    case = dict(size=(9, 6, 7), kernel=(2, 2, 2), batch=2, config=(("frames", 4), ("elements", 1)))
    plan = plan_of(3, layout=layout, **case)
    x, w, gy = arrays(plan, integers=False)
    first, _ = gradients.launches_weight(plan)
    assert first.programs > plan.geometry.out_channels
    gw = weight_gradient(plan, x, gy)
    assert torch.equal(weight_gradient(plan, x, gy), gw)
    terms = plan.geometry.batch * int(np.prod(plan.geometry.out_size))
    magnitude = float(exact(plan, x.abs(), w, gy.abs())[2].max())
    assert_close(gw, exact(plan, x, w, gy)[2], terms, magnitude, plan.dtype)


@layouts
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_precisions(dtype, layout):
    plan = plan_of(4, (3, 4, 6), (3, 3, 3), 1, 1, dtype=dtype, layout=layout)
    x, w, gy = arrays(plan, integers=False)
    y, gx, gw = exact(plan, x, w, gy)
    largest = [float(t.max()) for t in exact(plan, x.abs(), w.abs(), gy.abs())]
    assert_close(forward(plan, x, w), y, 27, largest[0], dtype)
    assert_close(input_gradient(plan, gy, w), gx, 27, largest[1], dtype)
    assert_close(weight_gradient(plan, x, gy), gw, 3 * 4 * 6, largest[2], dtype)


@layouts
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_epilogues_of_half_precisions(dtype, layout):
    """One rounding, behind bias, residual and activation."""
    epilogue = Epilogue(bias=True, activation="silu", residual=True)
    plan = plan_of(6, (3, 4, 5), (2, 3, 3), 1, 1, dtype=dtype, layout=layout, epilogue=epilogue)
    x, w, residual = arrays(plan, integers=False)
    bias = values((6,), plan, 5, integers=False)
    z = exact(plan, x, w, residual)[0] + bias.double().cpu()[:, None, None, None]
    z += residual.double().cpu()
    magnitude = float(exact(plan, x.abs(), w.abs(), residual)[0].max()) + 10
    y = forward(plan, x, w, bias, residual)
    want = torch.nn.functional.silu(z)
    assert_close(y, want, 20, tolerance.SLOPE["silu"] * magnitude, dtype)


@layouts
@pytest.mark.parametrize("multiplier", [1, 2])
def test_wide_offsets_give_the_same_bits(layout, multiplier):
    case = dict(size=(3, 4, 5), kernel=(2, 3, 2), stride=(1, 2, 1), padding=1, batch=2)
    plan = plan_of(2, multiplier=multiplier, layout=layout, **case)
    wide = replace(plan, config=(*plan.config, ("wide", 1)))
    assert "int64" in text_of(depthwise.launches(wide)[0])
    x, w, gy = arrays(plan, integers=False)
    assert torch.equal(forward(wide, x, w), forward(plan, x, w))
    assert torch.equal(input_gradient(wide, gy, w), input_gradient(plan, gy, w))
    assert torch.equal(weight_gradient(wide, x, gy), weight_gradient(plan, x, gy))


# Elements of x and y: below and beyond what 32 bits count.
@layouts
@pytest.mark.parametrize(("frames", "wide"), [(16, False), (2048, True)])
def test_large_arrays_get_wide_offsets(layout, frames, wide):
    plan = plan_of(64, (frames, 128, 128), (3, 3, 3), 1, 1, layout=layout, config=())
    starts = (
        *depthwise.launches(plan),
        gradients.launches_input(plan)[-1],
        gradients.launches_weight(plan)[0],
    )
    for start in starts:
        assert ("int64" in text_of(start)) == wide


def text_of(start) -> str:
    import inspect

    return inspect.getsource(start.kernel.fn)


@layouts
def test_one_kernel_serves_all_extents(layout):
    """Compiling takes seconds; extents, channels and padding are numbers to it."""
    kernels = {
        launch.kernel
        for channels, size in ((32, (16, 56, 56)), (48, (8, 28, 28)), (160, (32, 112, 112)))
        for padding in (1, (2, 1, 1))
        for plan in [plan_of(channels, size, (3, 3, 3), 1, padding, layout=layout, config=())]
        for launch in depthwise.launches(plan)
    }
    assert len(kernels) == 1


@layouts
def test_infinite_inputs_reach_their_weight_gradients_and_no_others(layout):
    """Tiles, tails of walks and padding multiply nothing that is outside by an infinity."""
    for size, place in (((4, 5, 6), (0, 0, 0)), ((4, 6, 5), (3, 5, 4)), ((5, 6, 7), (2, 3, 3))):
        plan = plan_of(3, size, (3, 3, 3), 1, 1, layout=layout)
        x, _, gy = arrays(plan)
        x[(0, 1, *place)] = float("inf")
        padded = direct.pad(x.double().cpu().numpy(), plan.geometry)
        reached = np.array(
            [np.isinf(view[0, 1]).any() for _, view in direct.taps(padded, plan.geometry)]
        )
        gw = weight_gradient(plan, x, gy).cpu().reshape(3, -1)
        assert gw[[0, 2]].isfinite().all()
        assert np.array_equal(~gw[1].isfinite().numpy(), reached)


@layouts
@pytest.mark.parametrize("stride", [1, 2])
def test_infinite_gradients_reach_their_inputs_and_no_others(layout, stride):
    plan = plan_of(3, (4, 5, 6), (3, 3, 3), stride, 1, layout=layout)
    _, w, gy = arrays(plan)
    ones = torch.zeros(gy.shape, dtype=torch.float64)
    gy[0, 1, -1, -1, -1] = float("inf")
    ones[0, 1, -1, -1, -1] = 1
    reached = exact(plan, gy.new_zeros(plan.geometry.x_shape), w, ones)[1] != 0
    assert torch.equal(~input_gradient(plan, gy, w).cpu().isfinite(), reached)


@layouts
def test_an_empty_batch_has_gradients_of_zero(layout):
    plan = plan_of(3, (4, 5, 6), (3, 3, 3), 1, 1, batch=0, layout=layout)
    x, w, gy = (
        torch.empty(s, device=DEVICE) for s in ((0, 3, 4, 5, 6), (3, 1, 3, 3, 3), (0, 3, 4, 5, 6))
    )
    assert input_gradient(plan, gy, w).shape == x.shape
    assert torch.equal(weight_gradient(plan, x, gy), torch.zeros_like(w))


def test_refusals_name_the_reason():
    grouped = Geometry.of((1, 4, 3, 5, 5), (4, 2, 1, 3, 3), groups=2)
    assert "not depthwise" in depthwise.supports(grouped, "float32", Epilogue())
    assert "not depthwise" in gradients.supports(grouped, "float32")
    assert "float64" in gradients.supports(plan_of(2, (3, 4, 4), (3, 3, 3)).geometry, "float64")
