"""The fully separable block on every backend: three convolutions, and what lies between them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cases
import tolerance
from fastconv.backends import interpreted, kernel
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.geometry import SeparableGeometry
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan
from fastconv.reference import direct
from fastconv.transforms import amplification, transform
from pages import BetweenForbiddenPages, needs_mprotect

backends = pytest.mark.parametrize("backend", cases.CPU_BACKENDS)
fast = pytest.mark.parametrize("backend", [b for b in cases.CPU_BACKENDS if b != "reference"])
in_c = pytest.mark.parametrize("backend", [b for b in cases.CPU_BACKENDS if b == "c"])

RELU = Epilogue(bias=True, activation="relu")
ALL = (RELU, Epilogue(True, "silu"), Epilogue(True, "hardswish", True))
PLAIN = (Epilogue(), Epilogue(), Epilogue())

# Taps (KT, KH, KW) and outputs per tile (m1, m2): each pair is code of its own in a fast backend.
SIZES = {
    "direct": ((3, 3, 3), (1, 1)),
    "time": ((3, 3, 3), (4, 1)),
    "time_and_space": ((3, 3, 3), (2, 2)),
    "anisotropic": ((2, 1, 3), (3, 1)),
    "one_tap": ((1, 1, 1), (1, 1)),
}


def plan_for(backend, geometry, outputs, dtype="float32", layout=CHANNELS_LAST, epilogues=ALL):
    """`outputs` = (m1, m2); the transform of a strided axis is F(m, ceil(r / stride))."""
    temporal, depthwise, _ = geometry.stages
    taps = (temporal.kernel[0], *depthwise.kernel[1:])
    strides = (temporal.stride[0], *depthwise.stride[1:])
    ms = (outputs[0], outputs[1], outputs[1])
    transforms = tuple(transform(m, -(-r // s)) for m, r, s in zip(ms, taps, strides, strict=True))
    return Plan("hfa", backend, geometry, dtype, epilogues, layout, transforms=transforms)


def block(channels, size, taps, padding="same", batch=1, stride=1) -> SeparableGeometry:
    c, m, k = channels
    kt, kh, kw = taps
    x_shape = (batch, c, *size)
    shapes = (m, c, kt, 1, 1), (m, 1, 1, kh, kw), (k, m, 1, 1, 1)
    return SeparableGeometry.of(x_shape, *shapes, stride, padding)


def arrays_for(plan, make=cases.random):
    """x, weights, biases, residual; None where the epilogue has none."""
    stages = plan.geometry.stages
    x = make(plan.geometry.x_shape, 0, plan.dtype)
    weights = tuple(make(g.w_shape, 1 + i, plan.dtype) for i, g in enumerate(stages))
    biases = tuple(
        make((g.out_channels,), 4 + i, plan.dtype) if e.bias else None
        for i, (g, e) in enumerate(zip(stages, plan.epilogue, strict=True))
    )
    last = plan.epilogue[-1].residual
    residual = make(plan.geometry.y_shape, 7, plan.dtype) if last else None
    return x, weights, biases, residual


def assert_block_close(y, plan, x, weights, biases, residual) -> None:
    """Compare y with three float64 convolutions; the bound of `tolerance` from stage to stage.

    A stage multiplies the error e of its input by at most sum |w| of an output channel, adds its
    own rounding u (n + 8) amplification sum |w x|, and its activation's slope multiplies both.
    """
    time, high, wide = plan.transforms
    factors = (amplification([time]), amplification([high, wide]), 1.0)
    z, plain = np.asarray(x, np.float64), np.asarray(x)
    u, bound, slopes, typical = float(np.finfo(plan.dtype).eps), 0.0, 1.0, 0.0
    for stage, w, bias, epilogue, factor in zip(
        plan.geometry.stages, weights, biases, plan.epilogue, factors, strict=True
    ):
        added = residual if epilogue.residual else None
        plain = tolerance.plain_sum(plain, w, bias, added, stage, epilogue, plan.dtype)
        if z.size and np.prod(stage.y_shape):
            gain = np.abs(w.astype(np.float64)).reshape(stage.out_channels, -1).sum(1).max()
            magnitude = direct.correlate(abs(z), abs(w), stage).max()
            magnitude += max((np.abs(a).max() for a in (bias, added) if a is not None), default=0.0)
            terms = stage.in_channels // stage.groups * stage.taps
            typical = magnitude / terms**0.5  # a sum of n terms of random sign
            slope = tolerance.SLOPE[epilogue.activation]
            bound = slope * (gain * bound + u * (terms + 8) * factor * magnitude)
            slopes *= slope
        z = direct.finish(direct.correlate(z, w, stage), bias, added, epilogue)
    assert y.shape == z.shape
    if not z.size:
        return
    assert np.isfinite(y).all(), "not finite: an output was not written, or read poison"
    error = np.abs(y - z)
    assert error.max() <= bound, f"{plan.algorithm}: max error {error.max():.3e} > {bound:.3e}"
    bound = 4 * slopes * np.prod(factors)
    bound *= max(tolerance.rms(plain - z), u * max(tolerance.rms(z), typical))
    assert tolerance.rms(error) <= bound, f"{plan.algorithm}: rms {tolerance.rms(error):.3e}"


@st.composite
def blocks(draw, sizes=tuple(SIZES), strides=((1, 1, 1),)):
    """A SeparableGeometry and outputs per tile: odd sizes, one-sided padding, batch 0 to 2."""
    taps, outputs = SIZES[draw(st.sampled_from(sizes))]
    channels = tuple(draw(st.integers(1, 5)) for _ in range(3))
    padding = tuple(draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in range(3))
    size = tuple(
        max(draw(st.integers(1, 9)), r - sum(p)) for r, p in zip(taps, padding, strict=True)
    )
    batch = draw(st.sampled_from((1, 1, 2, 0)))
    return block(channels, size, taps, padding, batch, draw(st.sampled_from(strides))), outputs


@backends
@given(blocks(), st.tuples(*[cases.epilogues()] * 3), cases.layouts(), cases.dtypes())
def test_is_three_convolutions(backend, sized, epilogues, layout, dtype):
    geometry, outputs = sized
    inner = (Epilogue(e.bias, e.activation) for e in epilogues[:2])
    dtype = "float32" if backend in cases.FLOAT32_ONLY else dtype
    plan = plan_for(backend, geometry, outputs, dtype, layout, (*inner, epilogues[2]))
    arrays = arrays_for(plan)
    assert_block_close(cases.execute(plan, *arrays), plan, *arrays)


@pytest.mark.parametrize("backend", [b for b in cases.CPU_BACKENDS if b != "numba"])
@given(blocks(strides=((2, 1, 1), (1, 2, 2), (2, 3, 1))))
def test_strides_belong_to_the_first_two_stages(backend, sized):
    geometry, outputs = sized
    plan = plan_for(backend, geometry, outputs)
    arrays = arrays_for(plan)
    assert_block_close(cases.execute(plan, *arrays), plan, *arrays)


@pytest.mark.skipif("numba" not in cases.CPU_BACKENDS, reason="numba is not installed")
def test_numba_refuses_strides_with_the_reason():
    geometry = block((2, 2, 2), (4, 6, 6), (3, 3, 3), stride=(1, 2, 2))
    reason = kernel("hfa", "numba").supports(geometry, "float32", PLAIN)
    assert reason == "stride (1, 2, 2): the numba block is for stride 1"


@fast
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_more_channels_and_pixels_than_a_block(backend, size, layout):
    """Partial vectors in every stage, partial tiles in time, several steps of rows and items."""
    taps, outputs = size
    geometry = block((19, 35, 21), (9, 13, 30), taps, batch=2)
    plan = plan_for(backend, geometry, outputs, layout=layout)
    arrays = arrays_for(plan)
    assert_block_close(cases.execute(plan, *arrays), plan, *arrays)


@fast
def test_direct_stages_are_exact_on_integers(backend):
    """F(1, r) everywhere: a fast backend must give the very same numbers."""
    geometry = block((5, 18, 7), (4, 9, 23), (3, 3, 3))

    assert_exact_on_integers(backend, geometry)


def assert_exact_on_integers(backend, geometry) -> None:
    def small(shape, seed, dtype):
        return np.random.default_rng(seed).integers(-2, 3, shape).astype(dtype)

    epilogues = (RELU, RELU, Epilogue(True, "none", True))
    plan = plan_for(backend, geometry, (1, 1), epilogues=epilogues)
    arrays = arrays_for(plan, small)
    want = cases.execute(cases.on(plan, "reference"), *arrays)
    assert np.array_equal(cases.execute(plan, *arrays), want)


# Each is a path of its own: tiles of 4, 7 and 8 columns, windows with and without code of their
# own, strides that skip rows and columns, images smaller than window and padding.
@in_c
@pytest.mark.parametrize(
    ("size", "taps", "stride", "padding"),
    [
        ((3, 5, 4), (3, 3, 3), 1, "same"),
        ((3, 5, 14), (3, 3, 3), 1, "same"),
        ((3, 5, 16), (3, 3, 3), 1, "same"),
        ((4, 9, 17), (3, 3, 3), (1, 2, 2), "same"),
        ((9, 9, 17), (2, 5, 5), (3, 1, 1), "same"),
        ((5, 11, 19), (1, 2, 7), (2, 3, 2), ((0, 0), (1, 0), (0, 2))),
        ((5, 11, 19), (3, 1, 1), (1, 3, 4), 0),
        ((2, 3, 2), (3, 3, 3), (1, 1, 1), ((2, 0), (0, 4), (5, 3))),
        ((1, 1, 1), (1, 1, 1), (2, 2, 2), ((3, 2), (4, 4), (6, 0))),
    ],
)
def test_direct_windows_are_exact_on_integers(backend, size, taps, stride, padding):
    assert_exact_on_integers(backend, block((5, 18, 37), size, taps, padding, 2, stride))


@backends
@pytest.mark.parametrize("outputs", [(1, 1), (4, 1)])
def test_padding_is_zero_behind_the_activation(backend, outputs):
    """With zero weights the first stage is sigmoid(bias) inside and zero on the padding around."""
    geometry = block((1, 1, 1), (3, 4, 4), (3, 3, 3))
    epilogues = (Epilogue(True, "sigmoid"), Epilogue(), Epilogue())
    plan = plan_for(backend, geometry, outputs, epilogues=epilogues)
    ones = [np.ones(g.w_shape, np.float32) for g in geometry.stages]
    x, weights = np.zeros(geometry.x_shape, np.float32), (0 * ones[0], ones[1], ones[2])
    y = cases.execute(plan, x, weights, (np.zeros(1, np.float32), None, None))
    inside = np.outer([2, 3, 3, 2], [2, 3, 3, 2]) / 2  # taps on the image, times sigmoid(0)
    assert np.array_equal(y[0, 0], np.broadcast_to(inside, (3, 4, 4)).astype(np.float32))


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch_is_an_empty_result(backend, layout):
    geometry = block((3, 4, 5), (4, 6, 6), (3, 3, 3), batch=0)
    plan = plan_for(backend, geometry, (4, 1), layout=layout)
    assert cases.execute(plan, *arrays_for(plan)).shape == (0, 5, 4, 6, 6)


@fast
def test_nan_spreads_no_further_than_the_window_of_its_tile(backend):
    """In time over a tile of outputs, in space over the depthwise window, over all channels."""
    geometry = block((3, 4, 5), (8, 9, 9), (3, 3, 3))
    plan = plan_for(backend, geometry, (4, 1), epilogues=(RELU, RELU, RELU))
    x, weights, biases, residual = arrays_for(plan)
    clean = cases.execute(plan, x, weights, biases, residual)
    x[0, 1, 1, 4, 4] = np.nan
    y = cases.execute(plan, x, weights, biases, residual)
    hit = np.zeros_like(y, bool)
    hit[:, :, :3, 3:6, 3:6] = True  # what the definition reaches
    tile = np.zeros_like(y, bool)
    tile[:, :, :4, 3:6, 3:6] = True
    assert np.isnan(y[hit]).all()
    assert np.array_equal(y[~tile], clean[~tile])


@fast
def test_the_same_call_gives_the_same_bits(backend):
    geometry = block((6, 18, 7), (8, 11, 12), (3, 3, 3))
    plan = plan_for(backend, geometry, (4, 1))
    arrays = arrays_for(plan)
    first = cases.execute(plan, *arrays)
    assert np.array_equal(cases.execute(plan, *arrays), first)


@pytest.mark.skipif("numba" not in cases.CPU_BACKENDS, reason="numba is not installed")
def test_numba_bits_do_not_depend_on_the_number_of_threads():
    """One thread takes whole tiles of frames, several take strips of rows."""
    import numba

    plan = plan_for("numba", block((6, 18, 7), (4, 11, 12), (3, 3, 3)), (4, 1))
    arrays = arrays_for(plan)
    several = cases.execute(plan, *arrays)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert np.array_equal(cases.execute(plan, *arrays), several)
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@fast
def test_every_activation_in_every_stage(backend, activation):
    geometry = block((3, 17, 4), (4, 5, 6), (3, 3, 3))
    each = Epilogue(True, activation)
    last = Epilogue(True, activation, True)
    plan = plan_for(backend, geometry, (4, 1), epilogues=(each, each, last))
    arrays = arrays_for(plan)
    assert_block_close(cases.execute(plan, *arrays), plan, *arrays)


@in_c
@pytest.mark.parametrize(
    "transforms",
    [
        (transform(8, 3), transform(1, 3), transform(1, 3)),
        (transform(4, 3, (0, 1, -1, 2, -2)), transform(3, 3), transform(2, 3, (0, 1, 2))),
        (transform(2, 3), transform(7, 3), transform(1, 3)),
    ],
    ids=("eight_frames", "other_points", "seven_rows"),
)
def test_transforms_without_compiled_programs(backend, transforms):
    geometry = block((5, 18, 7), (9, 13, 12), (3, 3, 3))
    plan = Plan("hfa", backend, geometry, "float32", ALL, transforms=transforms)
    arrays = arrays_for(plan)
    assert_block_close(cases.execute(plan, *arrays), plan, *arrays)


@in_c
@pytest.mark.parametrize("outputs", [(1, 1), (4, 1), (4, 2), (2, 3)])
def test_bits_do_not_depend_on_threads_or_bands(backend, outputs, monkeypatch):
    """More threads take strips of rows, wide images are cut into bands of columns."""
    from fastconv.c_kernels import hfa, launch

    plan = plan_for(backend, block((6, 18, 7), (5, 11, 29), (3, 3, 3)), outputs)
    arrays = arrays_for(plan)
    monkeypatch.setattr(launch, "threads", lambda: 1)
    whole = cases.execute(plan, *arrays)
    try:
        for count, limit in ((2, 1 << 20), (3, 1 << 20), (7, 1 << 20), (1, 1), (2, 1)):
            monkeypatch.setattr(launch, "threads", lambda count=count: count)
            for name in ("RING_BYTES", "BAND_BYTES", "LEAST_BAND"):
                monkeypatch.setattr(hfa, name, limit)
            hfa._cut.cache_clear()
            assert np.array_equal(cases.execute(plan, *arrays), whole), (count, limit)
    finally:
        hfa._cut.cache_clear()


@in_c
@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("outputs", [(1, 1), (4, 1), (3, 2)])
def test_bands_of_strided_blocks(backend, outputs, stride, monkeypatch):
    from fastconv.c_kernels import hfa

    padding = ((1, 1), (2, 0), (3, 5))
    geometry = block((3, 18, 7), (9, 11, 40), (3, 3, 3), padding, 1, stride)
    plan = plan_for(backend, geometry, outputs)
    arrays = arrays_for(plan)
    for name in ("RING_BYTES", "BAND_BYTES", "LEAST_BAND"):
        monkeypatch.setattr(hfa, name, 1)
    hfa._cut.cache_clear()
    try:
        assert_block_close(cases.execute(plan, *arrays), plan, *arrays)
    finally:
        hfa._cut.cache_clear()


@needs_mprotect
@fast
@pytest.mark.parametrize("at_end", [True, False], ids=("at_end", "at_start"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [(1, 1), (4, 1), (2, 2)])
def test_nothing_outside_the_arrays_is_touched(backend, outputs, layout, at_end):
    if backend == "torch":
        pytest.skip("PyTorch's own kernels")
    if backend == "triton" and not interpreted():
        pytest.skip("pages of the host's memory")
    geometry = block((19, 35, 21), (5, 9, 11), (3, 3, 3))
    plan = plan_for(backend, geometry, outputs, layout=layout)
    x, weights, biases, residual = arrays_for(plan)
    x_at, residual_at, y = (
        BetweenForbiddenPages(shape, layout=layout, at_end=at_end).array
        for shape in (geometry.x_shape, geometry.y_shape, geometry.y_shape)
    )
    x_at[...], residual_at[...] = x, residual
    biases_at = tuple(BetweenForbiddenPages(b.shape, at_end=at_end).array for b in biases)
    for to, b in zip(biases_at, biases, strict=True):
        to[...] = b
    module = kernel("hfa", backend)
    with cases.isa_of(plan):
        packed = module.prepack(weights, plan)
        workspace = BetweenForbiddenPages((module.workspace_size(plan),), at_end=at_end).array
    inputs = (cases.moved(x_at, plan), packed, cases.moved(biases_at, plan))
    outputs = (cases.moved(a, plan) for a in (residual_at, y, workspace))
    module.run(plan, *inputs, *outputs)
    assert_block_close(y, plan, x, weights, biases, residual)
