"""Every tensor argument of every function, operator and module, wrong in every way, one at a time.

A valid call comes first, so that its plan and packed weights are remembered: what is wrong must be
refused although all else was seen before.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv import continual, torch_ops  # noqa: E402
from fastconv.backends import available  # noqa: E402
from fastconv.errors import GeometryError, UnsupportedError  # noqa: E402

ops = torch.ops.fastconv
CPU = [b for b in ("c", "numba", "reference", "torch") if available()[b] is None]
# PyTorch warns of prototypes: nested, sparse and quantised tensors.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
STEPS = ([1] * 3, [0] * 6, [1] * 3)

WRONG = {
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int32),
    "truth values": lambda t: t > 0,
    "8 bits": lambda t: t.to(torch.float8_e4m3fn),
    "another precision": lambda t: t.double(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "of oneDNN": lambda t: t.to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[0]]),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, W, B, R = normal(1, 4, 4, 6, 6), normal(6, 4, 3, 3, 3), normal(6), normal(1, 6, 2, 4, 4)
BLOCK = (
    normal(1, 4, 4, 6, 6),
    *(normal(5, 4, 3, 1, 1), normal(5, 1, 1, 3, 3), normal(2, 5, 1, 1, 1)),
    *(normal(5), normal(5), normal(2)),
    normal(1, 2, 4, 6, 6),
)


def conv(n):
    """A function of n axes, and its arguments."""
    cut = (slice(None),) * 2 + (0,) * (3 - n)
    function = getattr(fastconv, f"conv{n}d")
    arguments = [t[cut].contiguous() for t in (X, W)] + [B, R[cut].contiguous()]
    return lambda x, w, b, r: function(x, w, b, residual=r), arguments


def block(x, temporal, depthwise, pointwise, b0, b1, b2, residual):
    weights = temporal, depthwise, pointwise
    return fastconv.separable_block(x, *weights, (b0, b1, b2), residual=residual)


def block_operator(x, temporal, depthwise, pointwise, b0, b1, b2, residual):
    weights = temporal, depthwise, pointwise
    rest = ([1] * 3, [1] * 6, ["none"] * 3, residual)
    return ops.separable_block(x, *weights, b0, b1, b2, *rest)


FUNCTIONS = {
    **{f"conv{n}d": conv(n) for n in (1, 2, 3)},
    "separable_block": (block, BLOCK),
    "continual_state": (fastconv.continual_state, (X[:, :, 0], W)),
    "module": (fastconv.nn.Conv3d(4, 6, 3), (X,)),
    "module without gradients": (fastconv.nn.Conv3d(4, 6, 3).requires_grad_(False), (X,)),
    "block module": (fastconv.nn.SeparableBlock(4, 5, 2), (X,)),
}
OPERATORS = {
    "conv": (lambda x, w, b, r: ops.conv(x, w, b, *STEPS, 1, "none", r), (X, W, B, R)),
    "conv_prepacked": (
        lambda x, p, b, r: ops.conv_prepacked(x, p, b, [*W.shape], *STEPS, 1, "none", r),
        (X, W.reshape(-1), B, R),
    ),
    "separable_block": (block_operator, BLOCK),
    "conv_input_gradient": (
        lambda g, w: ops.conv_input_gradient(g, w, [4, 6, 6], *STEPS, 6, "contiguous"),
        (R, W),
    ),
    "conv_weight_gradient": (
        lambda g, x: ops.conv_weight_gradient(g, x, [4, 3, 3, 3], *STEPS, "contiguous"),
        (R, X),
    ),
}


def refused(function, arguments, changes, error=UnsupportedError):
    """Each argument, changed, is refused; all of them stay as they were."""
    function(*arguments)
    before = [t.clone() for t in arguments]
    for i, argument in enumerate(arguments):
        for change in changes:
            given = list(arguments)
            try:
                given[i] = change(argument)
            except RuntimeError:
                continue  # no such tensor of this shape
            with pytest.raises(error):
                function(*given)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("what", WRONG)
def test_functions_and_modules(name, what):
    refused(*FUNCTIONS[name], [WRONG[what]])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_modules_of_what_is_no_tensor(name):
    function, arguments = FUNCTIONS[name]
    with pytest.raises(UnsupportedError, match="must be a|must both be"):
        function(arguments[0].numpy(), *arguments[1:])
    with pytest.raises(UnsupportedError, match="got list"):
        function(arguments[0].tolist(), *arguments[1:])
    with pytest.raises(UnsupportedError, match="got NoneType"):
        function(None, *arguments[1:])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("what", WRONG)
def test_operators(name, what):
    """PyTorch itself refuses nested tensors."""
    kind = NotImplementedError if what == "nested" else UnsupportedError
    refused(*OPERATORS[name], [WRONG[what]], kind)


def test_what_is_frozen():
    for what in ("complex", "integers", "sparse", "quantised", "nested"):
        with pytest.raises(UnsupportedError, match="freeze: "):
            torch_ops.freeze(WRONG[what](W))
    with pytest.raises(UnsupportedError, match="freeze: weight must be a PyTorch tensor"):
        torch_ops.freeze(W.numpy())


def function_of(step):
    def call(form, x, frames, steps, w, b, r, active):
        state = continual.State(frames, steps, form)
        return step(x, state, w, b, residual=r, active=active)

    return call


def operator_of(step):
    def call(form, x, frames, steps, w, b, r, active):
        return step(x, frames, steps, w, b, *STEPS, 1, "none", r, active, True, form)

    return call


STREAMING = {
    "continual_step": function_of(fastconv.continual_step),
    "continual_step_functional": function_of(fastconv.continual_step_functional),
    "operator": operator_of(ops.continual_step),
    "functional operator": operator_of(ops.continual_step_functional),
}


@pytest.mark.parametrize("form", continual.FORMS)
@pytest.mark.parametrize("name", STREAMING)
def test_streams(name, form):
    """Frames, states, weights and masks; what is refused writes no state."""
    state = fastconv.continual_state(X[:, :, 0], W, form=form)
    state.frames.copy_(normal(*state.frames.shape))
    frame, added = X[:, :, 0].contiguous(), R[:, :, 0].contiguous()
    given = [frame, state.frames, state.steps, W, B, added, torch.tensor([True])]
    call = STREAMING[name]
    call(form, *given)
    before = [t.clone() for t in given]
    kinds = (GeometryError, UnsupportedError)
    for i, argument in enumerate(given):
        for what, change in WRONG.items():
            if i == 6 and what == "truth values":
                continue  # as it should be
            try:
                changed = change(argument)
            except RuntimeError:
                continue  # no such tensor of this shape
            with pytest.raises(NotImplementedError if what == "nested" else kinds):
                call(form, *given[:i], changed, *given[i + 1 :])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("name", STREAMING)
def test_streams_of_other_extents(name):
    state = fastconv.continual_state(X[:, :, 0], W)
    given = [X[:, :, 0], state.frames, state.steps, W, B, R[:, :, 0], torch.tensor([True])]
    call = STREAMING[name]
    for i, changed in {
        0: X[:, :3, 0],
        1: state.frames[:, :, 1:],
        2: torch.zeros(2, dtype=torch.int64),
        3: W[:, :3],
        4: B[1:],
        5: R[:, :5, 0],
        6: torch.tensor([True, False]),
    }.items():
        with pytest.raises(GeometryError):
            call("ring", *given[:i], changed, *given[i + 1 :])
    assert not state.steps.any()


@pytest.mark.parametrize("backend", CPU)
def test_steps_of_views(backend):
    """A strided bias, an expanded residual, every other counter; one counter for two streams is
    refused."""
    x, w, bias = normal(2, 4, 6, 6), W, normal(12)[::2]
    added = normal(1, 6, 1, 1).expand(2, 6, 4, 4)
    state = fastconv.continual_state(x, w)
    state.frames.copy_(normal(*state.frames.shape, seed=1))
    counters = torch.tensor([2, 9, 3, 9])
    y = fastconv.continual_step(
        x, continual.State(state.frames.clone(), counters[::2]), w, bias, residual=added,
        backend=backend,
    )  # fmt: skip
    want = fastconv.continual_step(
        x, continual.State(state.frames.clone(), torch.tensor([2, 3])), w, bias.clone(),
        residual=added.contiguous(), backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    assert counters.tolist() == [3, 9, 4, 9]
    shared = continual.State(state.frames, torch.zeros(1, dtype=torch.int64).expand(2))
    with pytest.raises(GeometryError, match="one counter"):
        fastconv.continual_step(x, shared, w, backend=backend)


@pytest.mark.parametrize("backend", CPU)
def test_steps_of_arrays_with_a_strided_bias(backend):
    x, w, bias = X[:, :, 0].numpy(), W.numpy(), normal(12).numpy()
    got, want = (
        fastconv.continual_step(x, fastconv.continual_state(x, w), w, b, backend=backend)
        for b in (bias[::-2], bias[::-2].copy())
    )
    assert (got == want).all()
