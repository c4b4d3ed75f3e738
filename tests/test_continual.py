"""Continual convolution on every backend: a stream equals its clip, and the state is the ring."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import cases
import tolerance
from fastconv.backends import interpreted, kernel
from fastconv.continual import FORMS, STARTS, state_shape
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan
from fastconv.reference import direct
from fastconv.transforms import transform

backends = pytest.mark.parametrize("backend", cases.CPU_BACKENDS)
# Where an interpreter is slow, half of the pairs.
memories = pytest.mark.parametrize(
    ("backend", "layout", "form"),
    [
        (backend, layout, form)
        for backend in cases.CPU_BACKENDS
        for layout in LAYOUTS
        for form in FORMS
        if backend != "triton" or (layout == CHANNELS_LAST) == (form == "ring")
    ],
)


def plan_for(
    backend, frame_shape, w_shape, stride=1, padding=0, dilation=1, groups=1, *,
    dtype="float32", layout=CHANNELS_LAST, epilogue=None, form="ring", start="zeros",
) -> Plan:  # fmt: skip
    """frame_shape (N, C, *frame); stride, padding and dilation of the frame, an int or per axis.

    A stride or dilation with one more entry begins with that of time.
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
    plan = Plan("continual", backend, geometry, dtype, epilogue or Epilogue(), layout)
    return in_form(plan, form, start)


def in_form(plan: Plan, form: str, start: str = "zeros") -> Plan:
    """The plan with a form of memory and with what stands in front of a stream."""
    config = [("sum", 1)] * (form == "sum") + [("replicate", 1)] * (start == "replicate")
    return replace(plan, config=tuple(config))


class Stream:
    """A backend's continual convolution with its state, every array fenced."""

    def __init__(self, plan: Plan, w, bias=None):
        if plan.backend == "triton":
            plan = replace(plan, device="cpu" if interpreted() else "cuda")
        self.plan = plan
        self.module = kernel("continual", plan.backend)
        reason = self.module.supports(plan.geometry, plan.dtype, plan.epilogue)
        assert reason is None, reason
        with cases.isa_of(plan):
            self.packed = self.module.prepack(w, plan)
        self.bias = cases.moved(bias, plan)
        form = "sum" if plan.options.get("sum") else "ring"
        shape = state_shape(plan.geometry, form)
        self.state = cases.Fenced(shape, plan.dtype, plan.layout)
        self.state.array[...] = 0
        self.steps = np.zeros(shape[0], np.int64)

    def step(self, x, residual=None, active=None, update=True, into=None) -> np.ndarray:
        """Feed x (N, C, *frame); return the output column (N, K, *out_frame).

        into  what y holds before, NaN by default
        """
        plan = self.plan
        n, k, _, *out = plan.geometry.y_shape
        y = cases.Fenced((n, k, *out), plan.dtype, plan.layout)
        if into is not None:
            y.array[...] = into
        with cases.isa_of(plan):
            workspace = cases.Fenced((self.module.workspace_size(plan),), plan.dtype)
        x, residual = (a if a is None else cases.laid_out(a, plan.layout) for a in (x, residual))
        before = x.copy()
        given = [cases.moved(a, plan) for a in (x, residual, self.steps, active)]
        with self.state.on(plan) as state, y.on(plan) as column, workspace.on(plan) as scratch:
            self.module.run(
                plan, given[0], self.packed, self.bias, given[1], state, given[2], column, scratch,
                given[3], update,
            )  # fmt: skip
        if given[2] is not self.steps:
            self.steps[...] = given[2].cpu().numpy()
        for fenced in (y, workspace, self.state):
            fenced.check()
        assert np.array_equal(x, before, equal_nan=True), "the frame was written"
        return y.array


def whole_clip(plan: Plan, frames: np.ndarray) -> tuple[Plan, np.ndarray]:
    """A clip (N, C, T, *frame) whose columns are those of the steps, with what is in front."""
    g = plan.geometry
    ring, step = g.in_size[0] - 1, g.stride[0]
    front = ring - ring % step  # from the first column on
    padding = (front, 0)
    if plan.options.get("replicate"):
        first = np.repeat(frames[:, :, :1], front, axis=2)
        frames, padding = np.concatenate([first, frames], axis=2), (0, 0)
    clip = replace(g, in_size=(frames.shape[2], *g.in_size[1:]), padding=(padding, *g.padding[1:]))
    return replace(plan, family="grouped", geometry=clip, config=()), frames


