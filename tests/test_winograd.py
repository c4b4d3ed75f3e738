"""Minimal filtering on every backend that has it: the definition, tile edges, memory, NaN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cases
import tolerance
from fastconv.backends import kernel
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan
from fastconv.transforms import transform
from pages import BetweenForbiddenPages, needs_mprotect


def _refusal(backend: str) -> str | None:
    simple = Geometry.of((1, 1, 5), (1, 1, 3))
    return kernel("winograd", backend).supports(simple, "float32", Epilogue())


BACKENDS = [b for b in cases.CPU_BACKENDS if _refusal(b) is None]
backends = pytest.mark.parametrize("backend", BACKENDS)
fast = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
# Triton would interpret, or compile, these for minutes; its own file has fewer and smaller ones.
compiled = pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b not in ("reference", "triton")]
)
C_BACKENDS = [b for b in BACKENDS if b == "c"]
on_c = pytest.mark.parametrize("backend", C_BACKENDS)
needs_numba = pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not installed")

# (tile, kernel, dtype, epilogue): few, since fast backends compile each; all that they tell apart
# is here: every number of axes, trivial transforms before, between and after others, even kernels.
COMBINATIONS = [
    ((2,), (3,), "float32", Epilogue()),
    ((4,), (3,), "float64", Epilogue(True, "relu", False)),
    ((4, 4), (3, 3), "float32", Epilogue(True, "silu", True)),
    ((3, 2), (2, 3), "float64", Epilogue(False, "none", True)),
    ((2, 1), (3, 1), "float32", Epilogue(True, "none", False)),
    ((1, 4, 4), (1, 3, 3), "float32", Epilogue(True, "relu", True)),
    ((2, 4, 4), (3, 3, 3), "float32", Epilogue(True, "none", True)),
    ((2, 2, 2), (3, 3, 3), "float64", Epilogue(False, "sigmoid", False)),
    ((4, 1, 1), (3, 1, 1), "float32", Epilogue(True, "hardswish", False)),
    ((2, 1, 3), (3, 1, 2), "float32", Epilogue()),
    ((1, 1, 2), (3, 2, 2), "float32", Epilogue()),
]


def plan_for(
    backend, geometry, tile, dtype="float32", layout=CHANNELS_LAST, epilogue=None, **config
):
    taps = [-(-k // s) for k, s in zip(geometry.kernel, geometry.stride, strict=True)]
    return Plan(
        "winograd",
        backend,
        geometry,
        dtype,
        epilogue or Epilogue(),
        layout,
        transforms=tuple(transform(m, r) for m, r in zip(tile, taps, strict=True)),
        config=tuple(config.items()),
    )


def check(plan: Plan, seed: int = 0) -> np.ndarray:
    arrays = cases.arrays_for(plan, seed)
    y = cases.execute(plan, *arrays)
    tolerance.assert_conv_close(y, plan, *arrays)
    return y


def any_tile(geometry: Geometry):
    return st.tuples(*[st.integers(1, 6)] * geometry.n)


def run_anything(backend, data, geometry) -> None:
    """Any geometry, any tile, any epilogue."""
    epilogue, dtype = data.draw(cases.epilogues()), data.draw(cases.dtypes())
    reason = kernel("winograd", backend).supports(geometry, dtype, epilogue)
    assume(reason is None)
    tile = data.draw(any_tile(geometry))
    check(plan_for(backend, geometry, tile, dtype, data.draw(cases.layouts()), epilogue))


@given(st.data(), cases.geometries(family="winograd"))
def test_the_reference_is_the_definition(data, geometry):
    run_anything("reference", data, geometry)


@fast
@settings(max_examples=6)
@given(st.data(), cases.geometries(family="winograd", max_stride=1))
def test_is_the_definition(backend, data, geometry):
    run_anything(backend, data, geometry)


@on_c
@settings(max_examples=60)
@given(st.data(), cases.geometries(family="winograd", max_size=14, max_kernel=7, max_stride=3))
def test_strided_axes_by_phases(backend, data, geometry):
    epilogue = data.draw(cases.epilogues())
    assume(kernel("winograd", backend).supports(geometry, "float32", epilogue) is None)
    tile, layout = data.draw(any_tile(geometry)), data.draw(cases.layouts())
    phased = data.draw(st.sampled_from((0, 1)))
    check(plan_for(backend, geometry, tile, "float32", layout, epilogue, phased=phased))


@on_c
@pytest.mark.parametrize("stride", [2, (1, 2, 2), (3, 1, 2)])
def test_strides_with_channels_beyond_a_register(backend, stride):
    """Phases lie side by side in the rows of V, not each at the beginning of a register."""
    for channels in (3, 17, 40):
        geometry = Geometry.of((2, channels, 5, 13, 18), (37, channels, 3, 3, 5), stride, (1, 0, 3))
        check(plan_for(backend, geometry, (2, 3, 4), epilogue=Epilogue(True, "relu", True)))


@on_c
@pytest.mark.parametrize("taps", range(2, 8))
@pytest.mark.parametrize("outputs", range(1, 7))
def test_every_compiled_transform(backend, outputs, taps):
    line = Geometry.of((1, 18, 23), (20, 18, taps), 1, taps // 2)
    check(plan_for(backend, line, (outputs,)))
    plane = Geometry.of((1, 18, 9, 23), (20, 18, taps, taps), 1, taps // 2)
    check(plan_for(backend, plane, (outputs, outputs)))


@on_c
def test_integers_are_exact(backend):
    """F(2, 3) adds and halves: integers stay integers where weights are multiples of 8."""
    geometry = Geometry.of((2, 37, 4, 9, 7), (21, 37, 3, 3, 3), 1, ((0, 1), (1, 1), (2, 0)))
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, geometry.x_shape).astype(np.float32)
    w = (8 * rng.integers(-4, 5, geometry.w_shape)).astype(np.float32)
    for phased in (0, 1):
        plan = plan_for(backend, geometry, (2, 2, 2), phased=phased)
        y = cases.execute(plan, x, w)
        assert np.array_equal(y, cases.execute(cases.on(plan, "reference"), x, w))


@on_c
@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue(True, "silu", True)])
def test_bits_do_not_depend_on_the_schedule(backend, epilogue, monkeypatch):
    """Fused in blocks of any size, phased, in rounds, on any number of threads."""
    from fastconv.c_kernels import launch, winograd_schedule

    geometry = Geometry.of((2, 40, 4, 13, 17), (70, 40, 3, 3, 3), 1, 1)
    plan = plan_for(backend, geometry, (2, 4, 4), epilogue=epilogue)
    arrays = cases.arrays_for(plan)
    want = cases.execute(plan, *arrays)

    def same(**config) -> bool:
        variant = replace(plan, config=tuple(config.items()))
        return np.array_equal(cases.execute(variant, *arrays), want)

    assert same(tiles=1)
    assert same(tiles=5)
    assert same(tiles=33)
    assert same(phased=1)
    monkeypatch.setattr(winograd_schedule, "_PHASED_BYTES", 1 << 20)
    assert same(phased=1, rounds=1)  # another plan: sizes are remembered
    for count in (1, 3):
        monkeypatch.setattr(launch, "threads", lambda count=count: count)
        assert same(tiles=7)
        assert same(phased=1)


@on_c
@pytest.mark.parametrize("phased", [0, 1])
def test_c_runs_with_the_threads_that_the_workspace_is_for(backend, phased, monkeypatch):
    from fastconv.c_kernels import launch, winograd

    geometry = Geometry.of((1, 17, 4, 13, 17), (40, 17, 3, 3, 3), 1, 1)
    plan = plan_for(backend, geometry, (2, 4, 4), phased=phased, tiles=3)
    x, w, bias, residual = cases.arrays_for(plan)
    want = cases.execute(plan, x, w, bias, residual)
    monkeypatch.setattr(launch, "threads", lambda: 1)
    with cases.isa_of(plan):
        packed, workspace = (
            winograd.prepack(w, plan),
            cases.Fenced((winograd.workspace_size(plan),)),
        )
    monkeypatch.setattr(launch, "threads", lambda: 4)
    y, x = cases.Fenced(geometry.y_shape, layout=plan.layout), cases.laid_out(x, plan.layout)
    winograd.run(plan, x, packed, bias, residual, y.array, workspace.array)
    workspace.check()
    assert np.array_equal(y.array, want)


@st.composite
def geometries_of(draw, kernel_size):
    """Any batch, channels, extents and paddings around one kernel size."""
    padding = [draw(st.tuples(*[st.integers(0, 4)] * 2)) for _ in kernel_size]
    size = [
        max(draw(st.integers(1, 14)), k - sum(p)) for k, p in zip(kernel_size, padding, strict=True)
    ]
    batch = draw(st.sampled_from((1, 1, 1, 2, 0)))
    channels, outs = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    return Geometry.of((batch, channels, *size), (outs, channels, *kernel_size), 1, padding)


@compiled
@pytest.mark.parametrize("phased", [0, 1])
@settings(max_examples=60)
@given(st.data(), st.sampled_from(COMBINATIONS), cases.layouts())
def test_extents_channels_and_paddings(backend, phased, data, combination, layout):
    tile, kernel_size, dtype, epilogue = combination
    dtype = "float32" if backend in cases.FLOAT32_ONLY else dtype
    geometry = data.draw(geometries_of(kernel_size))
    check(plan_for(backend, geometry, tile, dtype, layout, epilogue, phased=phased))


@compiled
@pytest.mark.parametrize("outs", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65])
@pytest.mark.parametrize("channels", [1, 15, 16, 17])
def test_channels_around_registers_and_panels(backend, channels, outs):
    geometry = Geometry.of((1, channels, 5, 9), (outs, channels, 3, 3), 1, 1)
    check(plan_for(backend, geometry, (4, 4), epilogue=COMBINATIONS[2][3]))


@backends
@pytest.mark.parametrize("out", [1, 3, 4, 5, 8, 9])
def test_extents_around_the_tile(backend, out):
    """Outputs less than, equal to and one more than tiles, on every axis at once."""
    geometry = Geometry.of(
        (2, 5, out, out + 2, out + 1), (6, 5, 3, 3, 3), 1, ((1, 1), (0, 0), (0, 1))
    )
    for layout in LAYOUTS:
        check(plan_for(backend, geometry, (2, 4, 4), layout=layout, epilogue=COMBINATIONS[6][3]))


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(backend, activation):
    geometry = Geometry.of((1, 20, 9), (35, 20, 3), 1, 1)
    for layout in LAYOUTS:
        check(
            plan_for(backend, geometry, (4,), "float32", layout, Epilogue(True, activation, True))
        )


@compiled
@pytest.mark.parametrize("phased", [0, 1])
def test_many_tiles_and_channels(backend, phased):
    """Several blocks per thread, several panels, registers and row blocks."""
    geometry = Geometry.of((2, 70, 6, 30, 29), (145, 70, 1, 3, 3), 1, (0, 1, 1))
    plan = plan_for(backend, geometry, (1, 4, 4), epilogue=COMBINATIONS[5][3], phased=phased)
    check(plan)


@needs_numba
def test_phased_rounds_do_not_change_a_bit(monkeypatch):
    from fastconv.numba_kernels import winograd

    geometry = Geometry.of((1, 17, 4, 30, 29), (33, 17, 3, 3, 3), 1, 1)
    fused = plan_for("numba", geometry, (2, 4, 4), phased=0)
    phased = replace(fused, config=(("phased", 1),))
    arrays = cases.arrays_for(fused)
    whole = cases.execute(phased, *arrays)
    before = winograd.workspace_size(phased)
    monkeypatch.setattr(winograd, "_PHASED_BYTES", 1 << 20)
    assert winograd.workspace_size(phased) < before / 2  # a round no longer has all tiles
    assert np.array_equal(cases.execute(phased, *arrays), whole)
    assert np.array_equal(cases.execute(fused, *arrays), whole)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch_is_an_empty_result(backend, layout):
    geometry = Geometry.of((0, 4, 3, 5, 5), (6, 4, 3, 3, 3), 1, 1)
    plan = plan_for(backend, geometry, (2, 4, 4), layout=layout, epilogue=COMBINATIONS[6][3])
    assert check(plan).shape == (0, 6, 3, 5, 5)


@backends
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_stays_so_and_in_its_tiles(backend, value):
    """Whatever the convolution makes of it shows; transforms may spread it over a tile, no more."""
    geometry = Geometry.of((1, 3, 9, 13), (17, 3, 3, 3), 1, 1)
    for layout in LAYOUTS:
        epilogue = Epilogue(True, "silu", True)
        plan = plan_for(backend, geometry, (4, 4), layout=layout, epilogue=epilogue)
        x, w, bias, residual = cases.arrays_for(plan)
        clean = cases.execute(plan, x, w, bias, residual)
        x[0, 1, 5, 6] = value
        with np.errstate(invalid="ignore"):  # the reference says so when Inf meets Inf
            y = cases.execute(plan, x, w, bias, residual)
        assert not np.isfinite(y[:, :, 4:7, 5:8]).any()
        reached = np.zeros((9, 13), bool)
        reached[4:8, 4:8] = True  # outputs 4..6 x 5..7 lie in this tile
        assert np.array_equal(y[..., ~reached], clean[..., ~reached])


@backends
def test_nan_in_bias_and_residual_stays_in_place(backend):
    geometry = Geometry.of((1, 3, 9, 13), (17, 3, 3, 3), 1, 1)
    plan = plan_for(backend, geometry, (4, 4), epilogue=Epilogue(True, "relu", True))
    x, w, bias, residual = cases.arrays_for(plan)
    bias[3] = residual[0, 5, 8, 12] = np.nan
    where = np.zeros(geometry.y_shape, bool)
    where[0, 3] = where[0, 5, 8, 12] = True
    assert np.array_equal(np.isnan(cases.execute(plan, x, w, bias, residual)), where)


@fast
def test_the_same_call_gives_the_same_bits(backend):
    geometry = Geometry.of((1, 17, 4, 13, 17), (40, 17, 3, 3, 3), 1, 1)
    plan = plan_for(backend, geometry, (2, 4, 4))
    arrays = cases.arrays_for(plan)
    assert np.array_equal(cases.execute(plan, *arrays), cases.execute(plan, *arrays))


@needs_numba
@pytest.mark.parametrize("phased", [0, 1])
def test_numba_runs_with_fewer_threads_than_planned(phased):
    """The workspace still suffices, and bits do not depend on the number of threads."""
    import numba

    module = kernel("winograd", "numba")
    geometry = Geometry.of((1, 17, 4, 13, 17), (40, 17, 3, 3, 3), 1, 1)
    plan = plan_for("numba", geometry, (2, 4, 4), phased=phased)
    x, w, bias, residual = cases.arrays_for(plan)
    want = cases.execute(plan, x, w, bias, residual)
    packed, workspace = module.prepack(w, plan), cases.Fenced((module.workspace_size(plan),))
    y, x = cases.Fenced(geometry.y_shape, layout=plan.layout), cases.laid_out(x, plan.layout)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        module.run(plan, x, packed, bias, residual, y.array, workspace.array)
    finally:
        numba.set_num_threads(before)
    workspace.check()
    assert np.array_equal(y.array, want)


@needs_mprotect
@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_outside_the_arrays_is_read_or_written(backend, layout, at_end):
    tile, kernel_size, dtype, epilogue = COMBINATIONS[6]
    geometry = Geometry.of((1, 7, 3, 5, 7), (19, 7, *kernel_size), 1, ((1, 1), (0, 3), (4, 1)))
    plan = plan_for(backend, geometry, tile, dtype, layout, epilogue)
    module = kernel("winograd", backend)
    x, w, bias, residual = cases.arrays_for(plan)
    guarded = [
        BetweenForbiddenPages(shape, dtype, layout, at_end).array
        for shape in (geometry.x_shape, geometry.y_shape, geometry.y_shape)
    ]
    guarded[0][...], guarded[1][...] = x, residual
    with cases.isa_of(plan):
        size, packed = module.workspace_size(plan), module.prepack(w, plan)
    workspace = BetweenForbiddenPages((size,), dtype, at_end=at_end).array
    module.run(plan, guarded[0], packed, bias, guarded[1], guarded[2], workspace)
    tolerance.assert_conv_close(guarded[2], plan, x, w, bias, residual)


def test_refusals_say_why():
    def reason(backend="numba", x=(1, 4, 9, 9), w=(4, 4, 3, 3), dtype="float32", **arguments):
        geometry = Geometry.of(x, w, **arguments)
        return kernel("winograd", backend).supports(geometry, dtype, Epilogue())

    assert reason("reference", stride=2) is None
    assert reason("reference", w=(4, 4, 1, 1)) is not None
    if C_BACKENDS:
        assert reason("c", stride=2) is None
        assert reason("c", w=(4, 4, 1, 1)) is not None
        assert reason("c", dtype="float64") == "dtype float64 is not float32"
        assert reason("c", w=(4, 4, 9, 3), padding=4) == (
            "kernel (9, 3) has more than 7 taps per phase on an axis, for which no transform is "
            "compiled"
        )
    if "numba" not in BACKENDS:
        pytest.skip("numba is not installed")
    assert reason(w=(4, 2, 3, 3), groups=2) == "winograd is for one group, not 2"
    assert reason(dilation=(1, 2)) == "winograd is for dilation 1, not (1, 2)"
    assert reason(dtype="float16") == "dtype float16 is not one of float32, float64"
    assert reason(w=(4, 4, 1, 1)) == "no axis of kernel (1, 1) has more than one tap"
    assert reason(stride=(1, 2)) == (
        "stride (1, 2) needs the polyphase split, which the numba backend does not have"
    )


@pytest.mark.skipif(not C_BACKENDS, reason="the C backend is not available")
def test_transforms_that_are_not_compiled_are_refused():
    module, geometry = kernel("winograd", "c"), Geometry.of((1, 4, 30), (4, 4, 3), 1, 1)
    w = np.zeros(geometry.w_shape, np.float32)
    with pytest.raises(
        UnsupportedError, match=r"F\(8, 3\) is not compiled; it has F\(m, r\) for m"
    ):
        module.prepack(w, plan_for("c", geometry, (8,)))
    other = replace(plan_for("c", geometry, (2,)), transforms=(transform(2, 3, (0, 1, 2)),))
    with pytest.raises(UnsupportedError, match="for the default points only, not for 0, 1, 2"):
        module.prepack(w, other)
