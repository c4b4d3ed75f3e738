"""The operator on tensors: schema, fake, gradient, layouts, compilation, fresh packed weights."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import geometries

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv import ops, planner, torch_ops  # noqa: E402
from fastconv.backends import available, kernel  # noqa: E402
from fastconv.geometry import Geometry  # noqa: E402

F = torch.nn.functional
CPU = [b for b in ("reference", "numba", "c", "torch") if fastconv.backends.available()[b] is None]
CONV = {1: fastconv.conv1d, 2: fastconv.conv2d, 3: fastconv.conv3d}


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def close(got, want):
    torch.testing.assert_close(
        got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max()) if want.numel() else 1)
    )


@given(geometries(family="grouped"), st.booleans(), st.sampled_from(CPU))
def test_conv_of_tensors_is_pytorchs(g, channels_last, backend):
    x, w = tensors(g.x_shape, g.w_shape)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    extra = [p for pair in reversed(g.padding) for p in pair]
    functional = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[g.n]
    want = functional(
        F.pad(x.double(), extra), w.double(), None, g.stride, 0, g.dilation, g.groups
    ).float()
    got = CONV[g.n](x, w, None, g.stride, g.padding, g.dilation, g.groups, backend=backend)
    close(got, want)
    assert torch_ops.dense(got, ops.layout_of(x)).data_ptr() == got.data_ptr()


OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
STEPS = ([1, 2, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1])  # stride, padding, dilation
SHAPES = {
    "conv": ((2, 4, 5, 6, 7), (6, 2, 3, 3, 3), (6,)),
    "conv_prepacked": ((2, 4, 5, 6, 7), (6, 2, 3, 3, 3), (6,)),
    "conv_input_gradient": ((2, 6, 5, 3, 7), (6, 2, 3, 3, 3)),
    "conv_weight_gradient": ((2, 6, 5, 3, 7), (2, 4, 5, 6, 7)),
    "separable_block": ((1, 3, 4, 5, 5), (4, 3, 3, 1, 1), (4, 1, 1, 3, 3), (2, 4, 1, 1, 1), (4,)),
}


def arguments(op, backend, grad):
    """Positional arguments and keywords that reach every part of an operator."""
    given = tensors(*SHAPES[op])
    if op == "conv_prepacked":
        given[1] = torch_ops.freeze(given[1])
    given = [
        t.requires_grad_(grad and not (op == "conv_prepacked" and t.dim() == 1)) for t in given
    ]
    if op == "separable_block":
        residual = tensors((1, 2, 4, 5, 5))[0]
        rest = (None, None, [1] * 3, [1] * 6, ["silu", "relu", "none"], residual, backend)
        return (*given, *rest), {}
    if op == "conv_input_gradient":
        return (*given, [5, 6, 7], *STEPS, 3, "contiguous", backend), {}
    if op == "conv_weight_gradient":
        return (*given, [2, 3, 3, 3], *STEPS, "contiguous", backend), {}
    size = ([6, 2, 3, 3, 3],) if op == "conv_prepacked" else ()
    residual = tensors((2, 6, 5, 3, 7))[0]
    options = {"backend": backend, "activation": "hardswish", "residual": residual}
    return (*given, *size, *STEPS, 2), options


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", SHAPES)
def test_opcheck(op, backend, grad):
    given, options = arguments(op, backend, grad)
    overload = getattr(torch.ops.fastconv, op).default
    torch.library.opcheck(overload, given, options, test_utils=OPCHECK)


ACTIVATIONS = ("none", "relu", "silu", "hardswish", "sigmoid")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("direct", [True, False])
def test_gradients_to_the_second_order(activation, direct):
    """The operator with its epilogue, and `ops`, which keeps what that would compute again."""
    shapes = ((1, 2, 4, 4), (2, 1, 2, 3), (2,), (1, 2, 3, 2))
    given = [t.requires_grad_() for t in tensors(*shapes, dtype=torch.float64)]

    def operator(x, w, b, r):
        steps = ([1, 2], [0, 0, 1, 1], [1, 1], 2)
        return torch.ops.fastconv.conv(x, w, b, *steps, activation, r, "auto", "torch")

    def function(x, w, b, r):
        padding = [(0, 0), (1, 1)]
        return fastconv.conv2d(
            x, w, b, (1, 2), padding, 1, 2, activation=activation, residual=r, backend="torch"
        )

    call = operator if direct else function
    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


@pytest.mark.parametrize("direct", [True, False])
def test_gradients_of_a_block_to_the_second_order(direct):
    weights = ((3, 2, 3, 1, 1), (3, 1, 1, 3, 3), (2, 3, 1, 1, 1))
    shapes = ((1, 2, 3, 4, 3), *weights, (3,), (3,), (2,), (1, 2, 3, 2, 3))
    given = [t.requires_grad_() for t in tensors(*shapes, dtype=torch.float64)]
    activations = ["silu", "sigmoid", "none"]

    def operator(*t):
        steps = ([1, 2, 1], [1] * 6, activations)
        return torch.ops.fastconv.separable_block(*t[:7], *steps, t[7], "torch")

    def function(*t):
        return fastconv.separable_block(
            *t[:4], t[4:7], activations, t[7], (1, 2, 1), 1, backend="torch"
        )

    call = operator if direct else function
    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


def test_gradients_of_frozen_weights_are_those_of_the_rest():
    x, w, b, r = tensors((1, 2, 4, 4), (2, 1, 2, 3), (2,), (1, 2, 3, 2), dtype=torch.float64)
    packed = torch_ops.freeze(w)
    steps = ([1, 2], [0, 0, 1, 1], [1, 1], 2, "silu")

    def call(x, b, r):
        op = torch.ops.fastconv.conv_prepacked
        return op(x, packed, b, [2, 1, 2, 3], *steps, r, "auto", "torch")

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (x, b, r)], fast_mode=True)


class ByData(torch.optim.Optimizer):
    """An optimiser of the old kind: it writes what PyTorch does not count, and few elements."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data[1, 1, 1, 1, 1] -= 1