def assert_stream_is_its_clip(plan: Plan, times: int, seed: int = 0) -> None:
    g = plan.geometry
    ring, step = g.in_size[0] - 1, g.stride[0]
    times = max(times, ring % step + 1)  # one column at least
    frames = cases.random((g.batch, g.in_channels, times, *g.in_size[1:]), seed, plan.dtype)
    clip, stood = whole_clip(plan, frames)
    _, w, bias, residual = cases.arrays_for(clip, seed)
    stream = Stream(plan, w, bias)
    columns = []
    for t in range(times):
        has_column, old = (t - ring) % step == 0, cases.random((), t)
        added = (
            None if residual is None else residual[:, :, min(len(columns), residual.shape[2] - 1)]
        )
        y = stream.step(frames[:, :, t], added, into=old)
        if has_column:
            columns.append(y)
        else:
            assert (y == old.astype(plan.dtype)).all(), "y was written without a column"
    y = np.stack(columns, axis=2)
    tolerance.assert_conv_close(y, clip, stood, w, bias, residual)
    assert np.array_equal(stream.steps, np.full(g.batch, times))
    for t in range(max(0, times - ring), times) if not plan.options.get("sum") else ():
        assert np.array_equal(stream.state.array[:, :, t % ring], frames[:, :, t])


@st.composite
def windows(draw, families=("depthwise", "grouped", "winograd"), dilated=True):
    """A geometry as `continual` gets it: no padding along the first axis, one column."""
    g = draw(cases.geometries(family=draw(st.sampled_from(families))))
    dilation = (draw(st.integers(1, 3)) if dilated else 1, *g.dilation[1:])
    return replace(
        g,
        in_size=(dilation[0] * (g.kernel[0] - 1) + 1, *g.in_size[1:]),
        stride=(draw(st.integers(1, 3)), *g.stride[1:]),
        padding=((0, 0), *g.padding[1:]),
        dilation=dilation,
    )


forms = st.sampled_from(FORMS)
starts = st.sampled_from(STARTS)


@backends
@given(
    windows(), cases.epilogues(), cases.layouts(), cases.dtypes(), forms, starts, st.integers(1, 6)
)
def test_a_stream_is_the_clip_behind_what_stands_in_front(
    backend, geometry, epilogue, layout, dtype, form, start, times
):
    dtype = "float32" if backend in cases.FLOAT32_ONLY else dtype
    plan = Plan("continual", backend, geometry, dtype, epilogue, layout)
    assert_stream_is_its_clip(in_form(plan, form, start), times)


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
    "rows_without_state": ((2, 5, 4, 9), (5, 1, 1, 1, 3), 1, (0, 1), 1, 5),
    "columns_without_state": ((2, 5, 4, 9), (5, 1, 1, 3, 1), 1, (1, 0), 1, 5),
    "lines_without_state": ((3, 5, 9), (5, 1, 1, 3), 1, 2, (1, 2), 5),
    "dilated_in_time": ((2, 6, 4, 5), (6, 1, 3, 3, 3), 1, 1, (3, 1, 1), 6),
    "two_axes": ((1, 4, 11), (6, 4, 3, 3), 1, 1, (2, 1), 1),
    "strided_in_time": ((2, 6, 4, 5), (9, 6, 3, 3, 3), (2, 1, 2), 1, 1, 1),
    "strided_in_time_depthwise": ((2, 6, 4, 5), (6, 1, 4, 3, 3), (3, 1, 1), 1, (2, 1, 1), 6),
    "one_axis": ((3, 17), (17, 1, 4), (), (), (2,), 17),
    "one_axis_dense": ((1, 6), (5, 6, 3), (), (), (1,), 1),
}


TOO_LARGE_TO_INTERPRET = [
    STREAMS[name] for name in ("dense", "dense_strided", "grouped", "strided_in_time")
]


