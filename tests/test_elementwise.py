"""The small C kernels between convolutions, and scaling on the way into one, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fastconv import backends
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import Plan
from fastconv.reference import direct

pytestmark = pytest.mark.skipif(
    backends.available()["c"] is not None, reason=str(backends.available()["c"])
)
FENCE = 40  # floats behind each array that nobody may write
SHAPES = [(1, 1, 1), (2, 5, 3), (1, 7, 16), (2, 40, 54), (3, 2, 33), (1, 900, 130), (2, 300, 192)]


@pytest.fixture(params=["avx512", "avx2", "plain"])
def small(request):
    from fastconv.c_kernels import elementwise, launch

    if request.param not in launch.instruction_sets():
        pytest.skip(f"this CPU has no {request.param}")
    with launch.forced(request.param):
        yield elementwise


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fenced(*shape):
    """An array of NaN with a fence, to be written."""
    size = int(np.prod(shape))
    memory = np.full(size + FENCE, np.nan, np.float32)
    memory[size:] = 7
    return memory[:size].reshape(shape), memory[size:]


def address(array):
    return 0 if array is None else array.ctypes.data


def channels_first(images, points, channels):
    return images, channels, points


def activated(z, name):
    return direct.finish(z.astype(np.float64), None, None, Epilogue(False, name, False))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "hardswish", "sigmoid"])
@pytest.mark.parametrize("parts", ["", "scale", "image scale", "scale shift", "shift residual"])
@pytest.mark.parametrize("shape", SHAPES)
def test_blend(small, shape, parts, activation, threads):
    images, _, channels = shape
    x, residual = random(*shape), random(*shape, seed=1) if "residual" in parts else None
    scale = random(images if "image" in parts else 1, channels, seed=2)
    scale = scale if "scale" in parts else None
    shift = random(channels, seed=3) if "shift" in parts else None
    y, fence = fenced(*shape)
    params = small.blend(
        channels_first(*shape), activation, per_image="image" in parts, y_step=channels
    )
    small.lib.fc_run_blend(params, *map(address, (x, scale, shift, residual, y)), threads)
    want = x.astype(np.float64)
    want = want * (1 if scale is None else scale[:, None].astype(np.float64))
    want = want + (0 if shift is None else shift) + (0 if residual is None else residual)
    np.testing.assert_allclose(y, activated(want, activation), rtol=1e-6, atol=1e-6)
    assert (fence == 7).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_blend_into_a_part_of_wider_pixels(small, shape):
    images, points, channels = shape
    x, wide = random(*shape), np.full((images, points, channels + 9), 7, np.float32)
    params = small.blend(channels_first(*shape), y_step=channels + 9)
    small.lib.fc_run_blend(params, address(x), 0, 0, 0, address(wide) + 4 * 5, 2)
    np.testing.assert_array_equal(wide[..., 5 : 5 + channels], x)
    assert (wide[..., :5] == 7).all()
    assert (wide[..., 5 + channels :] == 7).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 20_000, 3)])
def test_means(small, shape, threads):
    x = random(*shape) + 1000
    y, fence = fenced(shape[0], shape[2])
    params = small.means(channels_first(*shape))
    workspace = np.full(small.means_size(params), np.nan, np.float32)
    small.lib.fc_run_means(params, address(x), address(y), address(workspace), threads)
    # Sums of at most 128 terms, of at most 1 + points / 128 / parts of those, and of 16 parts.
    terms = 128 + shape[1] / 128 + 16
    bound = 2**-24 * terms * np.abs(x).max()
    assert np.abs(y - x.mean(1, dtype=np.float64)).max() <= bound
    assert (fence == 7).all()


POOLS = [
    ((4, 9, 8), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ((5, 6, 7), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    ((5, 6, 7), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((1, 1, 9), (1, 1, 4), (1, 1, 3), (0, 0, 2)),
]


@pytest.mark.parametrize("channels", [1, 16, 54, 70])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), POOLS)
@pytest.mark.parametrize("kind", ["max", "mean", "counted mean"])
def test_pool(small, kind, size, kernel, stride, padding, channels):
    pairs = tuple((p, p) for p in padding)
    g = Geometry(2, channels, channels, channels, size, kernel, stride, pairs, (1, 1, 1))
    x = random(2, *size, channels)
    x[0, 0, 0, 0, 0] = np.nan
    y, fence = fenced(2, *g.out_size, channels)
    params = small.pool(g, mean="mean" in kind, counted="counted" in kind)
    small.lib.fc_run_pool(params, address(x), address(y), 2)
    empty = -np.inf if kind == "max" else 0.0
    wide = np.pad(x.astype(np.float64), [(0, 0), *pairs, (0, 0)], constant_values=empty)
    there = np.pad(np.ones((1, *size, 1)), [(0, 0), *pairs, (0, 0)])
    want = np.empty(y.shape)
    for at in np.ndindex(g.out_size):
        cut = tuple(slice(o * s, o * s + k) for o, s, k in zip(at, stride, kernel, strict=True))
        window = wide[:, cut[0], cut[1], cut[2]].reshape(2, -1, channels)
        taps = np.prod(kernel) if "counted" in kind else there[0, cut[0], cut[1], cut[2]].sum()
        best = window.max(1) if kind == "max" else window.sum(1) / taps
        want[:, at[0], at[1], at[2]] = best
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert np.isnan(y).any()
    assert (fence == 7).all()


@pytest.mark.parametrize(("rows", "columns"), [(3, 70), (64, 1), (17, 33), (100, 5)])
def test_turn(small, rows, columns):
    x = random(2, rows, columns)
    y, fence = fenced(2, columns, rows)
    small.lib.fc_run_turn(small.turn(2, rows, columns), address(x), address(y), 2)
    np.testing.assert_array_equal(y, x.swapaxes(1, 2))
    assert (fence == 7).all()


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "hardswish", "sigmoid"])
@pytest.mark.parametrize("channels", [3, 16, 54, 216])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_convolution_scales_what_it_reads(small, activation, channels, stride):
    from fastconv.c_kernels import grouped

    geometry = Geometry.of((2, channels, 3, 7, 8), (24, channels, 1, 1, 1), (1, stride, stride))
    epilogue = Epilogue(True, "relu", True)
    plan = Plan("grouped", "c", geometry, epilogue=epilogue)
    x, w, b = random(2, 3, 7, 8, channels), random(24, channels, seed=1), random(24, seed=2)
    scale = random(2, channels, seed=3)
    residual = random(2, *geometry.out_size, 24, seed=4)
    packed = grouped.prepack_scaled(w.reshape(geometry.w_shape), plan, activation)
    y, fence = fenced(2, *geometry.out_size, 24)
    size = grouped.workspace_size_scaled(plan)
    assert size >= packed.workspace_size()
    packed.run(x, (b, scale, None), residual, y, np.full(size, np.nan, np.float32))
    z = activated(x.astype(np.float64) * scale[:, None, None, None], activation)
    z = z[:, :, ::stride, ::stride] @ w.T.astype(np.float64) + b + residual
    bound = 2**-24 * (channels + 16) * (np.abs(z) + 4 * channels**0.5).max()
    assert np.abs(y - np.maximum(z, 0)).max() <= bound
    assert (fence == 7).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slots", [0, 3, 4])
@pytest.mark.parametrize("floats", [1, 37, 70_000])
def test_ring(small, floats, slots, threads):
    """Streams at places of their own, one of them not active; in memory either may come first."""
    entries, streams = 3, 3
    total = slots or streams
    shape = (entries, total, floats) if slots else (streams, entries, floats)
    memory, fence = fenced(*shape)
    memory[...] = random(*shape)
    x, steps = random(streams, floats, seed=1), np.array([5, 0, 7])
    active = np.array([1, 1, 0], np.uint8)
    before, (y, y_fence) = memory.copy(), fenced(streams, floats)
    y[...] = 9
    params = small.ring((streams, 1, floats), entries, slots)
    small.lib.fc_run_ring(params, *map(address, (x, memory, steps, y, active)), threads)
    want, want_y = before, np.full_like(y, 9)
    for n, step in ((0, 5), (1, 0)):
        entry = want[step % entries, n] if slots else want[n, step % entries]
        want_y[n] = entry
        entry[...] = x[n]
    np.testing.assert_array_equal(memory, want)
    np.testing.assert_array_equal(y, want_y)
    assert steps.tolist() == [6, 1, 7]
    assert (fence == 7).all()
    assert (y_fence == 7).all()
    small.lib.fc_run_ring(params, 0, address(memory), address(steps), address(y), 0, threads)
    assert steps.tolist() == [6, 1, 7]  # a look at what would leave
    np.testing.assert_array_equal(y[2], want[1, 2] if slots else want[2, 1])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("reach", "dilation"), [(1, 1), (4, 1), (6, 2)])
@pytest.mark.parametrize("floats", [1, 37, 40_000])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_window(small, reduce, floats, reach, dilation, threads):
    """Two streams of three, at places of their own."""
    memory, x = random(reach, 3, floats), random(2, floats, seed=1)
    steps, (y, fence) = np.array([0, 2 * reach + 1]), fenced(2, floats)
    memory[0, 0, 0] = np.nan
    params = small.window((2, 1, floats), reach, reduce, dilation, slots=3)
    small.lib.fc_run_window(params, *map(address, (x, memory, steps, y)), threads)
    for n, step in enumerate(steps):
        kept = [memory[(step - age) % reach, n] for age in range(reach, 0, -dilation)]
        stack = np.stack([*kept, x[n]])
        want = getattr(stack.astype(np.float64), reduce)(0)
        bound = 2**-24 * len(stack) * np.abs(stack).sum(0)
        if reduce == "max":
            np.testing.assert_array_equal(y[n], want.astype(np.float32))
        else:
            assert ((np.abs(y[n] - want) <= bound) | np.isnan(want)).all()
            np.testing.assert_array_equal(np.isnan(y[n]), np.isnan(want))
    assert (fence == 7).all()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_calls_are_played_in_order(small, threads):
    """Many short loops, each of what the one before wrote, with more threads than cores."""
    from fastconv.c_kernels.launch import ffi

    count, shape = 200, (1, 3000, 20)
    ones, (x, fence) = np.ones(shape, np.float32), fenced(*shape)
    x[...] = random(*shape)
    want = x + np.float32(0)
    params = small.blend(channels_first(*shape))
    calls = ffi.new("fc_call[]", count)
    for call in calls:
        call.kind, call.params = small.lib.FC_CALL_BLEND, params
        call.x, call.residual, call.y = address(x), address(ones), address(x)
        want = want + ones
    small.lib.fc_play(calls, count, 0, threads)
    np.testing.assert_array_equal(x, want)
    assert (fence == 7).all()