def test_a_step_of_any_optimiser_is_a_write():
    """Large weights are compared by a sample, which misses a single element."""
    x, w = tensors((1, 16, 3, 5, 5), (40, 16, 3, 3, 3))
    w = torch.nn.Parameter(w)
    with torch.no_grad():
        fastconv.conv3d(x, w)
    ByData([w]).step()
    with torch.no_grad():
        close(fastconv.conv3d(x, w), F.conv3d(x, w))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_training_never_meets_stale_weights(name, foreach):
    """Trained beside PyTorch's modules: depthwise, grouped, strided, and a block."""
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Conv3d(8, 8, 3, padding=1, groups=8),
        torch.nn.ReLU(),
        torch.nn.Conv3d(8, 16, 3, stride=(1, 2, 2), padding=1, groups=2),
        torch.nn.Conv3d(16, 16, (1, 3, 3), stride=2, padding=(0, 1, 1), groups=16, bias=False),
    )
    ours = copy.deepcopy(theirs)
    for i in (0, 2, 3):
        ours[i] = fastconv.nn.Conv3d.convert(ours[i])
    x = torch.randn(2, 8, 4, 9, 8).contiguous(memory_format=torch.channels_last_3d)
    for model in (theirs, ours):
        optimiser = getattr(torch.optim, name)(model.parameters(), lr=0.1, foreach=foreach)
        for _ in range(3):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.detach(), b.detach())
    with torch.no_grad():
        close(ours(x), theirs(x))
    with torch.inference_mode():
        close(ours(x), theirs(x))


@pytest.mark.parametrize("write", ["optimiser", "copy_", "data", "load", "numpy"])
def test_packed_weights_follow_every_write(write):
    x, w, new = tensors((1, 4, 4, 6, 6), (6, 4, 3, 3, 3), (6, 4, 3, 3, 3))
    w = torch.nn.Parameter(w)
    with torch.no_grad():
        fastconv.conv3d(x, w)
        if write == "optimiser":
            w.grad = new
            torch.optim.SGD([w], lr=1.0).step()
        elif write == "copy_":
            w.copy_(new)
        elif write == "data":
            w.data.copy_(new)
        elif write == "load":
            w.data = new.clone()
        else:
            w.detach().numpy()[...] = new.numpy()
        close(fastconv.conv3d(x, w), F.conv3d(x, w))


