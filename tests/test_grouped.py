"""Grouped and dense convolution on every backend: the definition, its edges, its memory."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given

import cases
import tolerance
from fastconv.backends import interpreted, kernel
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan
from fastconv.reference import direct
from pages import BetweenForbiddenPages, needs_mprotect

backends = pytest.mark.parametrize("backend", cases.CPU_BACKENDS)
fast = pytest.mark.parametrize("backend", [b for b in cases.CPU_BACKENDS if b != "reference"])
# Programs by the hundred: Triton's interpreter has smaller cases, in a file of its own.
compiled = pytest.mark.parametrize(
    "backend",
    [b for b in cases.CPU_BACKENDS if b != "reference" and not (b == "triton" and interpreted())],
)


in_c = pytest.mark.parametrize("backend", [b for b in cases.CPU_BACKENDS if b == "c"])
C_FORMS = ("products", "strips")


def use_c_form(monkeypatch, name: str) -> None:
    """The C backend takes one form, by the module of its cut, for every geometry."""
    form = importlib.import_module(f"fastconv.c_kernels.{name}")
    cut = lambda geometry, lanes, clip=None: form.cut(geometry, lanes)  # noqa: E731
    monkeypatch.setattr(kernel("grouped", "c"), "_cut", cut)


def use_c_threads(monkeypatch, count: int) -> None:
    """The C backend shares every call out, however small."""
    launch = importlib.import_module("fastconv.c_kernels.launch")
    monkeypatch.setattr(launch, "threads", lambda: count)
    monkeypatch.setattr(kernel("grouped", "c"), "_cycles", lambda cut: 1 << 40)


def plan_for(backend, geometry, dtype="float32", layout=CHANNELS_LAST, epilogue=None) -> Plan:
    return Plan("grouped", backend, geometry, dtype, epilogue or Epilogue(), layout)


def small_integers(shape, seed, dtype="float32") -> np.ndarray:
    """Values whose sums of products are exact in float32, in any order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


@backends
@given(cases.geometries(), cases.epilogues(), cases.layouts(), cases.dtypes())
def test_is_the_definition(backend, geometry, epilogue, layout, dtype):
    if kernel("grouped", backend).supports(geometry, dtype, epilogue):
        dtype = "float32"  # a backend of one precision refuses the other
    plan = plan_for(backend, geometry, dtype, layout, epilogue)
    arrays = cases.arrays_for(plan)
    tolerance.assert_conv_close(cases.execute(plan, *arrays), plan, *arrays)


# One more and one less than a vector, a half vector, a block of vectors; groups that share one.
CHANNELS = {
    "depthwise": (5, 1, 1),
    "depthwise_multiplier": (3, 1, 4),
    "group_of_six": (16, 6, 6),
    "group_of_twelve": (3, 12, 12),
    "group_many_to_one": (3, 7, 1),
    "group_one_to_many": (2, 1, 21),
    "vector_less_one": (1, 15, 15),
    "vector": (2, 16, 16),
    "vector_plus_one": (1, 17, 17),
    "block_plus_one": (1, 3, 33),
    "three_vectors": (1, 16, 48),
    "five_vectors_less_some": (2, 8, 75),
}


@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS.keys())
def test_channels_per_group_are_exact_on_integers(backend, channels, layout):
    groups, c, k = channels
    geometry = Geometry.of(
        (1, groups * c, 3, 5, 19), (groups * k, c, 3, 3, 3), padding=1, groups=groups
    )
    plan = plan_for(backend, geometry, layout=layout)
    x, w = small_integers(geometry.x_shape, 0), small_integers(geometry.w_shape, 1)
    want = cases.execute(cases.on(plan, "reference"), x, w)
    assert np.array_equal(cases.execute(plan, x, w), want)


# Sums that the compiled backends take in runs (groups, channels of one, kernel): part of a tap in
# each, whole taps, one term more than a run, one tap more.
LONG_SUMS = {
    "channels": (1, 1100, (1, 1, 1)),
    "one_channel_more": (1, 257, (1, 1, 1)),
    "taps_of_some_runs": (1, 520, (3, 1, 1)),
    "runs_of_taps": (1, 20, (3, 3, 3)),
    "grouped_runs_of_taps": (4, 32, (3, 3, 3)),
    "one_tap_more": (2, 64, (1, 5, 1)),
}
in_runs = pytest.mark.parametrize(
    ("backend", "run"),  # c: of products.CHUNK at its longest
    [(b, {"numba": 256, "c": 512}[b]) for b in cases.CPU_BACKENDS if b in ("numba", "c")],
)


