"""What is wrong, unusual or enormous: the right answer or one clear error, and nothing written."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv.backends import available  # noqa: E402
from fastconv.errors import BackendError, GeometryError, UnsupportedError  # noqa: E402

F, ops = torch.nn.functional, torch.ops.fastconv
CPU = [b for b in ("c", "numba", "reference", "torch") if available()[b] is None]
X, W = (1, 4, 4, 6, 6), (6, 4, 3, 3, 3)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantised(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


WRONG = {  # what is done to the input, and how the error begins
    "complex": (
        lambda x: x.to(torch.complex64),
        "conv3d: dtype complex64 is not supported; use one of float32",
    ),
    "integers": (lambda x: x.to(torch.int32), "conv3d: dtype int32 is not supported"),
    "truth values": (lambda x: x > 0, "conv3d: dtype bool is not supported"),
    "sparse": (
        lambda x: x.to_sparse(),
        "conv3d: input must be a dense tensor, got a torch.sparse_coo one",
    ),
    "precision": (lambda x: x.double(), "conv3d: input has dtype float64, but weight has float32"),
    "an array": (
        lambda x: x.numpy(),
        "conv3d: input and weight must both be NumPy arrays or both PyTorch tensors",
    ),
    "meta": (lambda x: x.to("meta"), "conv3d: input is on device meta, but weight is on cpu"),
    "a list": (
        lambda x: x.tolist(),
        "conv3d: input must be a NumPy array or a PyTorch tensor, got list",
    ),
}
SHAPES = {
    "rank 3": ((4, 6, 6), "conv3d: input must have 5 dimensions"),
    "rank 6": ((1, 1, 4, 4, 6, 6), "conv3d: input must have 5 dimensions"),
    "channels": (
        (1, 5, 4, 6, 6),
        "conv3d: weight expects 4 input channels per group, input has 5 channels in 1 group",
    ),
    "no channels": ((1, 0, 4, 6, 6), "conv3d: channels and kernel must be at least 1"),
    "too small": ((1, 4, 2, 6, 6), "conv3d: axis 0 has 2 inputs and padding (0, 0)"),
    "nothing on an axis": ((1, 4, 4, 0, 6), "conv3d: axis 1 has 0 inputs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_kinds(what):
    change, message = WRONG[what]
    with pytest.raises(UnsupportedError) as error:
        fastconv.conv3d(change(normal(*X)), normal(*W))
    assert str(error.value).startswith(message)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantised():
    with pytest.raises(UnsupportedError, match=r"conv3d: (input must be a dense|dtype qint8)"):
        fastconv.conv3d(quantised(normal(*X)), normal(*W))


@pytest.mark.parametrize("what", SHAPES)
def test_wrong_shapes(what):
    shape, message = SHAPES[what]
    with pytest.raises(GeometryError) as error:
        fastconv.conv3d(normal(*shape), normal(*W))
    assert str(error.value).startswith(message)


def test_wrong_extras():
    x, w = normal(*X), normal(*W)
    with pytest.raises(GeometryError, match=r"bias must have shape \(6,\), got \(4,\)"):
        fastconv.conv3d(x, w, normal(4))
    with pytest.raises(GeometryError, match="residual must have the result's shape"):
        fastconv.conv3d(x, w, residual=normal(1, 6, 4, 6, 6))
    with pytest.raises(UnsupportedError, match="unknown activation 'tanh'"):
        fastconv.conv3d(x, w, activation="tanh")
    with pytest.raises(UnsupportedError, match="unknown algorithm 'fft'"):
        fastconv.conv3d(x, w, algorithm="fft")
    with pytest.raises(BackendError, match="unknown backend 'cudnn'"):
        fastconv.conv3d(x, w, backend="cudnn")


STEPS = ([1] * 3, [0] * 6, [1] * 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w: ops.conv(x.to_sparse(), w, None, *STEPS, 1), UnsupportedError, "dense"),
        (lambda x, w: ops.conv(x.double(), w, None, *STEPS, 1), UnsupportedError, "float64"),
        (lambda x, w: ops.conv(x[0], w, None, *STEPS, 1), GeometryError, "as many axes"),
        (lambda x, w: ops.conv(x, w, normal(5), *STEPS, 1), GeometryError, "bias must have"),
        (lambda x, w: ops.conv(x, w, None, *STEPS, 3), GeometryError, "do not divide"),
        (
            lambda x, w: ops.conv_prepacked(x, w.view(-1), None, [6, 4, 3, 3, 2], *STEPS, 1),
            GeometryError,
            "packed must have shape",
        ),
        (
            lambda x, w: ops.conv_input_gradient(x, w, [6, 8, 8], *STEPS, 6, "contiguous"),
            GeometryError,
            "conv_input_gradient",
        ),
        (
            lambda x, w: ops.conv_weight_gradient(x, x, [4, 3, 3, 3], *STEPS, "contiguous"),
            GeometryError,
            "grad must have the result's shape",
        ),
    ],
)
def test_operators_refuse_as_functions_do(call, error, message):
    with pytest.raises(error, match=message):
        call(normal(*X), normal(*W))


def test_what_follows_a_refusal_is_as_before():
    """Packed weights, plans and the tensors themselves survive an error."""
    x, w, b = normal(*X), normal(*W), normal(6)
    want = fastconv.conv3d(x, w, b)
    copies = [t.clone() for t in (x, w, b)]
    for change, _ in WRONG.values():
        with pytest.raises(UnsupportedError):
            fastconv.conv3d(change(x), w, b)
    assert all(torch.equal(a, c) for a, c in zip((x, w, b), copies, strict=True))
    assert torch.equal(fastconv.conv3d(x, w, b), want)


@pytest.mark.parametrize("backend", CPU)
def test_empty_batches(backend):
    x, w = normal(0, 4, 4, 6, 6).requires_grad_(), normal(*W).requires_grad_()
    y = fastconv.conv3d(x, w, normal(6), padding=1, activation="relu", backend=backend)
    assert y.shape == (0, 6, 4, 6, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not w.grad.any()


VIEWS = {
    "strided": lambda: normal(1, 4, 8, 12, 6)[:, :, ::2, ::2],
    "transposed": lambda: normal(1, 6, 4, 6, 4).transpose(1, 4),
    "expanded": lambda: normal(1, 4, 1, 6, 1).expand(X),
    "overlapping": lambda: normal(2000).as_strided(X, (0, 100, 20, 3, 1)),
    "offset": lambda: normal(5, 4, 4, 6, 6)[3:4],
    "negated": lambda: torch.complex(normal(*X), normal(*X, seed=1)).conj().imag,
    "channels last": lambda: normal(*X).to(memory_format=torch.channels_last_3d),
}


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, backend):
    """Each as input, as weight and as residual; a bias that is a view, too."""
    x, w = VIEWS[view](), normal(*W)
    plain, before = x.clone(memory_format=torch.contiguous_format).resolve_neg(), x.clone()
    want = F.conv3d(plain, w, padding=1)
    for bias in (normal(12)[::2], normal(1).expand(6), normal(6, 2)[:, 1]):
        got = fastconv.conv3d(x, w, bias, padding=1, backend=backend)
        torch.testing.assert_close(got, want + bias.view(-1, 1, 1, 1), rtol=1e-4, atol=1e-4)
    module = fastconv.nn.Conv3d(4, 6, 3, padding=1, bias=False, backend=backend)
    with torch.no_grad():
        module.weight.copy_(w)
        torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    small = F.conv3d(normal(1, 4, 6, 8, 8), plain[:, :, :3, :3, :3].contiguous())
    got = fastconv.conv3d(normal(1, 4, 6, 8, 8), x[:, :, :3, :3, :3], backend=backend)
    torch.testing.assert_close(got, small, rtol=1e-4, atol=1e-4)
    got = fastconv.conv3d(normal(*X), normal(4, 4, 1, 1, 1), residual=x, backend=backend)
    want = F.conv3d(normal(*X), normal(4, 4, 1, 1, 1)) + plain
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", CPU)
def test_a_strided_bias_of_numpy(backend):
    x, w, b = (normal(*s).numpy() for s in (X, W, (12,)))
    got = fastconv.conv3d(x, w, b[::-2], backend=backend)
    want = F.conv3d(*map(torch.from_numpy, (x, w, b[::-2].copy())))
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)
    weights = [normal(*s).numpy() for s in ((6, 4, 3, 1, 1), (6, 1, 1, 3, 3), (6, 6, 1, 1, 1))]
    copies = [b[::2].copy()] * 3
    got, want = (
        fastconv.separable_block(x, *weights, biases, backend=backend)
        for biases in ([b[::2]] * 3, copies)
    )
    assert (got == want).all()


numpy_may_warn = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@numpy_may_warn
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "hardswish", "sigmoid"])
def test_what_is_not_finite_propagates_as_in_pytorch(value, groups, activation):
    """Direct algorithms on every backend: the same values in the same places."""
    x, w = normal(1, 4, 4, 7, 9), normal(8, 4 // groups, 3, 3, 3)
    x[0, 1, 2, 3, 4] = value
    act = {"none": lambda z: z, "hardswish": F.hardswish, "silu": F.silu}.get(activation)
    want = (act or getattr(torch, activation))(F.conv3d(x, w, padding=1, groups=groups))
    for backend in CPU:
        got = fastconv.conv3d(
            x, w, padding=1, groups=groups, activation=activation, algorithm="direct",
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@numpy_may_warn
@pytest.mark.parametrize("backend", [b for b in CPU if b != "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_minimal_filtering_spreads_what_is_not_finite_within_its_tiles(backend, value):
    """No output that PyTorch has as not finite is finite; what a tile does not reach is."""
    x, w = normal(1, 4, 16, 16), normal(6, 4, 3, 3)
    x[0, 1, 3, 4] = value
    want = F.conv2d(x, w, padding=1)
    got = fastconv.conv2d(x, w, padding=1, algorithm="winograd", backend=backend)
    assert not got[~want.isfinite()].isfinite().any()
    assert got[..., 12:, 12:].isfinite().all()


@numpy_may_warn
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", CPU)
def test_what_is_not_finite_goes_through_blocks_and_streams(backend, value):
    x = normal(1, 4, 4, 7, 9)
    x[0, 1, 2, 3, 4] = value
    weights = [normal(*s) for s in ((5, 4, 3, 1, 1), (5, 1, 1, 3, 3), (2, 5, 1, 1, 1))]
    want = F.conv3d(F.conv3d(x, weights[0], padding=(1, 0, 0)), weights[1], padding=(0, 1, 1),
                    groups=5)  # fmt: skip
    want = F.conv3d(want, weights[2])
    got = fastconv.separable_block(x, *weights, backend=backend)
    assert not got[~want.isfinite()].isfinite().any()
    assert got[..., 7:].isfinite().all()
    w = normal(6, 4, 3, 3, 3)
    want = F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)), w, padding=(0, 1, 1))
    for form in ("ring", "sum"):
        state = fastconv.continual_state(x[:, :, 0], w, form=form, padding=(0, 1, 1))
        got = fastconv.continual_steps(x, state, w, padding=(0, 1, 1), backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_of_what_is_not_finite(groups):
    x, w = normal(1, 4, 4, 7, 9), normal(4, 4 // groups, 3, 3, 3)
    x[0, 1, 2, 3, 4] = float("nan")
    found = []
    for convolution in (fastconv.conv3d, F.conv3d):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        convolution(a, b, None, 1, 1, 1, groups)[..., 2:].sum().backward()
        found.append((a.grad, b.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_sizes_past_32_bits(device):
    """More than 2^31 elements, and an axis longer than 2^31; nothing is allocated."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode() if device == "fake" else torch.device("meta")
    with mode:
        w = torch.empty(16, 1, 3, 3, 3)
        for shape in ((3, 16, 512, 1024, 1024), (1, 16, 1, 1, 2**31 + 7)):
            x = torch.empty(shape)
            y = fastconv.conv3d(x, w, padding=1, groups=16, activation="relu", residual=x)
            assert y.shape == shape
            assert y.stride() == x.stride()
            x, v = x.requires_grad_(), w.detach().requires_grad_()
            gx, gw = torch.autograd.grad(fastconv.conv3d(x, v, None, 1, 1, 1, 16).sum(), (x, v))
            assert (gx.shape, gw.shape) == (x.shape, w.shape)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_without_values(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        x, w = torch.empty(X), torch.empty(W)
        y = fastconv.conv3d(x.to(memory_format=torch.channels_last_3d), w, padding=1)
        assert y.shape == (1, 6, 4, 6, 6)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        weights = torch.empty(5, 4, 3, 1, 1), torch.empty(5, 1, 1, 3, 3), torch.empty(2, 5, 1, 1, 1)
        assert fastconv.separable_block(x, *weights, stride=(1, 2, 2)).shape == (1, 2, 4, 3, 3)
        assert fastconv.nn.Conv3d(4, 6, 3)(x).shape == (1, 6, 2, 4, 4)
        with pytest.raises(GeometryError, match="weight expects 4 input channels"):
            fastconv.conv3d(x[:, :3], w)
