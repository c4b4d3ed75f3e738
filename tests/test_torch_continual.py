"""The operators of a continual step: schema, fakes, gradients, compilation, aliased states."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv.backends import available, devices  # noqa: E402
from fastconv.continual import FORMS, STARTS, State  # noqa: E402
from fastconv.errors import UnsupportedError  # noqa: E402

F = torch.nn.functional
CPU = [b for b, reason in available().items() if reason is None and "cpu" in devices(b)]
OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
forms = pytest.mark.parametrize("form", FORMS)


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def begun(x, w, form, stride=1, start="zeros", **options):
    """A state in which two streams are at different times."""
    stride = (stride, 1, 1)
    state = fastconv.continual_state(x, w, stride=stride, form=form, start=start, **options)
    state.frames.copy_(tensors(state.frames.shape)[0])
    state.steps.copy_(torch.tensor([3, 4]))
    return state


PADDING = ((0, 0), (1, 1), (1, 0))
PLAIN = ([0, 0, 1, 1, 1, 0], [1, 1, 1], 2)  # padding, dilation, groups


@forms
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("backend", CPU)
def test_opcheck(form, stride, some, backend):
    dtype = torch.float32 if backend in ("c", "triton") else torch.float64
    x, w, b = tensors((2, 4, 5, 6), (6, 2, 3, 3, 3), (6,), dtype=dtype)
    state = begun(x, w, form, stride, padding=PADDING, groups=2)
    active = torch.tensor([True, False]) if some else None
    arguments = (x, state.frames, state.steps, w, b, [stride, 1, 1], *PLAIN)
    options = {"active": active, "form": form, "backend": backend}
    step = torch.ops.fastconv.continual_step.default
    torch.library.opcheck(step, arguments, options, test_utils=OPCHECK)


@forms
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_the_functional_twin(form, stride, grad):
    x, w, b = tensors((2, 4, 5, 6), (6, 2, 3, 3, 3), (6,), dtype=torch.float64)
    state = begun(x, w, form, stride, padding=PADDING, groups=2)
    x, frames, w, b = (t.requires_grad_(grad) for t in (x, state.frames, w, b))
    arguments = (x, frames, state.steps, w, b, [stride, 1, 1], *PLAIN)
    twin = torch.ops.fastconv.continual_step_functional.default
    torch.library.opcheck(twin, arguments, {"form": form}, test_utils=OPCHECK)


GRADIENTS = [(f, s, start) for f in FORMS for s in (1, 2) for start in STARTS]
GRADIENTS = [case for case in GRADIENTS if case[::2] != ("sum", "replicate")]


@pytest.mark.parametrize(("form", "stride", "start"), GRADIENTS)
@pytest.mark.parametrize("some", [False, True])
def test_gradients_through_several_steps(form, stride, start, some):
    x, w, b, r = tensors((2, 4, 3, 4), (6, 2, 3, 3, 3), (6,), (2, 6, 3, 3), dtype=torch.float64)
    state = begun(x, w, form, stride, start, padding=PADDING, groups=2)
    state.steps[0] = 0  # one of them begins
    active = torch.tensor([True, False]) if some else None

    def steps(x, frames, w, b, r):
        now, columns = State(frames, state.steps, form, start, stride), []
        for i in range(4):
            y, now = fastconv.continual_step_functional(
                x * (i + 1), now, w, b, (stride, 1, 1), PADDING, 1, 2,
                activation="silu", residual=r, active=active,
            )  # fmt: skip
            columns.append(y)
        return torch.stack(columns), now.frames

    inputs = (x, state.frames, w, b, r)
    assert torch.autograd.gradcheck(
        steps, tuple(t.clone().requires_grad_() for t in inputs), fast_mode=True
    )


def test_gradients_that_nobody_computes_are_refused():
    x, w = tensors((2, 4, 3, 4), (6, 4, 3, 3, 3))
    state = fastconv.continual_state(x, w, padding=(0, 1, 1), form="sum", start="replicate")
    with pytest.raises(UnsupportedError, match="no gradient of form 'sum' with start 'replicate'"):
        fastconv.continual_step_functional(x.requires_grad_(), state, w, padding=(0, 1, 1))


@pytest.mark.parametrize("backend", CPU)
@forms
def test_steps_keep_no_gradient_and_may_be_fed_what_has_one(backend, form):
    x, w = tensors((2, 4, 5, 5), (6, 4, 3, 3, 3))
    state = fastconv.continual_state(x, w, padding=(0, 1, 1), form=form)
    y = fastconv.continual_step(
        x.requires_grad_(), state, w.requires_grad_(), padding=(0, 1, 1), backend=backend
    )
    assert not y.requires_grad
    assert not state.frames.requires_grad


@pytest.mark.parametrize("backend", CPU)
@forms
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_twin_returns_what_the_step_writes(backend, form, channels_last):
    stream, w = tensors((2, 4, 5, 5, 5), (6, 4, 3, 3, 3))
    if channels_last:
        stream = stream.movedim(1, -1).contiguous().movedim(-1, 1)
    how = {"padding": (0, 1, 1), "backend": backend}
    state = fastconv.continual_state(stream[:, :, 0], w, padding=(0, 1, 1), form=form)
    for t in range(5):
        before = state.save()
        z, after = fastconv.continual_step_functional(stream[:, :, t], state, w, **how)
        assert torch.equal(state.frames, before.frames)
        y = fastconv.continual_step(stream[:, :, t], state, w, **how)
        assert torch.equal(y, z)
        assert y.stride() == z.stride()
        assert torch.equal(state.frames, after.frames)
        assert torch.equal(state.steps, after.steps)


def aliases(x, frames, steps, w):
    """Reads of the state before, between and behind two steps, through clones and views."""
    state, how = State(frames, steps), {"padding": (0, 1, 1)}
    seen, first = frames.clone(), frames[0]
    y = fastconv.continual_step(x, state, w, **how)
    between, part = frames.clone(), frames[:, 1:3]
    z = fastconv.continual_step(x + 1, state, w, **how)
    return y, z, seen, first * 2, between, part + 1, steps + 1


COMPILERS = ["eager", "aot_eager", *(["inductor"] if shutil.which("c++") else [])]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler by itself
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_steps_write_the_state_that_others_see(compiler):
    x, w = tensors((2, 4, 5, 6), (6, 4, 3, 3, 3))
    results = []
    for function in (aliases, torch.compile(aliases, fullgraph=True, backend=compiler)):
        state = fastconv.continual_state(x, w)
        views = state.frames.view(-1), state.steps[1:]
        out = []
        for i in range(4):
            out += [t.clone() for t in function(x * (i + 1), state.frames, state.steps, w)]
            out += [t.clone() for t in views]
        results.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_stream_equals_the_clip_under_compilation():
    stream, w = tensors((1, 4, 6, 5, 5), (6, 4, 3, 3, 3))
    state = fastconv.continual_state(stream[:, :, 0], w, padding=(0, 1, 1), form="sum")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return fastconv.continual_step(x * 2, state, w, padding=(0, 1, 1), activation="relu") + 1

    got = torch.stack([step(stream[:, :, t]) for t in range(6)], 2)
    padded = F.pad(stream * 2, (0, 0, 0, 0, 2, 0))
    torch.testing.assert_close(got, F.conv3d(padded, w, padding=(0, 1, 1)).relu() + 1)


def operands(form, batch=3):
    """An input, frames and steps of several states, weights and the rest of an operator's call."""
    xs, w, b, r = tensors((batch, 2, 4, 5, 6), (6, 4, 3, 3, 3), (6,), (batch, 2, 6, 3, 4))
    state = fastconv.continual_state(xs[0], w, form=form)
    frames = tensors((batch, *state.frames.shape))[0]
    steps = torch.arange(2 * batch).reshape(batch, 2)
    active = torch.tensor([[True, False], [True, True], [False, True]])[:batch]
    return xs, frames, steps, w, b, r, active


