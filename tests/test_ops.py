"""The functions on NumPy arrays: PyTorch's meaning, exact messages, refusals write nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastconv
from cases import geometries, laid_out, random
from fastconv import continual, ops
from fastconv.errors import BackendError, GeometryError, UnsupportedError
from fastconv.plan import LAYOUTS
from fastconv.reference import direct

CONV = {1: fastconv.conv1d, 2: fastconv.conv2d, 3: fastconv.conv3d}
X, W = (2, 4, 5, 6, 7), (6, 4, 3, 3, 3)


def close(got, want):
    """Small sums in float32: a few units in the last place of the largest value."""
    assert got.shape == want.shape
    assert np.allclose(got, want, rtol=0, atol=1e-5 * max(1.0, np.abs(want).max(initial=0)))


@given(geometries(family="grouped"), st.sampled_from(LAYOUTS))
def test_conv_is_the_definition_in_the_layout_of_the_input(g, layout):
    x, w = random(g.x_shape, 1), random(g.w_shape, 2)
    y = CONV[g.n](
        laid_out(x, layout), w, None, g.stride, g.padding, g.dilation, g.groups, backend="reference"
    )
    close(y, direct.correlate(x, w, g))
    assert y.dtype == np.float32
    assert np.shares_memory(ops.dense(y, ops.layout_of(laid_out(x, layout))), y) or not y.size


def test_unbatched_input_gives_unbatched_result():
    x, w = random(X[1:], 0), random(W, 1)
    y = fastconv.conv3d(x, w, backend="reference", residual=np.ones((6, 3, 4, 5), np.float32))
    assert y.shape == (6, 3, 4, 5)
    close(y, fastconv.conv3d(x[None], w, backend="reference")[0] + 1)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[:, ::2],
        lambda a: a[..., ::-1],
        lambda a: a.swapaxes(3, 4),
        lambda a: a[:, :, 1:, 1:, 1:],
    ],
)
@pytest.mark.parametrize(
    "backend", [b for b in ("reference", "numba") if fastconv.backends.available()[b] is None]
)
def test_views_with_gaps_are_read_as_they_are(view, backend):
    x = view(random((2, 8, 6, 7, 8), 0))
    w = random((3, x.shape[1], 3, 3, 3), 1)
    close(
        fastconv.conv3d(x, w, padding=1, backend=backend),
        fastconv.conv3d(x.copy(), w, padding=1, backend="reference"),
    )


def test_epilogue_order_is_bias_residual_activation():
    x, w, b = random(X, 0), random(W, 1), random((6,), 2)
    plain = fastconv.conv3d(x, w, backend="reference")
    residual = random(plain.shape, 3)
    got = fastconv.conv3d(x, w, b, residual=residual, activation="relu", backend="reference")
    close(got, np.maximum(plain + b.reshape(-1, 1, 1, 1) + residual, 0))


ARRAYS = {"x": random(X, 0), "w": random(W, 1)}
REFUSALS = [
    (
        dict(x=random(X, 0).astype(np.int64)),
        {},
        UnsupportedError,
        "conv3d: dtype int64 is not supported; use one of float32, float64",
    ),
    (
        dict(x=random(X, 0).astype(np.complex64)),
        {},
        UnsupportedError,
        "conv3d: dtype complex64 is not supported; use one of float32, float64",
    ),
    (
        dict(w=random(W, 0, "float64")),
        {},
        UnsupportedError,
        "conv3d: input has dtype float32, but weight has float64",
    ),
    (
        dict(x=[1.0, 2.0]),
        {},
        UnsupportedError,
        "conv3d: input must be a NumPy array or a PyTorch tensor, got list",
    ),
    (
        dict(w=random((6, 4, 3, 3), 0)),
        {},
        GeometryError,
        "conv3d: weight must have 5 dimensions, got shape (6, 4, 3, 3)",
    ),
    ({}, dict(bias=random((4,), 0)), GeometryError, "conv3d: bias must have shape (6,), got (4,)"),
    (
        {},
        dict(residual=random((1,), 0)),
        GeometryError,
        "conv3d: residual must have the result's shape (2, 6, 3, 4, 5), got (1,)",
    ),
    (
        {},
        dict(activation="gelu"),
        UnsupportedError,
        "unknown activation 'gelu'. Known: none, relu, silu, hardswish, sigmoid",
    ),
    (
        {},
        dict(algorithm="fft"),
        UnsupportedError,
        "unknown algorithm 'fft'. Known: auto, direct, winograd, depthwise, grouped",
    ),
    (
        {},
        dict(backend="cudnn"),
        BackendError,
        "unknown backend 'cudnn'. Known: reference, numba, c, triton, torch",
    ),
    (
        {},
        dict(algorithm="depthwise", backend="reference"),
        UnsupportedError,
        "no plan for algorithm 'depthwise' on backend 'reference': "
        "reference depthwise: not depthwise: 1 groups for 4 input channels",
    ),
    (
        {},
        dict(algorithm="winograd", backend="reference", stride=3),
        UnsupportedError,
        "no plan for algorithm 'winograd' on backend 'reference': "
        "reference winograd: no axis of kernel (3, 3, 3) has more than one tap per phase",
    ),
]


@pytest.mark.parametrize(("arrays", "options", "kind", "message"), REFUSALS)
def test_message_of_every_refusal(arrays, options, kind, message):
    given_arrays = {**ARRAYS, **arrays}
    with pytest.raises(kind) as error:
        fastconv.conv3d(given_arrays["x"], given_arrays["w"], **options)
    assert str(error.value) == message


def test_empty_batch():
    y = fastconv.conv3d(np.empty((0, 4, 5, 6, 7), np.float32), random(W, 1))
    assert y.shape == (0, 6, 3, 4, 5)


BLOCK = {
    "temporal_weight": (8, 4, 3, 1, 1),
    "depthwise_weight": (8, 1, 1, 3, 3),
    "pointwise_weight": (6, 8, 1, 1, 1),
}


@pytest.mark.parametrize("stride", [1, (1, 2, 2), 2])
def test_separable_block_is_three_convolutions(stride):
    x = random((1, 4, 6, 9, 8), 0)
    w = {name: random(shape, i) for i, (name, shape) in enumerate(BLOCK.items())}
    biases = [random((k,), 5 + k) for k in (8, 8, 6)]
    st, sh, sw = (stride,) * 3 if isinstance(stride, int) else stride
    z = fastconv.conv3d(
        x,
        w["temporal_weight"],
        biases[0],
        (st, 1, 1),
        (1, 0, 0),
        activation="relu",
        backend="reference",
    )
    z = fastconv.conv3d(
        z, w["depthwise_weight"], biases[1], (1, sh, sw), (0, 1, 1), groups=8, backend="reference"
    )
    z = fastconv.conv3d(z, w["pointwise_weight"], biases[2], activation="silu", backend="reference")
    got = fastconv.separable_block(
        x, **w, biases=biases, activations=("relu", "none", "silu"), stride=stride
    )
    close(got, z)


def test_separable_block_refuses():
    x = random((1, 4, 6, 9, 8), 0)
    w = {name: random(shape, i) for i, (name, shape) in enumerate(BLOCK.items())}
    with pytest.raises(
        GeometryError, match="needs three biases and three activations, got 2 and 3"
    ):
        fastconv.separable_block(x, **w, biases=(None, None))
    with pytest.raises(
        GeometryError, match=r"separable_block: bias must have shape \(8,\), got \(4,\)"
    ):
        fastconv.separable_block(x, **w, biases=(random((4,), 0), None, None))


def test_continual_step_is_the_convolution_over_the_stream():
    stream, w, b = random((2, 4, 9, 6, 7), 0), random(W, 1), random((6,), 2)
    state = fastconv.continual_state(stream[:, :, 0], w, dilation=2)
    padded = np.concatenate([np.zeros((2, 4, 4, 6, 7), np.float32), stream], axis=2)
    want = fastconv.conv3d(padded, w, b, padding=(0, 1, 1), dilation=(2, 1, 1), backend="reference")
    for t in range(stream.shape[2]):
        y = fastconv.continual_step(
            stream[:, :, t], state, w, b, padding=(0, 1, 1), dilation=(2, 1, 1)
        )
        close(y, want[:, :, t])
    assert state.steps.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            dict(padding=1),
            GeometryError,
            "continual_step: temporal padding must be 0, got 1; "
            "the state stands in front of the stream",
        ),
        (
            dict(stride=(2, 1, 1)),
            GeometryError,
            "continual_step: the state is for temporal stride 1, got 2",
        ),
        (
            dict(dilation=(2, 1, 1)),
            GeometryError,
            "continual_step: state frames must have shape (2, 4, 4, 6, 7), got (2, 4, 2, 6, 7)",
        ),
        (
            dict(bias=random((1,), 0)),
            GeometryError,
            "continual_step: bias must have shape (6,), got (1,)",
        ),
    ],
)
def test_a_refused_step_leaves_the_state_alone(options, kind, message):
    frame, w = random((2, 4, 6, 7), 0), random(W, 1)
    state = fastconv.continual_state(frame, w)
    fastconv.continual_step(frame, state, w)
    frames, steps = state.frames.copy(), state.steps.copy()
    with pytest.raises(kind) as error:
        fastconv.continual_step(frame, state, w, **options)
    assert str(error.value) == message
    assert np.array_equal(state.frames, frames)
    assert np.array_equal(state.steps, steps)


def test_a_strided_state_is_refused():
    frame, w = random((2, 4, 6, 7), 0), random(W, 1)
    state = fastconv.continual_state(frame, w)
    wide = np.zeros((2, 4, 2, 6, 14), np.float32)[..., ::2]
    with pytest.raises(GeometryError, match="state frames must be dense"):
        fastconv.continual_step(frame, continual.State(wide, state.steps), w)
