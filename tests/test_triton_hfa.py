"""The fully separable block in Triton: what its kernels do beyond the tests of every backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import cases
from fastconv.backends import available, interpreted, kernel
from fastconv.epilogue import Epilogue
from fastconv.geometry import SeparableGeometry
from fastconv.plan import CHANNELS_LAST, CONTIGUOUS, LAYOUTS, Plan
from fastconv.transforms import amplification, transform

if available()["triton"] is not None:
    pytest.skip(str(available()["triton"]), allow_module_level=True)

import torch

from fastconv.triton_kernels import hfa_source, launch

hfa = kernel("hfa", "triton")
DEVICE = "cpu" if interpreted() else "cuda"
RELU = Epilogue(True, "relu")
SILU = (RELU, Epilogue(True, "silu"), Epilogue(True, "none", True))
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def block(channels, size, taps, batch=1, **options) -> SeparableGeometry:
    (c, m, k), (kt, kh, kw) = channels, taps
    shapes = (m, c, kt, 1, 1), (m, 1, 1, kh, kw), (k, m, 1, 1, 1)
    return SeparableGeometry.of((batch, c, *size), *shapes, **options)


def plan_for(geometry, m=1, dtype="float32", layout=CHANNELS_LAST, epilogues=SILU, **options):
    t, d, _ = geometry.stages
    strides = (t.stride[0], *d.stride[1:])
    taps = [-(-k // s) for k, s in zip((t.kernel[0], *d.kernel[1:]), strides, strict=True)]
    config = tuple(sorted(options.pop("config", {}).items()))
    ts = tuple(map(transform, (m, 1, 1), taps))
    return Plan(
        "hfa", "triton", geometry, dtype, epilogues, layout, DEVICE, ts, config, **options
    )  # fmt: skip


def arrays_for(plan: Plan):
    """x, weights, biases and residual in float64, of values that the plan's dtype has."""

    def make(shape, seed, scale=1.0):
        exact = torch.from_numpy(scale * cases.random(shape, seed))
        return exact.to(getattr(torch, plan.dtype)).double()

    stages = plan.geometry.stages
    fans = [g.in_channels // g.groups * g.taps for g in stages]
    weights = tuple(
        make(g.w_shape, 1 + i, fan**-0.5)
        for i, (g, fan) in enumerate(zip(stages, fans, strict=True))
    )
    biases = tuple(
        make((g.out_channels,), 4 + i) if e.bias else None
        for i, (g, e) in enumerate(zip(stages, plan.epilogue, strict=True))
    )
    residual = make(plan.geometry.y_shape, 7) if plan.epilogue[2].residual else None
    return make(plan.geometry.x_shape, 0), weights, biases, residual


def run(plan: Plan, x, weights, biases, residual) -> torch.Tensor:
    """y of arrays as `arrays_for` makes them; y and workspace are filled with NaN before."""
    dtype = getattr(torch, plan.dtype)

    def placed(a, laid_out=False):
        if a is None or not laid_out:
            return None if a is None else a.to(DEVICE, dtype)
        array = cases.laid_out(a.to(torch.float64).numpy(), plan.layout)
        return torch.from_numpy(array).to(DEVICE, dtype)

    packed = hfa.prepack(tuple(map(placed, weights)), plan)
    y = placed(torch.full(plan.geometry.y_shape, torch.nan), True)
    workspace = torch.full((hfa.workspace_size(plan),), torch.nan, dtype=dtype, device=DEVICE)
    biases, residual = tuple(map(placed, biases)), placed(residual, True)
    hfa.run(plan, placed(x, True), packed, biases, residual, y, workspace)
    return y.cpu()


def three_convolutions(plan: Plan, x, weights, biases, residual, rounded: bool) -> torch.Tensor:
    """The block in float64; `rounded` to the plan's dtype behind each stage, as PyTorch would."""
    activations = {"relu": torch.relu, "silu": torch.nn.functional.silu, "none": lambda z: z}
    z = x
    for g, w, b, e in zip(plan.geometry.stages, weights, biases, plan.epilogue, strict=True):
        padded = torch.nn.functional.pad(z, [p for pair in reversed(g.padding) for p in pair])
        z = torch.nn.functional.conv3d(padded, w, b, g.stride, 0, g.dilation, g.groups)
        z = activations[e.activation](z + residual if e.residual else z)
        z = z.to(getattr(torch, plan.dtype)).double() if rounded else z
    return z


def assert_close(y, plan: Plan, *arrays) -> None:
    """Root mean square error at most twice that of stages that round nothing but their results.

    Transformed operands are rounded too, both of them, and what they lose is amplified: with the
    plain rounding of the result that is sqrt(1 + 2 amplification^2) roundings in place of one.
    """
    want = three_convolutions(plan, *arrays, rounded=False)
    plain = three_convolutions(plan, *arrays, rounded=True)
    assert y.isfinite().all(), "not finite: an output was not written, or read poison"
    factor = 1.0
    if hfa_source.fast(plan.transforms[0]):
        factor = (1 + 2 * amplification(plan.transforms[:1]) ** 2) ** 0.5
    error, rounding = (torch.sqrt(((a.double() - want) ** 2).mean()) for a in (y, plain))
    assert error <= 2 * factor * rounding, (float(error), float(rounding))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_half_precision_rounds_once_per_stage(dtype, m, layout):
    plan = plan_for(block((17, 35, 21), (6, 5, 7), (3, 3, 3)), m, dtype, layout)
    arrays = arrays_for(plan)
    assert_close(run(plan, *arrays), plan, *arrays)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("m", [1, 2])
def test_half_precision_with_strides_and_one_sided_padding(dtype, m):
    padding = ((1, 0), (0, 2), (2, 1))
    geometry = block((5, 18, 3), (7, 6, 9), (3, 2, 4), 2, stride=(2, 2, 3), padding=padding)
    plan = plan_for(geometry, m, dtype)
    arrays = arrays_for(plan)
    assert_close(run(plan, *arrays), plan, *arrays)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_float32_products_are_of_two_parts_or_of_tf32(m, precision):
    """Two parts of 11 bits miss no more than float32 does; TF32 alone is worse by 2^13."""
    plan = plan_for(block((16, 32, 16), (6, 5, 7), (3, 3, 3)), m, precision=precision)
    arrays = arrays_for(plan)
    want = three_convolutions(plan, *arrays, rounded=False)
    error = (run(plan, *arrays).double() - want).abs().max() / want.abs().max()
    unit = UNIT["float32"] if precision == "ieee" else 2.0**-11
    assert unit / 16 < error < 32 * unit


# Blocks smaller than the arrays, so that each loop has a whole step, another and a partial one.
SMALL = {"t_rows": 16, "t_co": 16, "t_ci": 16, "s_rows": 16, "s_co": 16, "s_ci": 16}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 2])
def test_tails_of_every_block(m, layout):
    geometry = block((35, 37, 39), (5, 3, 3), (3, 3, 3))
    plan = plan_for(geometry, m, "float16", layout, config=SMALL)
    arrays = arrays_for(plan)
    assert_close(run(plan, *arrays), plan, *arrays)