def call(form, x, frames, steps, w, b, r, active):
    fixed = ([1] * 3, [0] * 6, [1] * 3, 1)
    op = torch.ops.fastconv.continual_step_functional
    return op(x, frames, steps, w, b, *fixed, "relu", r, active, True, form)


@forms
@pytest.mark.parametrize("dims", [(0,) * 3, (1, 0, 0), (0, None, None), (None, 0, 0), (1, 1, 1)])
def test_vmap_of_steps_is_a_loop(form, dims):
    xs, frames, steps, w, b, r, active = operands(form)
    given = [
        t[0] if d is None else t.movedim(0, d).contiguous()
        for t, d in zip((xs, frames, steps), dims, strict=True)
    ]
    dims = (*dims, None, None, 0, 0)
    got = torch.vmap(lambda *args: call(form, *args), in_dims=dims)(*given, w, b, r, active)
    for i in range(3):
        one = [
            t if d is None else t.select(d, i)
            for t, d in zip((*given, w, b, r, active), dims, strict=True)
        ]
        for part, want in zip(got, call(form, *one), strict=True):
            torch.testing.assert_close(part[i], want)


def test_what_vmap_does_not_serve_is_refused():
    xs, frames, steps, w, *_ = operands("ring")
    fixed = ([1] * 3, [0] * 6, [1] * 3, 1)
    step, functional = torch.ops.fastconv.continual_step, call
    with pytest.raises(UnsupportedError, match="which writes its state, is not served"):
        torch.vmap(lambda x, f, s: step(x, f, s, w, None, *fixed))(xs, frames, steps)
    assert torch.equal(steps, torch.arange(6).reshape(3, 2))
    with pytest.raises(UnsupportedError, match="vmap over the weights of a step is not served"):
        torch.vmap(lambda w: functional("ring", xs[0], frames[0], steps[0], w, None, None, None))(
            torch.stack([w, w])
        )


@forms
def test_gradients_by_functions(form):
    xs, frames, steps, w, *_ = operands(form)

    def loss(x, frames, w):
        fixed = ([1] * 3, [0] * 6, [1] * 3, 1)
        op = torch.ops.fastconv.continual_step_functional
        y, after, _ = op(x, frames, steps[0], w, None, *fixed, form=form)
        return y.square().sum() + after.sin().sum()

    inputs = (xs[0], frames[0], w)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss(*leaves).backward()
    for a, b in zip(got, leaves, strict=True):
        torch.testing.assert_close(a, b.grad)


@forms
def test_autocast_leaves_streams_in_the_precision_of_their_weights(form):
    """What an earlier layer made is less precise; states and weights are not."""
    x, w, b = tensors((2, 4, 4, 5, 6), (6, 4, 3, 3, 3), (6,))
    low = x.bfloat16()

    def run(stream):
        state = fastconv.continual_state(x[:, :, 0], w, form=form)
        first = fastconv.continual_step(stream[:, :, 0], state, w, b)
        second, state = fastconv.continual_step_functional(stream[:, :, 1], state, w, b)
        rest = fastconv.continual_steps(stream[:, :, 2:], state, w, b)
        return torch.cat([torch.stack([first, second], 2), rest], 2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(low)
    want = run(low.float())
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
