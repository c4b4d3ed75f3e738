"""Continual convolution on every backend: a stream equals its clip, and the state is the ring."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cases
import tolerance
from fastconv.backends import kernel
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan
from fastconv.reference import direct

backends = pytest.mark.parametrize("backend", cases.CPU_BACKENDS)


def plan_for(
    backend, frame_shape, w_shape, stride=1, padding=0, dilation=1, groups=1, *,
    dtype="float32", layout=CHANNELS_LAST, epilogue=None,
) -> Plan:  # fmt: skip
    """frame_shape (N, C, *frame); stride, padding and dilation of the frame, an int or per axis.

    A dilation with one more entry begins with that of time.
    """
    n = len(w_shape) - 2

    def behind_time(value, time):
        value = (value,) * (n - 1) if isinstance(value, int) else tuple(value)
        return value if len(value) == n else (time, *value)

    dilation = behind_time(dilation, 1)
    span = dilation[0] * (w_shape[2] - 1) + 1
    x_shape = (*frame_shape[:2], span, *frame_shape[2:])
    geometry = Geometry.of(
        x_shape, w_shape, behind_time(stride, 1), behind_time(padding, 0), dilation, groups
    )
    return Plan("continual", backend, geometry, dtype, epilogue or Epilogue(), layout)


class Stream:
    """A backend's continual convolution with its state, every array fenced."""

    def __init__(self, plan: Plan, w, bias=None):
        self.plan, self.bias = plan, bias
        self.module = kernel("continual", plan.backend)
        reason = self.module.supports(plan.geometry, plan.dtype, plan.epilogue)
        assert reason is None, reason
        with cases.isa_of(plan):
            self.packed = self.module.prepack(w, plan)
        n, c, span, *frame = plan.geometry.x_shape
        self.state = cases.Fenced((n, c, span - 1, *frame), plan.dtype, plan.layout)
        self.state.array[...] = 0
        self.steps = np.zeros(n, np.int64)

    def step(self, x, residual=None) -> np.ndarray:
        """Feed x (N, C, *frame); return the output column (N, K, *out_frame)."""
        plan = self.plan
        n, k, _, *out = plan.geometry.y_shape
        y = cases.Fenced((n, k, *out), plan.dtype, plan.layout)
        with cases.isa_of(plan):
            workspace = cases.Fenced((self.module.workspace_size(plan),), plan.dtype)
        x, residual = (a if a is None else cases.laid_out(a, plan.layout) for a in (x, residual))
        before = x.copy()
        self.module.run(
            plan, x, self.packed, self.bias, residual, self.state.array, self.steps, y.array,
            workspace.array,
        )  # fmt: skip
        for fenced in (y, workspace, self.state):
            fenced.check()
        assert np.array_equal(x, before, equal_nan=True), "the frame was written"
        return y.array


def padded_clip(plan: Plan, frames: np.ndarray) -> Plan:
    """The clip (N, C, T, *frame) with zeros in front, as a plan whose columns the steps give."""
    g = plan.geometry
    ring = g.in_size[0] - 1
    clip = replace(
        g,
        in_size=(frames.shape[2], *g.in_size[1:]),
        padding=((ring, 0), *g.padding[1:]),
    )
    return replace(plan, family="grouped", geometry=clip)


def assert_stream_is_its_clip(plan: Plan, times: int, seed: int = 0) -> None:
    g = plan.geometry
    frames = cases.random((g.batch, g.in_channels, times, *g.in_size[1:]), seed, plan.dtype)
    clip = padded_clip(plan, frames)
    _, w, bias, residual = cases.arrays_for(clip, seed)
    stream = Stream(plan, w, bias)
    columns = [
        stream.step(frames[:, :, t], None if residual is None else residual[:, :, t])
        for t in range(times)
    ]
    y = np.stack(columns, axis=2)
    tolerance.assert_conv_close(y, clip, frames, w, bias, residual)
    assert np.array_equal(stream.steps, np.full(g.batch, times))
    ring = g.in_size[0] - 1
    for t in range(max(0, times - ring), times):
        assert np.array_equal(stream.state.array[:, :, t % ring], frames[:, :, t])


