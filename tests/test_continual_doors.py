"""The functions and the state that people use: slots, several frames, forms, refusals."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import cases
import fastconv
from fastconv.backends import available, devices
from fastconv.continual import FORMS, STARTS, State
from fastconv.errors import GeometryError, UnsupportedError
from fastconv.plan import CHANNELS_LAST, LAYOUTS

BACKENDS = [b for b, reason in available().items() if reason is None and "cpu" in devices(b)]
KINDS = ["array", *(["tensor"] if available()["torch"] is None else [])]
backends = pytest.mark.parametrize("backend", BACKENDS)
forms = pytest.mark.parametrize("form", FORMS)
W = (6, 4, 3, 3, 3)
OPTIONS = {"padding": (0, 1, 1)}


def put(array, kind, layout="contiguous"):
    array = cases.laid_out(array, layout)
    if kind == "array":
        return array
    import torch

    return torch.from_numpy(array)


def read(array) -> np.ndarray:
    return array.copy() if isinstance(array, np.ndarray) else array.detach().clone().numpy()


def same(a: State, b: State) -> bool:
    return np.array_equal(read(a.frames), read(b.frames)) and read(a.steps).tolist() == (
        read(b.steps).tolist()
    )


def stream(kind, times=7, batch=2, layout="contiguous"):
    x = cases.random((batch, 4, times, 5, 6), 0)
    return put(x, kind, layout), put(cases.random(W, 1), kind)


@pytest.mark.parametrize("kind", KINDS)
@backends
@forms
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("chunks", [(7,), (3, 0, 4)])
def test_frames_in_chunks_are_frames_one_by_one(kind, backend, form, start, stride, chunks):
    if kind == "array" and backend == "triton":
        pytest.skip("Triton takes tensors")
    x, w = stream(kind)
    how = {"padding": (0, 1, 1), "stride": (stride, 1, 2)}
    single, several = (
        fastconv.continual_state(x[:, :, 0], w, form=form, start=start, **how) for _ in range(2)
    )
    want = []
    for t in range(7):
        has_column = read(single.emits).all()
        y = fastconv.continual_step(x[:, :, t], single, w, backend=backend, **how)
        assert has_column or not read(y).any()
        want += [read(y)] if has_column else []
    got, begin = [], 0
    for size in chunks:
        part = x[:, :, begin : begin + size]
        got.append(read(fastconv.continual_steps(part, several, w, backend=backend, **how)))
        begin += size
    assert np.array_equal(np.concatenate(got, axis=2), np.stack(want, axis=2))
    assert same(single, several)


@pytest.mark.parametrize("kind", KINDS)
@forms
def test_slots_are_saved_restored_copied_and_reset(kind, form):
    x, w = stream(kind, batch=3)
    state = fastconv.continual_state(x[:, :, 0], w, form=form, **OPTIONS)
    fastconv.continual_steps(x[:, :, :4], state, w, active=[0, 2], **OPTIONS)
    assert read(state.steps).tolist() == [4, 0, 4]
    saved, whole = state.save(2), state.save()
    state.copy(2, 1)
    assert read(state.steps).tolist() == [4, 4, 4]
    assert np.array_equal(read(state.frames)[1], read(state.frames)[2])
    state.reset(2)
    assert read(state.steps).tolist() == [4, 4, 0]
    assert not read(state.frames)[2].any()
    state.restore(saved, 2)
    assert np.array_equal(read(state.frames)[2], read(whole.frames)[2])
    state.restore(saved, -1)
    state.restore(whole)
    assert same(state, whole)
    state.reset()
    assert not read(state.frames).any()
    assert not read(state.steps).any()
    with pytest.raises(GeometryError, match="restore: the state has form"):
        state.restore(whole, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@forms
def test_a_state_survives_saving(kind, form, layout, tmp_path):
    x, w = stream(kind, layout=layout)
    state = fastconv.continual_state(x[:, :, 0], w, form=form, **OPTIONS)
    fastconv.continual_steps(x[:, :, :4], state, w, **OPTIONS)
    loaded = pickle.loads(pickle.dumps(state))
    assert same(state, loaded)
    y, again = (fastconv.continual_step(x[:, :, 4], s, w, **OPTIONS) for s in (state, loaded))
    assert np.array_equal(read(y), read(again))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_state_says_of_its_streams(kind):
    x, w = stream(kind)
    how = {"stride": (2, 1, 1), "padding": (0, 1, 1), "dilation": (2, 1, 1)}
    state = fastconv.continual_state(x[:, :, 0], w, (2, 1, 1), stride=2)
    emitted, ready = [], []
    for t in range(7):
        emitted.append(read(state.emits).tolist())
        fastconv.continual_step(x[:, :, t], state, w, active=[1], **how)
        ready.append(read(state.ready).tolist())
    # L = 4: columns at times 0, 2, 4, ..; the fifth frame completes a receptive field.
    assert emitted == [[True, t % 2 == 0] for t in range(7)]
    assert ready == [[False, t >= 4] for t in range(7)]
    assert state.nbytes == 2 * 4 * 4 * 5 * 6 * 4 + 2 * 8


@pytest.mark.parametrize("kind", KINDS)
def test_active_streams_by_mask_and_by_number(kind):
    x, w = stream(kind, batch=4)
    states = [fastconv.continual_state(x[:, :, 0], w, **OPTIONS) for _ in range(3)]
    numbers = np.array([2, 0])
    mask = np.array([True, False, True, False])
    for state, active in zip(
        states, ([0, 2], put(numbers, kind, "contiguous"), put(mask, kind)), strict=True
    ):
        fastconv.continual_steps(x, state, w, active=active, **OPTIONS)
    assert all(same(states[0], s) for s in states[1:])


def test_the_form_with_fewer_bytes():
    x, wide, narrow = (np.zeros(s, np.float32) for s in ((1, 4, 8, 8), (9, 4, 3, 1, 1), W))
    auto = [
        fastconv.continual_state(x, w, stride=(1, s, s), form="auto").form
        for w, s in ((wide, 1), (wide, 2), (narrow, 1), (narrow, 2))
    ]
    # Maps of 256 floats against 9 * 64, 9 * 16, 6 * 36, 6 * 9
    assert auto == ["ring", "sum", "sum", "sum"]
    small = fastconv.continual_state(x, wide, stride=(1, 2, 2), form="sum")
    assert small.frames.shape == (1, 9, 2, 4, 4)
    double = fastconv.continual_state(x.astype(np.float64), wide.astype(np.float64), form="sum")
    assert double.frames.dtype == np.float64


@pytest.mark.skipif("tensor" not in KINDS, reason="no PyTorch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_half_precision_are_kept_in_float32(dtype):
    import torch

    x, w = stream("tensor")
    half = [t.to(getattr(torch, dtype)) for t in (x, w)]
    state = fastconv.continual_state(half[0][:, :, 0], half[1], form="sum", **OPTIONS)
    assert state.frames.dtype == torch.float32
    y = fastconv.continual_steps(half[0], state, half[1], **OPTIONS)
    assert y.dtype == half[0].dtype
    exact = torch.nn.functional.conv3d(
        torch.nn.functional.pad(half[0].double(), (0, 0, 0, 0, 2, 0)),
        half[1].double(),
        padding=(0, 1, 1),
    )
    # Products of halves are exact in float32, so that the result is rounded once: half a unit.
    unit = torch.finfo(half[0].dtype).eps
    assert ((y.double() - exact).abs() <= unit / 2 * exact.abs() + 1e-4).all()


REFUSALS = {
    "mask of another length": (
        {"active": np.ones(3, bool)},
        GeometryError,
        "continual_step: active must have shape (2,), got (3,)",
    ),
    "slot that does not exist": (
        {"active": [0, 2]},
        GeometryError,
        "continual_step: active slots must be in 0 .. 1, got [0, 2]",
    ),
    "another stride": (
        {"stride": (2, 1, 1)},
        GeometryError,
        "continual_step: the state is for temporal stride 1, got 2",
    ),
    "another activation": (
        {"activation": "tanh"},
        UnsupportedError,
        "unknown activation 'tanh'. Known: none, relu, silu, hardswish, sigmoid",
    ),
    "no workspace": (
        {"max_workspace_bytes": 16, "backend": "numba"},
        UnsupportedError,
        "bytes of workspace, allowed are 16",
    ),
}


@forms
@pytest.mark.parametrize(("options", "kind", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refused_step_leaves_the_state_alone(form, options, kind, message):
    if options.get("backend", "reference") not in BACKENDS:
        pytest.skip("no numba")
    x, w = stream("array")
    state = fastconv.continual_state(x[:, :, 0], w, form=form, **OPTIONS)
    fastconv.continual_step(x[:, :, 0], state, w, **OPTIONS)
    before = state.save()
    with pytest.raises(kind) as error:
        fastconv.continual_step(x[:, :, 1], state, w, **OPTIONS | options)
    assert message in str(error.value)
    assert same(state, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "heap"}, "continual_state: unknown form 'heap'. Known: auto, ring, sum"),
        ({"start": "noise"}, "continual_state: unknown start 'noise'. Known: zeros, replicate"),
    ],
)
def test_states_that_do_not_exist(options, message):
    x, w = stream("array")
    with pytest.raises(UnsupportedError) as error:
        fastconv.continual_state(x[:, :, 0], w, **options)
    assert str(error.value) == message


def test_chunks_of_streams_at_different_phases_are_refused():
    x, w = stream("array")
    how = {"stride": (2, 1, 1), "padding": (0, 1, 1)}
    state = fastconv.continual_state(x[:, :, 0], w, stride=2)
    fastconv.continual_step(x[:, :, 0], state, w, active=[0], **how)
    message = r"continual_steps: with a temporal stride .* same phase of it, got \[0, 1\]"
    with pytest.raises(GeometryError, match=message):
        fastconv.continual_steps(x, state, w, **how)
    for slot in (0, 1):
        y = fastconv.continual_steps(x[:, :, :4], state, w, active=[slot], **how)
        assert y.shape == (2, 6, 2, 5, 6)


@pytest.mark.parametrize("kind", KINDS)
@forms
def test_looking_ahead_several_frames(kind, form):
    x, w = stream(kind)
    state = fastconv.continual_state(x[:, :, 0], w, form=form, **OPTIONS)
    fastconv.continual_step(x[:, :, 0], state, w, **OPTIONS)
    before = state.save()
    ahead = fastconv.continual_steps(x[:, :, 1:], state, w, update_state=False, **OPTIONS)
    assert same(state, before)
    got = fastconv.continual_steps(x[:, :, 1:], state, w, **OPTIONS)
    assert np.array_equal(read(ahead), read(got))


@forms
def test_the_functional_twin_of_arrays(form):
    x, w = stream("array", layout=CHANNELS_LAST)
    state = fastconv.continual_state(x[:, :, 0], w, form=form, **OPTIONS)
    before = state.save()
    y, after = fastconv.continual_step_functional(x[:, :, 0], state, w, **OPTIONS)
    assert same(state, before)
    assert np.array_equal(fastconv.continual_step(x[:, :, 0], state, w, **OPTIONS), y)
    assert same(state, after)