def test_packed_weights_follow_memory_that_is_read_in_another_order():
    x, w = tensors((1, 4, 4, 6, 6), (4, 4, 3, 3, 3))
    w = torch.nn.Parameter(w)
    with torch.no_grad():
        fastconv.conv3d(x, w)
        w.data = w.data.transpose(0, 1)  # of the same shape, and nobody counts it
        close(fastconv.conv3d(x, w), F.conv3d(x, w))


STRIDED = {
    "channels last": lambda w: w.to(memory_format=torch.channels_last_3d),
    "gaps": lambda w: torch.stack([w, w], -1)[..., 0],
}


@pytest.mark.parametrize("form", STRIDED)
def test_packed_weights_of_any_strides_follow_writes_that_are_not_counted(form):
    x, w, new = tensors((1, 4, 4, 6, 6), (6, 4, 3, 3, 3), (6, 4, 3, 3, 3))
    w = STRIDED[form](w)
    with torch.no_grad():
        fastconv.conv3d(x, w)
        w.data.copy_(new)
        close(fastconv.conv3d(x, w), F.conv3d(x, w))


@pytest.mark.parametrize("form", [None, *STRIDED])
def test_packed_weights_of_inference_tensors_follow_writes(form):
    x, w = tensors((1, 4, 4, 6, 6), (300, 4, 3, 3, 3))
    with torch.inference_mode():
        w = STRIDED[form](w.clone()) if form else w.clone()
        fastconv.conv3d(x, w)
        w[7, 1, 2, 1, 0] += 1
        close(fastconv.conv3d(x, w), F.conv3d(x, w))


def test_packed_weights_die_with_their_tensor():
    x, w = tensors((1, 4, 4, 6, 6), (6, 4, 3, 3, 3))
    before = len(torch_ops._packed)
    fastconv.conv3d(x, w)
    assert len(torch_ops._packed) == before + 1
    del w
    assert len(torch_ops._packed) == before


def test_precisions_numpy_lacks_run_on_the_framework():
    x, w = (t.bfloat16() for t in tensors((1, 4, 4, 6, 6), (6, 4, 3, 3, 3)))
    assert torch.equal(fastconv.conv3d(x, w), F.conv3d(x, w))


@pytest.mark.parametrize("backend", CPU)
def test_continual_step_on_tensors(backend):
    stream, w = tensors((2, 4, 6, 5, 5), (6, 4, 3, 3, 3))
    want = F.conv3d(F.pad(stream, (0, 0, 0, 0, 2, 0)), w, padding=(0, 1, 1))
    state = fastconv.continual_state(stream[:, :, 0], w)
    for t in range(6):
        y = fastconv.continual_step(stream[:, :, t], state, w, padding=(0, 1, 1), backend=backend)
        close(y, want[:, :, t])
    assert state.steps.tolist() == [6, 6]


@pytest.mark.parametrize("backend", [b for b in ("numba", "c") if available()[b] is None])
def test_a_workspace_is_for_the_threads_of_its_call(backend, monkeypatch):
    """A runner outlives a change of the number of threads, and schedules depend on it."""
    geometry = Geometry.of((1, 3, 8, 56, 56), (64, 3, 3, 3, 3), 1, 1)
    runner = torch_ops.Runner(planner.plan(geometry, backend=backend, algorithm="direct"))
    w = torch.randn(geometry.w_shape)
    x = torch.randn(geometry.x_shape).contiguous(memory_format=torch.channels_last_3d)
    module, sizes = kernel(runner.plan.family, backend), []

    def measured(size, dtype):
        sizes.append(size)
        return np.empty(size, dtype)

    monkeypatch.setattr(ops, "workspace", measured)
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        packed = torch_ops.packed_weights(runner.plan, w)
        runner(x, packed, None)
        assert sizes[-1] >= module.workspace_size(runner.plan)
