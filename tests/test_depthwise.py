"""Depthwise convolution on every backend: the definition, its edges, its memory."""

from __future__ import annotations

import platform

import numpy as np
import pytest
from hypothesis import given

import cases
import pages
import tolerance
from fastconv.backends import instruction_sets, interpreted, kernel
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan
from processes import run_python

backends = pytest.mark.parametrize("backend", cases.CPU_BACKENDS)
fast = pytest.mark.parametrize("backend", [b for b in cases.CPU_BACKENDS if b != "reference"])
needs_numba = pytest.mark.skipif("numba" not in cases.CPU_BACKENDS, reason="no numba")

UNROLLED = (("unrolled", 1),)  # whatever the size: compile for these taps
LOOPED = (("unrolled", 0),)
# The same on other backends; compiled taps are their default.
CONFIGS = {"c": {LOOPED: (("looped", 1),)}, "triton": {LOOPED: (("held", 0), ("unroll", 0))}}
if interpreted():  # whose time is the number of programs: few and large ones
    few = (("elements", 16), ("frames", 99))
    CONFIGS["triton"] = {(): few, UNROLLED: few, LOOPED: (*few, *CONFIGS["triton"][LOOPED])}


def plan_for(
    backend, geometry, dtype="float32", layout=CHANNELS_LAST, epilogue=None, config=()
) -> Plan:
    config = config if backend == "numba" else CONFIGS.get(backend, {}).get(config, ())
    dtype = "float32" if backend in cases.FLOAT32_ONLY else dtype
    return Plan(
        "depthwise", backend, geometry, dtype, epilogue or Epilogue(), layout, config=config
    )


def geometry_of(
    channels, size, kernel_size, stride=1, padding=0, dilation=1, multiplier=1, batch=1
):
    w_shape = (channels * multiplier, 1, *kernel_size)
    return Geometry.of((batch, channels, *size), w_shape, stride, padding, dilation, channels)