@memories
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_streams_of_every_kind(backend, stream, layout, form):
    if backend == "triton" and stream in TOO_LARGE_TO_INTERPRET and interpreted():
        pytest.skip("too large for an interpreter; its kinds are in test_triton_continual")
    frame, w, stride, padding, dilation, groups = stream
    epilogue = Epilogue(bias=True, residual=True)
    plan = plan_for(
        backend, frame, w, stride, padding, dilation, groups, layout=layout, epilogue=epilogue,
        form=form,
    )  # fmt: skip
    span = plan.geometry.in_size[0]
    assert_stream_is_its_clip(plan, times=span + 1 if backend == "triton" else 2 * span + 1)


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


@memories
@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_streams_that_are_not_active_are_left_alone(backend, layout, groups, form, start, stride):
    """Whatever their frame holds; the others go on as if all were."""
    w_shape, frame = (6, 6 // groups, 3, 3, 3), (4, 6, 4, 5)
    plan = plan_for(
        backend, frame, w_shape, (stride, 1, 1), 1, 1, groups, layout=layout, form=form,
        start=start, epilogue=Epilogue(True, "relu", True),
    )  # fmt: skip
    w, bias = cases.random(w_shape, 0), cases.random((6,), 1)
    stalling, steady = Stream(plan, w, bias), Stream(plan, w, bias)
    active = np.array([True, False, False, True])
    for t in range(3):
        x, r = cases.random(frame, 10 + t), cases.random(frame, 20 + t)
        want = steady.step(x, r, into=7.0)
        state = stalling.state.array.copy()
        x[~active] = np.nan
        got = stalling.step(x, r, active, into=7.0)
        assert np.array_equal(got[active], want[active])
        assert (got[~active] == 7.0).all()
        assert np.array_equal(stalling.state.array[~active], state[~active])
        assert np.array_equal(stalling.state.array[active], steady.state.array[active])
    assert stalling.steps.tolist() == [3, 0, 0, 3]


@memories
@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
@pytest.mark.parametrize("start", STARTS)
def test_a_look_ahead_is_the_next_column_and_writes_no_state(backend, layout, groups, form, start):
    w_shape, frame = (6, 6 // groups, 3, 3, 3), (2, 6, 4, 5)
    plan = plan_for(
        backend, frame, w_shape, 1, 1, (2, 1, 1), groups, layout=layout, form=form, start=start,
    )  # fmt: skip
    stream = Stream(plan, cases.random(w_shape, 0))
    for t in range(3):
        x = cases.random(frame, t + 1)
        state, steps = stream.state.array.copy(), stream.steps.copy()
        ahead = stream.step(x, update=False)
        assert np.array_equal(stream.state.array, state)
        assert np.array_equal(stream.steps, steps)
        assert np.array_equal(stream.step(x), ahead)


@backends
@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
@pytest.mark.parametrize("stride", [1, 2])
def test_sums_forget_what_a_slot_held(backend, groups, stride):
    """The first tap to reach a column overwrites: nothing is older than L frames."""
    w_shape, frame = (6, 6 // groups, 3, 3, 3), (1, 6, 4, 5)
    plan = plan_for(backend, frame, w_shape, (stride, 1, 1), 1, (2, 1, 1), groups, form="sum")
    old, new = (Stream(plan, cases.random(w_shape, 0)) for _ in range(2))
    old.state.array[...] = np.nan
    ring = plan.geometry.in_size[0] - 1
    for t in range(2 * ring + 2):
        x = cases.random(frame, t + 1)
        got, want = old.step(x, into=0.0), new.step(x, into=0.0)
        if t >= ring:
            assert np.array_equal(got, want)


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


DIRECT = [b for b in cases.CPU_BACKENDS if b in ("numba", "c")]


@pytest.mark.parametrize("backend", DIRECT)
@pytest.mark.parametrize("looped", [0, 1])
@pytest.mark.parametrize("groups", [1, 4, 20], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streams_have_the_bits_of_the_clip_kernel(backend, layout, groups, looped):
    frame, w_shape = (2, 20, 6, 9), (20, 20 // groups, 3, 3, 3)
    epilogue = Epilogue(True, "silu")
    plan = plan_for(backend, frame, w_shape, 1, 1, 1, groups, layout=layout, epilogue=epilogue)
    tuned = ("looped", looped) if backend == "c" else ("unrolled", 1 - looped)
    plan = replace(plan, config=(tuned,) if groups == 20 else ())
    frames, w = cases.random((2, 20, 7, 6, 9), 0), cases.random(w_shape, 1)
    bias = cases.random((20,), 2)
    stream = Stream(plan, w, bias)
    columns = [stream.step(frames[:, :, t]) for t in range(7)]
    clip = replace(plan.geometry, in_size=(7, 6, 9))
    family = "depthwise" if groups == 20 else "grouped"
    want = cases.execute(replace(plan, family=family, geometry=clip), frames, w, bias)
    assert np.array_equal(np.stack(columns[2:], axis=2), want)


in_c = pytest.mark.parametrize("backend", [b for b in cases.CPU_BACKENDS if b == "c"])


def by_tiles(plan: Plan, m: int) -> Plan:
    """The plan with F(m, r) on the axes of a frame."""
    taps = [-(-k // s) for k, s in zip(plan.geometry.kernel, plan.geometry.stride, strict=True)]
    ms = (1, *(m for _ in taps[1:]))
    return replace(plan, transforms=tuple(map(transform, ms, taps)))


@in_c
@given(
    windows(("winograd",), dilated=False), cases.epilogues(), cases.layouts(), forms, starts,
    st.sampled_from((2, 3, 4, 6)), st.integers(1, 5),
)  # fmt: skip
def test_streams_by_minimal_filtering(backend, geometry, epilogue, layout, form, start, m, times):
    plan = by_tiles(Plan("continual", backend, geometry, "float32", epilogue, layout), m)
    assume(kernel("continual", backend).refuses(plan) is None)
    assert_stream_is_its_clip(in_form(plan, form, start), times)


@in_c
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("m", [2, 4])
def test_streams_by_minimal_filtering_have_the_bits_of_its_clip(backend, layout, stride, m):
    """Of F(1 x m x m), whatever the number of frames and of streams, and which have a column."""
    frame, w_shape = (3, 20, 6, 9), (37, 20, 3, 3, 3)
    plan = plan_for(
        backend, frame, w_shape, (stride, 1, 1), 1, layout=layout, epilogue=Epilogue(True, "silu")
    )
    plan = by_tiles(plan, m)
    frames, w = cases.random((*frame[:2], 9, *frame[2:]), 0), cases.random(w_shape, 1)
    bias = cases.random((37,), 2)
    stream, active = Stream(plan, w, bias), np.array([True, False, True])
    columns = [stream.step(frames[:, :, t], active=active) for t in range(9)][2::stride]
    clip = replace(plan.geometry, in_size=(9, 6, 9))
    want = cases.execute(replace(plan, family="winograd", geometry=clip), frames, w, bias)
    assert np.array_equal(np.stack(columns, axis=2)[active], want[active])


def test_refusals_of_tiles_say_why():
    module = pytest.importorskip("fastconv.c_kernels.continual", exc_type=ImportError)

    def reason(w, m=4, **options):
        plan = by_tiles(plan_for("c", (1, 6, 9, 9), w, **options), m)
        return module.refuses(plan)

    assert reason((8, 6, 3, 3, 3)) is None
    assert "dilation 1" in reason((8, 6, 3, 3, 3), dilation=(2, 1, 1))
    assert "one group" in reason((6, 3, 3, 3, 3), groups=2)
    assert reason((8, 6, 3, 1, 1)) == "no axis of a frame has a transform"
    assert reason((8, 6, 3, 3, 3), m=1) == "no axis of a frame has a transform"
    assert "is not compiled" in reason((8, 6, 3, 3, 3), m=8)
    plan = plan_for("c", (1, 6, 9, 9), (8, 6, 3, 3, 3))
    plan = replace(plan, transforms=(transform(2, 3),) * 3)
    assert module.refuses(plan) == "a stream has one column at a time, not 2"


# What the C backend's two forms of direct convolution, whose sums differ, are both near to.
FRAMES = [
    # frame, kernel, stride, padding, dilation
    ((7, 7), (3, 3, 3), 1, 1, 1),
    ((7, 7), (2, 3, 3), 1, 1, (2, 1, 1)),
    ((7, 7), (3, 1, 1), 1, 0, 1),
    ((14, 14), (5, 1, 1), (2, 1, 1), 0, 1),
    ((14, 14), (3, 3, 3), (2, 2, 2), 1, 1),
    ((1, 9), (3, 1, 3), 1, (0, 1), 1),
    ((14,), (3, 3), 1, 1, (2, 1)),
    ((7,), (4, 1), (3, 1), 0, 1),
    ((), (3,), 1, (), 1),
    ((), (20,), 1, (), 1),
]
CHANNELS = [
    # groups, then channels of one
    (1, 3, 24), (1, 8, 12), (1, 16, 4), (1, 24, 16), (1, 64, 8), (1, 64, 24),
    (4, 2, 2), (2, 4, 4), (2, 8, 8), (4, 6, 12), (2, 12, 12), (4, 16, 16), (2, 24, 24),
]  # fmt: skip


@pytest.mark.parametrize("backend", DIRECT)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("case", FRAMES, ids=str)
def test_bits_do_not_depend_on_length_and_batch(backend, channels, case):
    """A stream alone, and clips of several batches and lengths: every column has the same bits."""
    (groups, c, k), (frame, size, stride, padding, dilation) = channels, case
    plan = plan_for(
        backend, (1, groups * c, *frame), (groups * k, c, *size), stride, padding, dilation, groups
    )
    g = plan.geometry
    times = g.span[0] + 6
    frames, w = cases.random((3, groups * c, times, *frame), 0), cases.random(g.w_shape, 1)
    stream = Stream(plan, w)
    columns = [stream.step(frames[:1, :, t]) for t in range(times)]
    want = np.stack(columns[g.span[0] - 1 :: g.stride[0]], axis=2)
    for batch, length in ((1, times), (3, times), (1, g.span[0])):
        clip = replace(plan, family="grouped", geometry=replace(
            g, batch=batch, in_size=(length, *frame)
        ))  # fmt: skip
        y = cases.execute(clip, frames[:batch, :, :length], w)
        assert np.array_equal(y[:1], want[:, :, : y.shape[2]]), (batch, length)


@in_c
@pytest.mark.parametrize("groups", [1, 5], ids=["dense", "depthwise"])
def test_a_hundred_thousand_steps_do_not_drift(backend, groups):
    """In the end a stream of sums has the bits of one that began a receptive field before."""
    w_shape, frame = (5, 5 // groups, 3, 1, 1), (1, 5, 1, 2)
    plan = plan_for(backend, frame, w_shape, 1, 0, 1, groups, form="sum")
    w = cases.random(w_shape, 0)
    long, late = Stream(plan, w), Stream(plan, w)
    frames, y = cases.random((64, *frame), 1), np.empty((1, 5, 1, 2), np.float32)
    laid = [cases.laid_out(x, CHANNELS_LAST) for x in frames]
    y = cases.laid_out(y, CHANNELS_LAST)
    workspace = np.empty(long.module.workspace_size(plan), np.float32)
    for t in range(100_000):
        long.module.run(
            plan, laid[t % 64], long.packed, None, None, long.state.array, long.steps, y, workspace
        )
    for t in range(100_000 - 3, 100_000):
        want = late.step(frames[t % 64])
    assert np.array_equal(y, want)


def test_zeros_before_the_first_frame_are_the_padding_of_the_definition():
    """The reference's stream against `direct` itself, without this file's own helpers."""
    x, w = cases.random((1, 3, 5, 4, 4), 0), cases.random((2, 3, 3, 3, 3), 1)
    g = Geometry.of(x.shape, w.shape, padding=((2, 0), (1, 1), (1, 1)))
    stream = Stream(plan_for("reference", (1, 3, 4, 4), w.shape, 1, 1, 1, 1, dtype="float64"), w)
    y = np.stack([stream.step(x[:, :, t].astype(np.float64)) for t in range(5)], axis=2)
    np.testing.assert_allclose(y, direct.correlate(x, w, g), rtol=1e-12, atol=1e-12)