@st.composite
def windows(draw):
    """A geometry as `continual` gets it: no stride and no padding along the first axis."""
    g = draw(cases.geometries(family=draw(st.sampled_from(("depthwise", "grouped", "winograd")))))
    dilation = (draw(st.integers(1, 3)), *g.dilation[1:])
    return replace(
        g,
        in_size=(dilation[0] * (g.kernel[0] - 1) + 1, *g.in_size[1:]),
        stride=(1, *g.stride[1:]),
        padding=((0, 0), *g.padding[1:]),
        dilation=dilation,
    )


@backends
@given(windows(), cases.epilogues(), cases.layouts(), cases.dtypes(), st.integers(1, 6))
def test_a_stream_is_its_zero_padded_clip(backend, geometry, epilogue, layout, dtype, times):
    dtype = "float32" if backend == "c" else dtype  # its only one
    plan = Plan("continual", backend, geometry, dtype, epilogue, layout)
    assert_stream_is_its_clip(plan, times)


# In this order: the frame's shape, the weight's, stride, padding, dilation, groups.
STREAMS = {
    "dense": ((1, 5, 6, 7), (9, 5, 3, 3, 3), 1, 1, 1, 1),
    "dense_strided": ((2, 4, 9, 8), (6, 4, 3, 3, 3), 2, 1, 1, 1),
    "grouped": ((1, 12, 5, 6), (12, 3, 3, 3, 3), 1, 1, 1, 4),
    "depthwise": ((1, 19, 7, 9), (19, 1, 3, 3, 3), 1, 1, 1, 19),
    "depthwise_multiplier": ((2, 6, 5, 5), (12, 1, 2, 3, 3), 1, 1, 1, 6),
    "temporal": ((1, 8, 5, 6), (8, 8, 5, 1, 1), 1, 0, 1, 1),
    "pointwise_without_state": ((2, 8, 5, 6), (7, 8, 1, 1, 1), 1, 0, 1, 1),
    "spatial_without_state": ((1, 9, 5, 6), (9, 1, 1, 3, 3), 1, 1, 1, 9),
    "dilated_in_time": ((2, 6, 4, 5), (6, 1, 3, 3, 3), 1, 1, (3, 1, 1), 6),
    "two_axes": ((1, 4, 11), (6, 4, 3, 3), 1, 1, (2, 1), 1),
    "one_axis": ((3, 17), (17, 1, 4), (), (), (2,), 17),
    "one_axis_dense": ((1, 6), (5, 6, 3), (), (), (1,), 1),
}


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_streams_of_every_kind(backend, stream, layout):
    frame, w, stride, padding, dilation, groups = stream
    epilogue = Epilogue(bias=True, residual=True)
    plan = plan_for(
        backend, frame, w, stride, padding, dilation, groups, layout=layout, epilogue=epilogue
    )
    assert_stream_is_its_clip(plan, times=2 * plan.geometry.in_size[0] + 1)


@backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation):
    epilogue = Epilogue(True, activation, True)
    plan = plan_for(backend, (1, 6, 5, 5), (6, 1, 3, 3, 3), 1, 1, 1, 6, epilogue=epilogue)
    assert_stream_is_its_clip(plan, times=4)