def small_integers(shape, seed, dtype="float32") -> np.ndarray:
    """Values whose sums of products are exact in float32, in any order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def integer_arrays(plan: Plan):
    """x, w, bias, residual of small integers; None where the epilogue has none."""
    g, e = plan.geometry, plan.epilogue
    x, w = small_integers(g.x_shape, 0, plan.dtype), small_integers(g.w_shape, 1, plan.dtype)
    bias = small_integers((g.out_channels,), 2, plan.dtype) if e.bias else None
    return x, w, bias, small_integers(g.y_shape, 3, plan.dtype) if e.residual else None


def assert_exact(plan: Plan) -> None:
    """On small integers the plan gives the reference's values, bit by bit but for zero's sign."""
    arrays = integer_arrays(plan)
    want = cases.execute(cases.on(plan, "reference"), *arrays)
    assert np.array_equal(cases.execute(plan, *arrays), want)


@backends
@given(cases.geometries(family="depthwise"), cases.epilogues(), cases.layouts(), cases.dtypes())
def test_is_the_definition(backend, geometry, epilogue, layout, dtype):
    plan = plan_for(backend, geometry, dtype, layout, epilogue)
    arrays = cases.arrays_for(plan)
    tolerance.assert_conv_close(cases.execute(plan, *arrays), plan, *arrays)


# One more and one less than a vector of either type, several vectors, their outputs.
CHANNELS = {
    "one": (1, 1),
    "half_vector_less_one": (7, 1),
    "vector": (16, 1),
    "vector_plus_one": (17, 1),
    "vectors_less_one": (47, 1),
    "multiplier": (9, 2),
    "multiplier_without_whole_vectors": (11, 3),
    "multiplier_of_a_vector": (3, 16),
    "multiplier_above_a_vector": (2, 19),
}


@fast
@pytest.mark.parametrize("config", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS.keys())
def test_channels_are_exact_on_integers(backend, channels, config):
    channels, multiplier = channels
    geometry = geometry_of(channels, (3, 5, 9), (3, 3, 3), 1, 1, multiplier=multiplier)
    for layout in LAYOUTS:
        epilogue = Epilogue(bias=True, activation="relu", residual=True)
        assert_exact(plan_for(backend, geometry, layout=layout, epilogue=epilogue, config=config))


# kernel, stride, padding, dilation: what each moves is in its name.
WINDOWS = {
    "pointwise": ((1, 1, 1), 1, 0, 1),
    "pointwise_strided": ((1, 1, 1), 2, 0, 1),
    "pointwise_padded": ((1, 1, 1), 1, 1, 1),
    "time_only": ((5, 1, 1), 1, (2, 0, 0), 1),
    "time_only_strided": ((3, 1, 1), (2, 1, 1), (1, 0, 0), 1),
    "height_only": ((1, 3, 1), 1, (0, 1, 0), 1),
    "width_only": ((1, 1, 3), 1, ((0, 0), (0, 0), (2, 0)), 1),
    "space_only": ((1, 3, 3), (1, 2, 2), (0, 1, 1), 1),
    "stride_beyond_kernel": ((2, 2, 2), 3, 0, 1),
    "strided_once": ((3, 3, 3), (2, 1, 2), 1, 1),
    "dilated_in_time": ((3, 3, 3), 1, (2, 1, 1), (2, 1, 1)),
    "dilated": ((3, 3, 3), 1, 2, (1, 2, 3)),
    "one_sided": ((3, 3, 3), 1, ((2, 0), (0, 2), (2, 0)), 1),
    "padding_beyond_kernel": ((2, 2, 2), 1, 3, 1),
    "even_kernel_strided_dilated": ((2, 4, 4), (2, 3, 2), (0, 3, 3), (1, 1, 2)),
    "larger_kernel": ((3, 5, 7), 1, (1, 2, 3), 1),
}


@fast
@pytest.mark.parametrize("config", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_windows_are_exact_on_integers(backend, window, config):
    kernel_size, stride, padding, dilation = window
    geometry = geometry_of(18, (5, 9, 15), kernel_size, stride, padding, dilation, batch=2)
    for epilogue in (Epilogue(), Epilogue(bias=True, residual=True)):
        assert_exact(plan_for(backend, geometry, epilogue=epilogue, config=config))


# Outputs along W: below, at, and above a tile; and with a row or a frame more than fits.
@fast
@pytest.mark.parametrize("width", [1, 3, 6, 7, 8, 10, 14, 15])
@pytest.mark.parametrize("height", [1, 2, 5])
def test_edges_of_a_tile_are_exact_on_integers(backend, width, height):
    geometry = geometry_of(16, (2, height, width), (3, 3, 3), 1, 1)
    assert_exact(plan_for(backend, geometry, config=UNROLLED))


# Padding of frames that a strided tile goes through: before and after them.
@fast
@pytest.mark.parametrize("pads", [(0, 0), (1, 1), (2, 0), (0, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_frames_of_a_strided_tile_are_exact_on_integers(backend, frames, pads):
    if frames + sum(pads) < 3:
        pytest.skip("no output")
    padding = (pads, (1, 1), (1, 0))
    epilogue = Epilogue(bias=True, residual=True)
    for size, channels in (((5, 13), 20), ((8, 32), 65), ((3, 18), 16)):
        geometry = geometry_of(channels, (frames, *size), (3, 3, 3), (1, 2, 2), padding)
        assert_exact(plan_for(backend, geometry, epilogue=epilogue, config=UNROLLED))


# More than caches hold, and pixels or lines that are whole cache lines: 34 MB of x and y.
@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue(True, "silu"), Epilogue(residual=True)])
@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (1, 3, 3), (5, 1, 1)])
def test_bits_do_not_depend_on_writing_past_the_caches(kernel_size, epilogue):
    if "c" not in cases.CPU_BACKENDS:
        pytest.skip("no C backend")
    padding = tuple(k // 2 for k in kernel_size)
    geometry = geometry_of(64, (8, 92, 92), kernel_size, 1, padding)
    plans = [plan_for("c", geometry, epilogue=epilogue, config=c) for c in (UNROLLED, LOOPED)]
    arrays = cases.arrays_for(plans[0])
    assert np.array_equal(*(cases.execute(plan, *arrays) for plan in plans))


@fast
@pytest.mark.parametrize("frames", [1, 2, 4, 7, 8, 9, 21])
def test_edges_of_a_block_of_lines_are_exact_on_integers(backend, frames):
    for geometry in (
        geometry_of(5, (frames, 3, 11), (3, 1, 1), 1, (1, 0, 0)),
        geometry_of(24, (frames,), (3,), 1, ((2, 0),)),
    ):
        assert_exact(plan_for(backend, geometry, config=UNROLLED))


@fast
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_more_than_one_strip_chunk_and_block(backend, dtype):
    """Large enough for several items per thread, for known taps, and for prefetching."""
    if backend == "triton" and interpreted():
        pytest.skip("too large for Triton's interpreter")
    for geometry in (
        geometry_of(136, (9, 40, 44), (3, 3, 3), 1, 1),
        geometry_of(136, (6, 61, 57), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
        geometry_of(24, (16, 60, 100), (5, 1, 1), 1, (2, 0, 0)),
    ):
        assert_exact(plan_for(backend, geometry, dtype))


@fast
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("config", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
def test_epilogues(backend, activation, config):
    for kernel_size, padding in (((3, 3, 3), 1), ((3, 1, 1), (1, 0, 0))):
        geometry = geometry_of(19, (3, 4, 11), kernel_size, 1, padding, batch=2)
        for layout in LAYOUTS:
            epilogue = Epilogue(True, activation, True)
            plan = plan_for(backend, geometry, "float32", layout, epilogue, config)
            arrays = cases.arrays_for(plan)
            tolerance.assert_conv_close(cases.execute(plan, *arrays), plan, *arrays)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch_is_an_empty_result(backend, layout):
    for config in (UNROLLED, LOOPED):
        geometry = geometry_of(4, (3, 5, 9), (3, 3, 3), 1, 1, batch=0)
        plan = plan_for(backend, geometry, layout=layout, config=config)
        x, w = np.empty(geometry.x_shape, "float32"), cases.random(geometry.w_shape, 0)
        assert cases.execute(plan, x, w).shape == (0, 4, 3, 5, 9)


@fast
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (3, 1, 1)], ids=["tiles", "lines"])
def test_nan_and_infinity_reach_their_outputs_and_no_others(backend, kernel_size, config, value):
    padding = tuple(k // 2 for k in kernel_size)
    geometry = geometry_of(20, (4, 7, 9), kernel_size, 1, padding)
    for layout in LAYOUTS:
        epilogue = Epilogue(activation="relu")
        plan = plan_for(backend, geometry, "float32", layout, epilogue, config)
        x, w, *_ = integer_arrays(plan)
        w[w == 0] = 1
        x[0, 5, 2, 3, 8] = x[0, 19, 0, 0, 0] = value
        want = cases.execute(cases.on(plan, "reference"), x, w)
        assert np.array_equal(cases.execute(plan, x, w), want, equal_nan=True), layout


@needs_numba
@pytest.mark.parametrize("config", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (3, 1, 1)], ids=["tiles", "lines"])
def test_numba_bits_do_not_depend_on_the_number_of_threads(kernel_size, config):
    import numba

    geometry = geometry_of(24, (5, 13, 17), kernel_size, 1, tuple(k // 2 for k in kernel_size))
    plan = plan_for("numba", geometry, config=config)
    x, w = cases.random(geometry.x_shape, 0), cases.random(geometry.w_shape, 1)
    several = cases.execute(plan, x, w)
    assert np.array_equal(cases.execute(plan, x, w), several)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert np.array_equal(cases.execute(plan, x, w), several)
    finally:
        numba.set_num_threads(before)


@pages.needs_mprotect
@fast
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("config", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
@pytest.mark.parametrize(
    ("kernel_size", "multiplier"),
    [((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 3, 3), 2)],
    ids=["tiles", "lines", "multiplier"],
)
def test_nothing_outside_the_arrays_is_read_or_written(
    backend, layout, at_end, config, kernel_size, multiplier
):
    padding = tuple(k // 2 for k in kernel_size)
    geometry = geometry_of(19, (3, 5, 9), kernel_size, 1, padding, multiplier=multiplier)
    plan = plan_for(backend, geometry, "float32", layout, Epilogue(True, "none", True), config)
    if backend == "triton" and not interpreted():
        pytest.skip("a GPU does not see pages of the CPU")
    module = kernel("depthwise", backend)
    arrays = integer_arrays(plan)
    x, w, bias, residual = (
        pages.BetweenForbiddenPages(
            a.shape, layout=layout if a.ndim > 1 else "contiguous", at_end=at_end
        ).array
        for a in arrays
    )
    x[...], w[...], bias[...], residual[...] = arrays
    y = pages.BetweenForbiddenPages(geometry.y_shape, layout=layout, at_end=at_end).array
    workspace = np.empty(module.workspace_size(plan), "float32")
    x, bias, residual, out, workspace = (
        cases.moved(a, plan) for a in (x, bias, residual, y, workspace)
    )
    module.run(plan, x, module.prepack(w, plan), bias, residual, out, workspace)
    want = cases.execute(cases.on(plan, "reference"), *arrays)
    assert np.array_equal(y, want)


@needs_numba
@pytest.mark.parametrize(
    ("geometry", "form"),
    [
        (geometry_of(54, (16, 56, 56), (3, 3, 3), 1, 1), "depthwise_tiles"),
        (geometry_of(54, (16, 56, 56), (3, 3, 3), (1, 2, 2), 1), "depthwise_tiles"),
        (geometry_of(24, (16, 112, 112), (5, 1, 1), 1, (2, 0, 0)), "depthwise_lines"),
        (geometry_of(512, (4096,), (4,), 1, ((3, 0),)), "depthwise_lines"),
    ],
    ids=["3x3x3", "strided", "5x1x1", "causal_1d"],
)
def test_layers_of_networks_take_the_form_made_for_them(geometry, form):
    from fastconv.numba_kernels import depthwise, depthwise_tiles

    plan = plan_for("numba", geometry)
    assert depthwise._form(plan).__name__.endswith(form)
    if form == "depthwise_tiles":
        assert depthwise_tiles.tile_shape(plan).kh == geometry.kernel[1]


LAYERS = """
import cases, tolerance
from fastconv.numba_kernels import simd
from test_depthwise import LOOPED, UNROLLED, geometry_of, plan_for
from fastconv.epilogue import Epilogue
for kernel_size, padding, config in (
    ((3, 3, 3), 1, UNROLLED), ((3, 3, 3), 1, LOOPED), ((3, 1, 1), (1, 0, 0), UNROLLED)
):
    geometry = geometry_of(19, (3, 7, 9), kernel_size, 1, padding)
    plan = plan_for("numba", geometry, epilogue=Epilogue(True, "silu", True), config=config)
    arrays = cases.arrays_for(plan)
    tolerance.assert_conv_close(cases.execute(plan, *arrays), plan, *arrays)
