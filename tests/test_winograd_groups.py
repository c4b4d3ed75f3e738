"""Minimal filtering of several groups: the definition, cuts into strips, memory, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cases
import tolerance
from fastconv import planner
from fastconv.backends import kernel
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry
from fastconv.plan import LAYOUTS, Plan
from fastconv.transforms import transform
from pages import BetweenForbiddenPages, needs_mprotect

C_BACKENDS = [b for b in cases.CPU_BACKENDS if b == "c"]
on_c = pytest.mark.parametrize("backend", C_BACKENDS)
backends = pytest.mark.parametrize("backend", ["reference", *C_BACKENDS])
ALL = Epilogue(True, "relu", True)


def plan_for(backend, geometry, tile, layout="channels_last_3d", epilogue=ALL) -> Plan:
    taps = zip(tile, geometry.kernel, geometry.stride, strict=True)
    transforms = tuple(transform(m, -(-r // s)) for m, r, s in taps)
    return Plan("winograd", backend, geometry, "float32", epilogue, layout, transforms=transforms)


def check(plan: Plan) -> np.ndarray:
    arrays = cases.arrays_for(plan)
    y = cases.execute(plan, *arrays)
    tolerance.assert_conv_close(y, plan, *arrays)
    return y


@st.composite
def geometries(draw, max_stride=1):
    """Any geometry that several groups may have: few channels of each, any extents and paddings."""
    n, groups = draw(st.integers(2, 3)), draw(st.integers(2, 5))
    kernel_size = [draw(st.integers(1, 5)) for _ in range(n)]
    stride = [draw(st.integers(1, max_stride)) for _ in range(n)]
    assume(any(r > s for r, s in zip(kernel_size, stride, strict=True)))
    padding = [draw(st.tuples(*[st.integers(0, 3)] * 2)) for _ in range(n)]
    size = [
        max(draw(st.integers(1, 20)), r - sum(p)) for r, p in zip(kernel_size, padding, strict=True)
    ]
    c, k = draw(st.integers(2, 13)), draw(st.integers(1, 21))
    batch = draw(st.sampled_from((1, 1, 2, 0)))
    w_shape = (groups * k, c, *kernel_size)
    return Geometry.of((batch, groups * c, *size), w_shape, stride, padding, 1, groups)


@settings(max_examples=30)
@given(st.data(), geometries(max_stride=2))
def test_the_reference_is_the_definition(data, geometry):
    tile = data.draw(st.tuples(*[st.integers(1, 6)] * geometry.n))
    check(plan_for("reference", geometry, tile))


@on_c
@settings(max_examples=120)
@given(st.data(), geometries(), cases.epilogues(), cases.layouts())
def test_is_the_definition(backend, data, geometry, epilogue, layout):
    assume(kernel("winograd", backend).supports(geometry, "float32", epilogue) is None)
    tile = (*(data.draw(st.integers(1, 6)) for _ in range(geometry.n - 1)), 1)
    plan = plan_for(backend, geometry, tile, layout, epilogue)
    assume(kernel("winograd", backend).refuses(plan) is None)
    check(plan)


@on_c
@pytest.mark.parametrize("taps", range(2, 8))
@pytest.mark.parametrize("outputs", range(1, 7))
def test_every_compiled_transform(backend, outputs, taps):
    geometry = Geometry.of((1, 6, 7, 8, 9), (8, 3, taps, taps, 2), 1, taps // 2, 1, 2)
    for tile in ((outputs, 1, 1), (1, outputs, 1), (outputs, outputs, 1)):
        if max(tile) > 1:
            check(plan_for(backend, geometry, tile))


# Channels of a group around register blocks and lanes, columns around vectors and whole strips.
@on_c
@pytest.mark.parametrize("channels", [(6, 6), (12, 12), (5, 13), (3, 64)])
@pytest.mark.parametrize("columns", [1, 15, 17, 57, 300])
def test_strips(backend, channels, columns):
    c, k = channels
    geometry = Geometry.of((1, 3 * c, 3, 5, columns), (3 * k, c, 2, 3, 3), 1, 1, 1, 3)
    for tile in ((2, 4, 1), (2, 1, 1)):
        check(plan_for(backend, geometry, tile))


@on_c
def test_integers_are_exact(backend):
    """F(2, 3) adds and halves: integers stay integers where weights are multiples of 4."""
    geometry = Geometry.of((2, 24, 5, 11, 21), (36, 6, 3, 3, 3), 1, ((0, 1), (1, 1), (2, 0)), 1, 4)
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, geometry.x_shape).astype(np.float32)
    w = (4 * rng.integers(-4, 5, geometry.w_shape)).astype(np.float32)
    plan = plan_for(backend, geometry, (2, 2, 1), epilogue=Epilogue())
    want = cases.execute(cases.on(plan, "reference"), x, w)
    assert np.array_equal(cases.execute(plan, x, w), want)


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(backend, activation):
    geometry = Geometry.of((2, 20, 4, 9), (36, 5, 3, 3), 1, 1, 1, 4)
    for layout in LAYOUTS:
        for bias, residual in ((True, True), (False, False)):
            check(plan_for(backend, geometry, (4, 1), layout, Epilogue(bias, activation, residual)))


@on_c
def test_bits_do_not_depend_on_the_number_of_threads(backend, monkeypatch):
    from fastconv.c_kernels import grouped, launch

    geometry = Geometry.of((1, 96, 11, 13, 17), (48, 24, 3, 3, 3), 1, 1, 1, 4)
    monkeypatch.setattr(grouped, "_cycles", lambda cut: 1 << 40)  # however small the call
    for tile in ((4, 4, 1), (4, 1, 1), (1, 2, 1)):
        plan = plan_for(backend, geometry, tile)
        arrays, results = cases.arrays_for(plan), []
        for threads in (1, 2, 7):
            monkeypatch.setattr(launch, "threads", lambda threads=threads: threads)
            results.append(cases.execute(plan, *arrays))
        assert all(np.array_equal(y, results[0]) for y in results)


@backends
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_stays_in_its_tiles_and_its_group(backend, value):
    geometry = Geometry.of((1, 6, 9, 9, 21), (8, 3, 3, 3, 3), 1, 1, 1, 2)
    plan = plan_for(backend, geometry, (4, 4, 1), epilogue=Epilogue())
    x, w, _, _ = cases.arrays_for(plan)
    clean = cases.execute(plan, x, w)
    x[0, 1, 5, 6, 16] = value
    with np.errstate(invalid="ignore"):
        y = cases.execute(plan, x, w)
    assert not np.isfinite(y[0, :4, 4:7, 5:8, 15:18]).any()
    reached = np.zeros(geometry.y_shape, bool)
    reached[0, :4, 4:8, 4:8, 15:18] = True  # outputs 4..6 x 5..7 lie in this tile
    assert np.array_equal(y[~reached], clean[~reached])


@needs_mprotect
@on_c
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("tile", [(4, 4, 1), (1, 2, 1), (2, 1, 1)])
def test_nothing_outside_the_arrays_is_read_or_written(backend, layout, at_end, tile):
    geometry = Geometry.of((1, 21, 3, 5, 18), (12, 7, 3, 3, 3), 1, ((1, 1), (0, 3), (4, 1)), 1, 3)
    plan = plan_for(backend, geometry, tile, layout)
    module = kernel("winograd", backend)
    x, w, bias, residual = cases.arrays_for(plan)
    guarded = [
        BetweenForbiddenPages(shape, "float32", layout, at_end).array
        for shape in (geometry.x_shape, geometry.y_shape, geometry.y_shape)
    ]
    guarded[0][...], guarded[1][...] = x, residual
    with cases.isa_of(plan):
        size, packed = module.workspace_size(plan), module.prepack(w, plan)
    workspace = BetweenForbiddenPages((size,), "float32", at_end=at_end).array
    module.run(plan, guarded[0], packed, bias, guarded[1], guarded[2], workspace)
    tolerance.assert_conv_close(guarded[2], plan, x, w, bias, residual)


@pytest.mark.skipif(not C_BACKENDS, reason="the C backend is not built")
def test_refusals_say_why():
    def reason(x=(1, 8, 9, 9), w=(8, 4, 3, 3), **arguments):
        geometry = Geometry.of(x, w, groups=x[1] // w[1], **arguments)
        return kernel("winograd", "c").supports(geometry, "float32", Epilogue())

    assert reason() is None
    assert reason(w=(8, 1, 3, 3)) == "winograd with one input channel per group has no kernel"
    assert reason(w=(130, 4, 3, 3)) == (
        "winograd with several groups is for up to 64 output channels per group, not 65"
    )
    assert reason(stride=2) == "winograd with several groups is for stride 1, not (2, 2)"
    sums = "winograd with several groups sums the last axis directly; no other has taps"
    assert reason(w=(8, 4, 1, 3)) == reason((1, 8, 9), (8, 4, 3)) == sums
    geometry = Geometry.of((1, 8, 9, 9), (8, 4, 3, 3), groups=2)
    for tile, wrong in (((4, 4), "the last axis has tile 1, not 4"), ((1, 1), "a tile of ones")):
        with pytest.raises(UnsupportedError, match=wrong):
            kernel("winograd", "c").prepack(
                np.zeros(geometry.w_shape, np.float32), plan_for("c", geometry, tile)
            )


@pytest.mark.skipif(not C_BACKENDS, reason="the C backend is not built")
def test_the_planner_offers_it_and_leaves_the_last_axis_direct():
    geometry = Geometry.of((1, 192, 8, 28, 28), (192, 12, 3, 3, 3), padding=1, groups=16)
    found = planner.candidates(geometry, backend="c", algorithm="winograd")
    allowed = [c.plan for c in found if c.reason is None]
    assert {p.tile[-1] for p in allowed} == {1}
    assert (4, 4, 1) in {p.tile for p in allowed}
    assert all(planner.error_factor(p) <= 4 for p in allowed)
    assert all(len(list(planner.configurations(p))) == 1 for p in allowed)