@backends
@pytest.mark.parametrize("groups", [1, 2, 6], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_slots_keep_their_own_count_of_steps(backend, groups, dilation):
    """Three streams of one batch that began at different times each equal a stream alone."""
    w_shape = (6, 6 // groups, 3, 3, 3)
    one = plan_for(backend, (1, 6, 4, 5), w_shape, 1, 1, (dilation, 1, 1), groups)
    batch = plan_for(backend, (3, 6, 4, 5), w_shape, 1, 1, (dilation, 1, 1), groups)
    # Small integers are exact: PyTorch's order of summation may depend on the batch.
    random = np.random.default_rng(0)
    w = random.integers(-4, 5, w_shape).astype(np.float32)
    frames = random.integers(-4, 5, (3, 1, 6, 12, 4, 5)).astype(np.float32)
    alone = [Stream(one, w) for _ in range(3)]
    together = Stream(batch, w)
    ring = batch.geometry.in_size[0] - 1
    started = (0, 1, 2 + ring)  # frames that each stream saw before they were joined
    for slot, single in enumerate(alone):
        for t in range(started[slot]):
            single.step(frames[slot][:, :, t])
        together.state.array[slot] = single.state.array[0]
        together.steps[slot] = single.steps[0]
    for t in range(4):
        x = np.concatenate([frames[s][:, :, started[s] + t] for s in range(3)])
        got = together.step(x)
        want = [alone[s].step(frames[s][:, :, started[s] + t]) for s in range(3)]
        assert np.array_equal(got, np.concatenate(want))
    assert np.array_equal(together.steps, np.add(started, 4))


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_overwrites_the_oldest_frame_and_nothing_else(backend, layout):
    plan = plan_for(backend, (2, 7, 4, 5), (7, 1, 3, 3, 3), 1, 1, (2, 1, 1), 7, layout=layout)
    stream = Stream(plan, cases.random((7, 1, 3, 3, 3), 0))
    stream.state.array[...] = cases.random(stream.state.array.shape, 1)
    stream.steps[...] = (5, 10)  # the ring has four frames
    before, x = stream.state.array.copy(), cases.random((2, 7, 4, 5), 2)
    stream.step(x)
    want = before
    want[0, :, 5 % 4], want[1, :, 10 % 4] = x
    assert np.array_equal(stream.state.array, want)
    assert stream.steps.tolist() == [6, 11]


@backends
def test_only_the_frames_of_the_taps_are_read(backend):
    """With dilation, the frames between two taps may hold anything."""
    plan = plan_for(backend, (1, 5, 3, 4), (5, 1, 3, 1, 1), 1, 0, (2, 1, 1), 5)
    stream = Stream(plan, np.ones((5, 1, 3, 1, 1), np.float32))
    stream.state.array[:, :, 1::2] = np.nan  # ages 3 and 1 when no frame was seen yet
    x = cases.random((1, 5, 3, 4), 0)
    assert np.array_equal(stream.step(x), x)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_streams_give_no_columns(backend, layout):
    plan = plan_for(backend, (0, 4, 5, 6), (4, 1, 3, 3, 3), 1, 1, 1, 4, layout=layout)
    stream = Stream(plan, cases.random((4, 1, 3, 3, 3), 0))
    assert stream.step(np.empty((0, 4, 5, 6), np.float32)).shape == (0, 4, 5, 6)


@pytest.mark.skipif("numba" not in cases.CPU_BACKENDS, reason="no numba")
@pytest.mark.parametrize("unrolled", [0, 1])
@pytest.mark.parametrize("groups", [1, 4, 20], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numba_streams_have_the_bits_of_the_clip_kernel(layout, groups, unrolled):
    frame, w_shape = (2, 20, 6, 9), (20, 20 // groups, 3, 3, 3)
    plan = plan_for("numba", frame, w_shape, 1, 1, 1, groups, layout=layout)
    plan = replace(plan, config=(("unrolled", unrolled),) if groups == 20 else ())
    frames, w = cases.random((2, 20, 7, 6, 9), 0), cases.random(w_shape, 1)
    stream = Stream(plan, w)
    columns = [stream.step(frames[:, :, t]) for t in range(7)]
    window = replace(plan, family="depthwise" if groups == 20 else "grouped")
    for t in range(2, 7):
        want = cases.execute(window, frames[:, :, t - 2 : t + 1], w)
        assert np.array_equal(columns[t], want[:, :, 0])


def test_zeros_before_the_first_frame_are_the_padding_of_the_definition():
    """The reference's stream against `direct` itself, without this file's own helpers."""
    x, w = cases.random((1, 3, 5, 4, 4), 0), cases.random((2, 3, 3, 3, 3), 1)
    g = Geometry.of(x.shape, w.shape, padding=((2, 0), (1, 1), (1, 1)))
    stream = Stream(plan_for("reference", (1, 3, 4, 4), w.shape, 1, 1, 1, 1, dtype="float64"), w)
    y = np.stack([stream.step(x[:, :, t].astype(np.float64)) for t in range(5)], axis=2)
    np.testing.assert_allclose(y, direct.correlate(x, w, g), rtol=1e-12, atol=1e-12)
