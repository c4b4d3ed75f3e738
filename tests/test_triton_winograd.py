"""Winograd in Triton: blocks and their tails, chunks, short formats, wide offsets, packed parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import tolerance
from fastconv.backends import available
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import LAYOUTS, Plan
from fastconv.reference import direct
from fastconv.transforms import amplification, transform
from pages import BetweenForbiddenPages, needs_mprotect

pytestmark = pytest.mark.skipif(
    available()["triton"] is not None, reason=str(available()["triton"])
)
if available()["triton"] is None:
    import torch

    from fastconv.backends import interpreted
    from fastconv.triton_kernels import launch, winograd, winograd_schedule

SMALL = (("columns", 16), ("rows", 16), ("warps", 1))
FULL = Epilogue(True, "silu", True)
# (tile, kernel, stride): one axis, two and three; trivial axes before, between and behind; m = 1;
# more points on the first axis than a product sums; strides on staged axes and on the first.
SHAPES = [
    ((2,), (3,), (1,)),
    ((4,), (5,), (1,)),
    ((3,), (4,), (2,)),
    ((2, 2), (3, 3), (1, 1)),
    ((4, 2), (2, 3), (1, 2)),
    ((2, 1, 1), (3, 1, 1), (1, 2, 1)),
    ((1, 4, 1), (1, 3, 1), (1, 1, 1)),
    ((2, 2, 2), (3, 3, 3), (1, 1, 1)),
    ((2, 2, 2), (3, 3, 3), (2, 1, 1)),
    ((1, 2, 2), (2, 3, 3), (1, 2, 2)),
    ((2, 1, 3), (3, 1, 2), (1, 1, 1)),
]


def plan_for(geometry, tile, config=SMALL, dtype="float32", layout=LAYOUTS[1], epilogue=FULL):
    taps = [-(-k // s) for k, s in zip(geometry.kernel, geometry.stride, strict=True)]
    return Plan(
        "winograd",
        "triton",
        geometry,
        dtype,
        epilogue,
        layout,
        "cpu" if interpreted() else "cuda",
        tuple(transform(m, r) for m, r in zip(tile, taps, strict=True)),
        tuple(sorted(dict(config).items())),
    )


def check(plan: Plan, seed: int = 0) -> np.ndarray:
    arrays = cases.arrays_for(plan, seed)
    y = cases.execute(plan, *arrays)
    tolerance.assert_conv_close(y, plan, *arrays)
    return y


@st.composite
def geometries_of(draw, kernel, stride):
    """Any batch, channels, extents and paddings, also larger than a tile, around one kernel."""
    padding = [draw(st.tuples(*[st.integers(0, 3)] * 2)) for _ in kernel]
    size = [max(draw(st.integers(1, 5)), k - sum(p)) for k, p in zip(kernel, padding, strict=True)]
    channels, outs = draw(st.sampled_from((1, 3, 17))), draw(st.sampled_from((1, 5, 18)))
    shape = (draw(st.sampled_from((1, 1, 2))), channels, *size)
    return Geometry.of(shape, (outs, channels, *kernel), stride, padding)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fuse", [0, 1])
@settings(max_examples=2)
@given(data=st.data(), layout=cases.layouts())
def test_extents_channels_and_paddings(shape, fuse, data, layout):
    tile, kernel, stride = shape
    geometry = data.draw(geometries_of(kernel, stride))
    check(plan_for(geometry, tile, (*SMALL, ("fuse", fuse)), layout=layout))


@pytest.mark.parametrize(("channels", "outs"), [(15, 31), (16, 32), (33, 17)])
def test_channels_around_blocks(channels, outs):
    geometry = Geometry.of((1, channels, 5, 9), (outs, channels, 3, 3), 1, 1)
    check(plan_for(geometry, (2, 4)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_and_chunks_do_not_change_a_bit(layout, monkeypatch):
    """Several images at a time, one, or rows of tiles of one: the same sums in the same order.

    (NumPy, which multiplies for the interpreter, does not sum the rows of a matrix alike.)
    """
    geometry = Geometry.of((3, 5, 4, 9, 6), (6, 5, 3, 3, 3), 1, ((1, 0), (1, 1), (0, 2)))
    plan = plan_for(geometry, (2, 2, 2), layout=layout)
    want, counts = check(plan), set()
    monkeypatch.setattr(winograd_schedule, "MEGABYTE", 1 << 10)
    for kilobytes in (200, 90, 30):
        chunked = replace(plan, config=(*SMALL, ("chunk", kilobytes)))
        counts.add(len(winograd_schedule.schedule_of(chunked).chunks))
        y = check(chunked)
        assert interpreted() or np.array_equal(y, want)
    assert len(counts) == 3
    assert min(counts) > 1


@pytest.mark.parametrize("tile", [(2, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets_give_the_same_bits(tile, layout, monkeypatch):
    kernel = tuple(3 if m > 1 else 1 for m in tile)
    geometry = Geometry.of((2, 5, 4, 5, 3), (6, 5, *kernel), 1, kernel[1] // 2)
    plan = plan_for(geometry, tile, layout=layout)
    arrays = cases.arrays_for(plan)
    narrow = cases.execute(plan, *arrays)
    monkeypatch.setattr(winograd, "wide", lambda *elements: True)
    wide = replace(plan, config=(*plan.config, ("stages", 2)))  # another plan: launches are kept
    assert all(("WIDE", True) in one.constants for one in winograd.launches(wide))
    assert np.array_equal(cases.execute(wide, *arrays), narrow)


def test_offsets_are_wide_where_an_array_is_large():
    def widths(batch, tile, kernel):
        geometry = Geometry.of((batch, 64, 16, 56, 56), (64, 64, *kernel), 1, "same")
        starts = winograd.launches(plan_for(geometry, tile, ()))
        return {dict(one.constants)["WIDE"] for one in starts}

    assert widths(8, (2, 1, 1), (3, 1, 1)) == widths(8, (2, 4, 4), (3, 3, 3)) == {False}
    assert widths(800, (2, 1, 1), (3, 1, 1)) == widths(800, (2, 4, 4), (3, 3, 3)) == {True}


def short(plan: Plan, seed: int = 0) -> None:
    """Operands rounded once, sums in float32: amplification times what rounding them costs.

    Of two operands each is off by at most half a unit; the result is rounded once more.
    """
    g, dtype = plan.geometry, getattr(torch, plan.dtype)
    x, w = (
        torch.from_numpy(cases.random(shape, seed + i)).to(dtype)
        for i, shape in enumerate((g.x_shape, g.w_shape))
    )
    memory = cases.laid_out(x.float().numpy(), plan.layout)
    given = torch.from_numpy(memory).to(plan.device, dtype)
    y = torch.full_like(torch.from_numpy(cases.laid_out(np.empty(g.y_shape), plan.layout)), np.nan)
    y = y.to(plan.device, dtype)
    scratch = torch.full((winograd.workspace_size(plan),), np.nan, dtype=dtype, device=plan.device)
    winograd.run(plan, given, winograd.prepack(w, plan), None, None, y, scratch)
    want = direct.correlate(x.double().numpy(), w.double().numpy(), g)
    error = y.double().cpu().numpy() - want
    unit = torch.finfo(dtype).eps / 2 if plan.dtype != "float32" else 2**-11
    assert tolerance.rms(error) <= unit * (1 + 2 * amplification(plan.transforms)) * tolerance.rms(
        want
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("tile", "kernel"), [((2, 1, 1), (3, 1, 1)), ((1, 2, 2), (1, 3, 3)), ((2, 2, 2), (3, 3, 3))]
)
def test_short_formats(tile, kernel, dtype, layout):
    geometry = Geometry.of((1, 18, 4, 5, 6), (5, 18, *kernel), 1, "same")
    short(plan_for(geometry, tile, SMALL, dtype, layout, Epilogue()))


@pytest.mark.parametrize("split", [0, 1])
def test_float32_products(split):
    geometry = Geometry.of((1, 20, 9), (6, 20, 3), 1, 1)
    check(plan_for(geometry, (2,), (*SMALL, ("split", split))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tile", "kernel"), [((2, 1, 1), (3, 1, 1)), ((1, 2, 2), (1, 3, 3))])
def test_tf32_is_rounded(tile, kernel, layout):
    """Both operands, to nearest: what the tensor cores would cut off is zero."""
    geometry = Geometry.of((1, 18, 4, 5, 6), (5, 18, *kernel), 1, "same")
    plan = replace(plan_for(geometry, tile, SMALL, "float32", layout, Epilogue()), precision="tf32")
    packed = winograd.prepack(cases.random(geometry.w_shape, 1), plan).cpu().numpy()
    assert packed.shape[0] == 1
    assert not (packed.view(np.int32) & 0x1FFF).any()
    short(plan)


def test_the_parts_of_u_are_tf32_and_their_sum_is_u():
    geometry = Geometry.of((1, 20, 9), (6, 20, 3), 1, 1)
    plan, w = plan_for(geometry, (4,)), cases.random(geometry.w_shape, 1)
    high, low = winograd.prepack(w, plan).cpu().numpy()
    whole = winograd.prepack(w, replace(plan, config=(*SMALL, ("split", 0)))).cpu().numpy()[0]
    assert not (high.view(np.int32) & 0x1FFF).any()
    assert np.abs(high.astype(float) + low - whole).max() <= 2**-24 * np.abs(whole).max()
    assert np.abs(low).max() <= 2**-11 * np.abs(high).max()


def test_number_of_launches():
    def count(tile, kernel, batch=1, **config):
        geometry = Geometry.of((batch, 4, 6, 6, 6), (4, 4, *kernel), 1, "same")
        return len(winograd.launches(plan_for(geometry, tile, config.items())))

    assert count((2, 1, 1), (3, 1, 1)) == 1  # from x to y
    assert count((2, 2, 2), (3, 3, 3)) == count((1, 2, 2), (1, 3, 3)) == 3
    assert count((2, 2, 2), (3, 3, 3), fuse=0) == 4 + 1 + 2  # a start per point and per output
    assert count((2, 2, 2), (3, 3, 3), batch=0) == 0
    assert winograd.workspace_size(plan_for(Geometry.of((1, 4, 9), (4, 4, 3)), (2,))) == 0


@needs_mprotect
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_outside_the_arrays_is_read_or_written(layout, at_end):
    if not interpreted():
        pytest.skip("pages are of the CPU")
    geometry = Geometry.of((1, 7, 3, 5, 4), (19, 7, 3, 3, 3), 1, ((1, 1), (0, 3), (4, 1)))
    plan = plan_for(geometry, (2, 2, 2), layout=layout)
    x, w, bias, residual = cases.arrays_for(plan)
    guarded = [
        BetweenForbiddenPages(shape, "float32", layout, at_end).array
        for shape in (geometry.x_shape, geometry.y_shape, geometry.y_shape)
    ]
    guarded[0][...], guarded[1][...] = x, residual
    size = winograd.workspace_size(plan)
    scratch = BetweenForbiddenPages((size,), "float32", at_end=at_end).array
    given, rest, y, workspace, b = map(torch.from_numpy, (*guarded, scratch, bias))
    winograd.run(plan, given, winograd.prepack(w, plan), b, rest, y, workspace)
    tolerance.assert_conv_close(guarded[2], plan, x, w, bias, residual)


def test_dtypes_are_those_of_the_backend():
    geometry = Geometry.of((1, 4, 9), (4, 4, 3))
    for dtype in launch.DTYPES:
        assert winograd.supports(geometry, dtype, FULL) is None
    assert winograd.supports(geometry, "float64", FULL) is not None
