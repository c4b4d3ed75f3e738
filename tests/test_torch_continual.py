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