"""


@needs_numba
def test_a_second_process_compiles_nothing(tmp_path):
    code = LAYERS + "print(*(k.from_cache for k in simd.compiled()))"
    assert run_python(code, NUMBA_CACHE_DIR=str(tmp_path)) == "False False False"
    assert run_python(code, NUMBA_CACHE_DIR=str(tmp_path)) == "True True True"


@needs_numba
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 CPUs")
@pytest.mark.parametrize(
    ("cpu", "features"), [("haswell", "+avx,+avx2,+fma"), ("generic", "")], ids=["avx2", "sse2"]
)
def test_other_instruction_sets(cpu, features):
    if features and not {"avx2", "fma"} <= set(instruction_sets()):
        pytest.skip("this CPU has no AVX2")
    code = LAYERS + "print(simd.register_count())"
    assert run_python(code, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features) == "16"


@backends
def test_refuses_what_is_not_depthwise(backend):
    geometry = Geometry.of((1, 4, 5), (4, 2, 3), groups=2)
    reason = kernel("depthwise", backend).supports(geometry, "float32", Epilogue())
    assert reason == "not depthwise: 2 groups for 4 input channels"
    depthwise = Geometry.of((1, 4, 5), (4, 1, 3), groups=4)
    reason = kernel("depthwise", backend).supports(depthwise, "int8", Epilogue())
    assert reason is not None
    assert "int8" in reason