def long_sums(name: str, padded: bool = True) -> Geometry:
    groups, c, window = LONG_SUMS[name]
    padding = tuple(k // 2 if padded else 0 for k in window)
    x_shape, w_shape = (1, groups * c, 3, 5, 11), (groups * 20, c, *window)
    return Geometry.of(x_shape, w_shape, padding=padding, groups=groups)


@in_runs
@pytest.mark.parametrize("name", LONG_SUMS)
def test_long_sums_are_exact_on_integers(backend, run, name):
    geometry = long_sums(name)
    plan = plan_for(backend, geometry, epilogue=Epilogue(bias=True, residual=True))
    x, w = small_integers(geometry.x_shape, 0), small_integers(geometry.w_shape, 1)
    bias = small_integers((geometry.out_channels,), 2)
    residual = small_integers(geometry.y_shape, 3)
    want = cases.execute(cases.on(plan, "reference"), x, w, bias, residual)
    assert np.array_equal(cases.execute(plan, x, w, bias, residual), want)


@in_runs
@pytest.mark.parametrize("name", ["channels", "grouped_runs_of_taps"])
def test_long_sums_round_less_than_one_run(backend, run, name):
    """n terms in runs of r have r / n + 1 / r of the error's variance: inside runs, and of them."""
    if backend == "c" and name != "channels":
        pytest.skip("strips are summed in one run")
    geometry = long_sums(name, padded=False)
    plan = plan_for(backend, geometry)
    x, w = cases.random(geometry.x_shape, 0), cases.random(geometry.w_shape, 1)
    want = direct.correlate(x.astype(np.float64), w.astype(np.float64), geometry)
    plain = tolerance.plain_sum(x, w, None, None, geometry, plan.epilogue, "float32")
    terms = w[0].size
    few = 1 + 4 / (2 * want.size) ** 0.5
    allowed = (run / terms + 1 / run) ** 0.5 * few**2 * tolerance.rms(plain - want)
    assert tolerance.rms(cases.execute(plan, x, w) - want) <= allowed


# kernel, stride, padding, dilation: what each moves is in its name.
WINDOWS = {
    "pointwise": ((1, 1, 1), 1, 0, 1),
    "pointwise_strided": ((1, 1, 1), 2, 0, 1),
    "pointwise_padded": ((1, 1, 1), 1, 1, 1),
    "time_only": ((5, 1, 1), 1, (2, 0, 0), 1),
    "space_only": ((1, 3, 3), (1, 2, 2), (0, 1, 1), 1),
    "stride_beyond_kernel": ((2, 2, 2), 3, 0, 1),
    "dilated": ((3, 3, 3), 1, 2, (1, 2, 3)),
    "one_sided": ((3, 3, 3), 1, ((2, 0), (0, 2), (1, 0)), 1),
    "padding_beyond_kernel": ((2, 2, 2), 1, 3, 1),
    "even_kernel_strided_dilated": ((2, 4, 4), (2, 3, 2), (0, 3, 3), (1, 1, 2)),
}


@compiled
@pytest.mark.parametrize("channels", [(1, 8, 20), (4, 3, 5)], ids=["dense", "grouped"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_windows_are_exact_on_integers(backend, window, channels):
    groups, c, k = channels
    kernel_size, stride, padding, dilation = window
    x_shape, w_shape = (2, groups * c, 5, 9, 21), (groups * k, c, *kernel_size)
    geometry = Geometry.of(x_shape, w_shape, stride, padding, dilation, groups)
    x, w = small_integers(x_shape, 0), small_integers(w_shape, 1)
    for layout in LAYOUTS:
        plan = plan_for(backend, geometry, layout=layout)
        want = cases.execute(cases.on(plan, "reference"), x, w)
        assert np.array_equal(cases.execute(plan, x, w), want), layout


@fast
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("groups", "c", "k"), [(1, 6, 37), (3, 5, 6)], ids=["dense", "grouped"])
def test_epilogues(backend, activation, groups, c, k):
    geometry = Geometry.of((2, groups * c, 3, 4, 11), (groups * k, c, 1, 3, 3), 1, 1, 1, groups)
    for layout in LAYOUTS:
        plan = plan_for(backend, geometry, "float32", layout, Epilogue(True, activation, True))
        arrays = cases.arrays_for(plan)
        tolerance.assert_conv_close(cases.execute(plan, *arrays), plan, *arrays)


@compiled
@pytest.mark.parametrize("groups", [1, 4])
def test_many_pixels_and_channels(backend, groups):
    """Several blocks per thread along every loop of a blocked kernel."""
    geometry = Geometry.of(
        (1, 80, 6, 40, 33), (112, 80 // groups, 3, 3, 3), (1, 2, 1), 1, 1, groups
    )
    plan = plan_for(backend, geometry)
    x, w = small_integers(geometry.x_shape, 0), small_integers(geometry.w_shape, 1)
    want = cases.execute(cases.on(plan, "reference"), x, w)
    assert np.array_equal(cases.execute(plan, x, w), want)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch_is_an_empty_result(backend, layout):
    for groups in (1, 2):
        geometry = Geometry.of((0, 4, 3, 5, 5), (6, 4 // groups, 3, 3, 3), 1, 1, 1, groups)
        plan = plan_for(backend, geometry, layout=layout)
        x, w = np.empty(geometry.x_shape, "float32"), cases.random(geometry.w_shape, 0)
        assert cases.execute(plan, x, w).shape == (0, 6, 3, 5, 5)


@compiled
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("groups", [1, 4])
def test_nan_and_infinity_reach_their_outputs_and_no_others(backend, groups, value):
    geometry = Geometry.of((1, 12, 4, 7, 9), (24, 12 // groups, 3, 3, 3), 1, 1, 1, groups)
    for layout in LAYOUTS:
        plan = plan_for(backend, geometry, "float32", layout, Epilogue(activation="relu"))
        x, w = small_integers(geometry.x_shape, 0), small_integers(geometry.w_shape, 1)
        w[w == 0] = 1
        x[0, 5, 2, 3, 8] = value
        want = cases.execute(cases.on(plan, "reference"), x, w)
        assert np.array_equal(cases.execute(plan, x, w), want, equal_nan=True), layout


@compiled
@pytest.mark.parametrize("groups", [1, 4])
def test_the_same_call_gives_the_same_bits(backend, groups):
    geometry = Geometry.of((1, 24, 4, 13, 17), (40, 24 // groups, 3, 3, 3), 1, 1, 1, groups)
    plan = plan_for(backend, geometry)
    x, w = cases.random(geometry.x_shape, 0), cases.random(geometry.w_shape, 1)
    first = cases.execute(plan, x, w)
    assert np.array_equal(cases.execute(plan, x, w), first)


@pytest.mark.skipif("numba" not in cases.CPU_BACKENDS, reason="numba is not installed")
@pytest.mark.parametrize("groups", [1, 4])
def test_numba_bits_do_not_depend_on_the_number_of_threads(groups):
    import numba

    geometry = Geometry.of((1, 24, 4, 13, 17), (40, 24 // groups, 3, 3, 3), 1, 1, 1, groups)
    plan = plan_for("numba", geometry)
    x, w = cases.random(geometry.x_shape, 0), cases.random(geometry.w_shape, 1)
    several = cases.execute(plan, x, w)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert np.array_equal(cases.execute(plan, x, w), several)
    finally:
        numba.set_num_threads(before)


@in_c
@pytest.mark.parametrize("form", C_FORMS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_every_c_form_is_exact_on_integers(backend, window, form, monkeypatch):
    """Whatever the model of costs says: both forms, alone and in shares of three threads."""
    use_c_form(monkeypatch, form)
    for groups, c, k in ((1, 20, 37), (3, 7, 9)):
        kernel_size, stride, padding, dilation = window
        x_shape, w_shape = (1, groups * c, 4, 8, 23), (groups * k, c, *kernel_size)
        geometry = Geometry.of(x_shape, w_shape, stride, padding, dilation, groups)
        plan = plan_for(backend, geometry, epilogue=Epilogue(True, "relu", True))
        x, w = small_integers(x_shape, 0), small_integers(w_shape, 1)
        bias, residual = small_integers((groups * k,), 2), small_integers(geometry.y_shape, 3)
        want = cases.execute(cases.on(plan, "reference"), x, w, bias, residual)
        for threads in (1, 3):
            use_c_threads(monkeypatch, threads)
            assert np.array_equal(cases.execute(plan, x, w, bias, residual), want), threads


# x, w, stride, padding, dilation, groups and form: what the C kernels cut in their own way.
C_CUTS = {
    "sums_in_parts": ((1, 600, 2, 3, 5), (20, 600, 3, 1, 1), 1, (1, 0, 0), 1, 1, "products"),
    "parts_of_taps": ((1, 70, 3, 6, 7), (33, 70, 3, 3, 3), 1, 1, 1, 1, "products"),
    "small_frames": ((3, 40, 2, 2, 3), (17, 40, 1, 3, 3), 1, (0, 1, 1), 1, 1, "products"),
    "one_pixel": ((1, 130, 1, 1, 1), (70, 130, 1, 1, 1), 1, 0, 1, 1, "products"),
    "wide_groups": ((1, 60, 3, 4, 9), (100, 30, 3, 1, 3), 1, 1, 1, 2, "products"),
    "thin_copied": ((2, 3, 3, 9, 9), (20, 3, 3, 5, 3), (1, 2, 2), (1, 2, 1), 1, 1, "products"),
    "thin_in_place": ((1, 3, 3, 9, 9), (40, 3, 3, 5, 3), (1, 2, 1), (1, 1, 0), 1, 1, "products"),
    "thin_in_parts": ((1, 2, 20_000), (70, 2, 5), 3, ((4, 1),), 1, 1, "products"),
    "thin_all_padding": ((1, 3, 2, 2, 2), (70, 3, 1, 2, 3), 1, (0, 2, 6), 1, 1, "products"),
    "columns_of_strips": ((1, 4, 1, 3, 600), (4, 2, 1, 2, 3), 1, 0, 1, 2, "strips"),
    "narrow_strips": ((1, 900, 1, 2, 200), (3, 900, 1, 2, 3), 1, 1, 1, 1, "strips"),
    "long_dilation": ((1, 4, 40, 3, 9), (4, 2, 3, 1, 1), 1, (20, 0, 0), (19, 1, 1), 2, "strips"),
    "parts_of_time": ((1, 6, 9, 4, 9), (6, 3, 3, 3, 3), (2, 1, 1), 1, 1, 2, "strips"),
}


@in_c
@pytest.mark.parametrize("case", C_CUTS.values(), ids=C_CUTS.keys())
def test_c_cuts_are_exact_on_integers(backend, case, monkeypatch):
    *sizes, form = case
    geometry = Geometry.of(*sizes)
    use_c_form(monkeypatch, form)
    plan = plan_for(backend, geometry)
    x, w = small_integers(geometry.x_shape, 0), small_integers(geometry.w_shape, 1)
    want = cases.execute(cases.on(plan, "reference"), x, w)
    for threads in (1, 2, 5):
        use_c_threads(monkeypatch, threads)
        assert np.array_equal(cases.execute(plan, x, w), want), threads


@in_c
@pytest.mark.parametrize("form", C_FORMS)
def test_c_bits_do_not_depend_on_the_number_of_threads(backend, form, monkeypatch):
    use_c_form(monkeypatch, form)
    geometry = Geometry.of((1, 96, 8, 13, 17), (48, 24, 3, 3, 3), 1, 1, 1, 4)
    plan = plan_for(backend, geometry)
    x, w = cases.random(geometry.x_shape, 0), cases.random(geometry.w_shape, 1)
    results = []
    for threads in (1, 2, 7):
        use_c_threads(monkeypatch, threads)
        results.append(cases.execute(plan, x, w))
    assert all(np.array_equal(y, results[0]) for y in results)


@in_c
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_c_scales_its_input_on_the_way(backend, activation, layout, monkeypatch):
    """As if x * scale had been activated in front; padding stays zero."""
    geometry = Geometry.of((3, 70, 2, 5, 7), (40, 70, 1, 1, 1), (1, 2, 1), (0, 1, 1))
    plan = plan_for(backend, geometry, layout=layout, epilogue=Epilogue(bias=True))
    x, w, bias, _ = cases.arrays_for(plan)
    scale = cases.random((3, 70), 4)
    front = Epilogue(activation=activation)
    ahead = np.float32(direct.finish(x * scale[..., None, None, None], None, None, front))
    for threads in (1, 3):
        use_c_threads(monkeypatch, threads)
        with cases.isa_of(plan):
            packed = kernel("grouped", "c").prepack_scaled(w, plan, activation)
            size = kernel("grouped", "c").workspace_size_scaled(plan)
        y = cases.Fenced(geometry.y_shape, "float32", layout)
        workspace = cases.Fenced((size,))
        packed.run(cases.laid_out(x, layout), (bias, scale, None), None, y.array, workspace.array)
        y.check()
        workspace.check()
        tolerance.assert_conv_close(y.array, plan, ahead, w, bias)


@needs_mprotect
@fast
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    ("groups", "c", "k", "kernel_size"),
    [
        (1, 7, 19, (3, 3, 3)),
        (1, 5, 18, (1, 1, 1)),
        (1, 3, 70, (2, 3, 3)),
        (3, 5, 6, (3, 3, 3)),
        (2, 30, 40, (1, 3, 3)),
    ],
    ids=["dense", "pointwise", "thin", "grouped", "wide_groups"],
)
def test_nothing_outside_the_arrays_is_read_or_written(
    backend, layout, at_end, groups, c, k, kernel_size
):
    geometry = Geometry.of(
        (1, groups * c, 3, 5, 7), (groups * k, c, *kernel_size), 1, "same", 1, groups
    )
    plan = plan_for(backend, geometry, "float32", layout, Epilogue(True, "none", True))
    if backend == "triton" and not interpreted():
        pytest.skip("a GPU does not see pages of the CPU")
    module = kernel("grouped", backend)
    values = [small_integers(s, i) for i, s in enumerate((geometry.x_shape, geometry.y_shape))]
    guarded = [
        BetweenForbiddenPages(v.shape, layout=layout, at_end=at_end).array
        for v in (*values, values[1])
    ]
    x, residual, y = guarded
    x[...], residual[...] = values
    w, bias = small_integers(geometry.w_shape, 2), small_integers((groups * k,), 3)
    with cases.isa_of(plan):
        workspace = np.empty(module.workspace_size(plan), "float32")
        packed = module.prepack(w, plan)
    moved = (cases.moved(a, plan) for a in (bias, residual, y, workspace))
    module.run(plan, cases.moved(x, plan), packed, *moved)
    want = cases.execute(cases.on(plan, "reference"), values[0], w, bias, values[1])
    assert np.array_equal(y, want)


@pytest.mark.skipif("torch" not in cases.CPU_BACKENDS, reason="PyTorch is not installed")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_takes_tensors_of_half_precision(dtype, layout):
    import torch

    geometry = Geometry.of((2, 6, 4, 5, 7), (9, 2, 3, 3, 3), 1, ((2, 0), (1, 1), (0, 1)), 1, 3)
    plan = plan_for("torch", geometry, dtype, layout, Epilogue(True, "relu", True))
    kind, module = getattr(torch, dtype), kernel("grouped", "torch")
    shapes = (geometry.x_shape, geometry.w_shape, (9,), geometry.y_shape)
    x, w, bias, residual = (torch.from_numpy(cases.random(s, 0)).to(kind) for s in shapes)
    y = torch.full(geometry.y_shape, torch.nan, dtype=kind)
    module.run(plan, x, module.prepack(w, plan), bias, residual, y, None)
    exact = plan_for("reference", geometry, "float64", epilogue=plan.epilogue)
    want = cases.execute(exact, *(a.double().numpy() for a in (x, w, bias, residual)))
    # Sums are kept in float32; the result is rounded, once per operation of the epilogue.
    size = np.abs(want).max() + residual.abs().max().item()
    assert np.abs(y.double().numpy() - want).max() <= 3 * torch.finfo(kind).eps * size


@in_c
@pytest.mark.parametrize("residual", [True, False])
def test_outputs_larger_than_the_caches(backend, residual):
    """They are written past them, by whole cache lines: nothing is missing, nothing is rounded."""
    geometry = Geometry.of((1, 8, 2, 263, 257), (64, 8, 1, 1, 1))
    plan = plan_for(backend, geometry, "float32", CHANNELS_LAST, Epilogue(True, "relu", residual))
    x, w = small_integers(geometry.x_shape, 0), small_integers(geometry.w_shape, 1)
    bias = small_integers((64,), 2)
    added = small_integers(geometry.y_shape, 3) if residual else None
    want = np.tensordot(w.reshape(64, 8), x[0], 1)[None] + bias.reshape(1, 64, 1, 1, 1)
    want = np.maximum(want if added is None else want + added, 0)
    assert np.array_equal(cases.execute(plan, x, w, bias, added), want)