@pytest.mark.parametrize("config", hfa.CONFIGS, ids=str)
def test_every_configuration(config):
    plan = plan_for(block((18, 20, 17), (5, 4, 3), (3, 3, 3)), 2, "float16", config=config)
    arrays = arrays_for(plan)
    assert_close(run(plan, *arrays), plan, *arrays)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 4])
def test_64_bit_offsets_give_the_same_bits(m, layout, monkeypatch):
    plan = plan_for(block((5, 7, 6), (5, 4, 5), (3, 3, 3), 2), m, layout=layout)
    arrays = arrays_for(plan)
    want = run(plan, *arrays)
    monkeypatch.setattr(launch, "wide", lambda *elements: True)
    hfa.launches.cache_clear()
    try:
        assert all(dict(start.constants)["WIDE"] for start in hfa.launches(plan))
        assert torch.equal(run(plan, *arrays), want)
    finally:
        hfa.launches.cache_clear()


def test_layouts_give_the_same_bits():
    geometry = block((6, 18, 7), (5, 6, 7), (3, 3, 3), 2)
    first, second = (plan_for(geometry, 2, layout=layout) for layout in LAYOUTS)
    arrays = arrays_for(first)
    assert torch.equal(run(first, *arrays), run(second, *arrays))


@pytest.mark.parametrize("frames", [2, 3, 8])
def test_direct_frames_that_share_inputs(frames):
    """Several outputs per program, more than there are as well."""
    geometry = block((5, 7, 6), (7, 4, 3), (3, 3, 3), stride=(2, 1, 1))
    plan = plan_for(geometry, config={"t_outputs": frames})
    arrays = arrays_for(plan)
    assert torch.equal(run(plan, *arrays), run(replace(plan, config=()), *arrays))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_come_out_as_from_convolutions(value):
    """Parts of an infinity must not meet: it stays one, and reaches what the definition says."""
    epilogues = (Epilogue(), Epilogue(), Epilogue())
    plan = plan_for(block((3, 4, 5), (4, 6, 6), (3, 3, 3)), epilogues=epilogues)
    x, weights, biases, residual = arrays_for(plan)
    x[0, 1, 2, 3, 3] = value
    want = three_convolutions(plan, x, weights, biases, residual, rounded=False)
    y = run(plan, x, weights, biases, residual).double()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    assert torch.equal(y[y.isinf()], want[want.isinf()])


def test_more_points_than_registers_hold_are_summed_directly():
    plan = plan_for(block((4, 5, 6), (9, 3, 3), (5, 3, 3)), 4, "float16")
    assert not hfa_source.fast(plan.transforms[0])
    arrays = arrays_for(plan)
    assert_close(run(plan, *arrays), plan, *arrays)


def test_refuses_transforms_with_the_reason():
    geometry = block((4, 5, 6), (9, 6, 6), (3, 3, 3))
    assert hfa.refuses(plan_for(geometry, 4)) is None
    assert hfa.refuses(plan_for(geometry, 6)) == (
        "F(6, 3) has 8 points; up to 6 fit into registers"
    )
    plan = plan_for(geometry, 2)
    plan = replace(plan, transforms=(plan.transforms[0], transform(2, 3), transform(2, 3)))
    assert hfa.refuses(plan) == (
        "the depthwise stage is computed directly on a GPU: tiles are (m, 1, 1)"
    )


def test_an_empty_result_starts_nothing():
    geometry = block((4, 5, 6), (3, 4, 5), (3, 3, 3), 0)
    assert hfa.launches(plan_for(geometry, layout=CONTIGUOUS)) == ()
