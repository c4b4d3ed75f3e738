"""The operator on tensors: schema, fake, gradient, layouts, compilation, fresh packed weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import geometries

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv import ops, planner, torch_ops  # noqa: E402
from fastconv.backends import available, kernel  # noqa: E402
from fastconv.errors import UnsupportedError  # noqa: E402
from fastconv.geometry import Geometry  # noqa: E402

F = torch.nn.functional
CPU = [b for b in ("reference", "numba", "torch") if fastconv.backends.available()[b] is None]
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


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad):
    x, w, b = (
        t.requires_grad_(grad)
        for t in tensors((2, 4, 5, 6, 7), (6, 2, 3, 3, 3), (6,), dtype=torch.float64)
    )
    arguments = (x, w, b, [1, 2, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1], 2)
    options = {"backend": backend}
    torch.library.opcheck(torch.ops.fastconv.conv.default, arguments, options, test_utils=OPCHECK)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients(padding, groups):
    inputs = tensors((2, 4, 5, 6), (4, 4 // groups, 2, 3), (4,), (2, 4, 5, 6), dtype=torch.float64)
    x, w, b, r = (t.requires_grad_() for t in inputs)

    def fused(x, w, b, r):
        residual = r if padding == "same" else None
        return fastconv.conv2d(
            x, w, b, padding=padding, groups=groups, activation="silu", residual=residual
        )

    assert torch.autograd.gradcheck(fused, (x, w, b, r))


def test_block_gradient_is_that_of_three_convolutions():
    x, wt, wd, wp = (
        t.requires_grad_()
        for t in tensors(
            (1, 3, 4, 5, 5), (4, 3, 3, 1, 1), (4, 1, 1, 3, 3), (2, 4, 1, 1, 1), dtype=torch.float64
        )
    )
    block = fastconv.separable_block
    assert torch.autograd.gradcheck(
        lambda *t: block(*t, activations=("silu", "silu", "none")), (x, wt, wd, wp)
    )
    with torch.no_grad():
        plain = block(x, wt, wd, wp, activations=("silu", "silu", "none"))
    close(block(x, wt, wd, wp, activations=("silu", "silu", "none")).detach(), plain)


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


def test_compiled_equals_eager():
    x, w, b = tensors((1, 4, 4, 6, 6), (6, 4, 3, 3, 3), (6,))

    def function(x, w, b):
        return fastconv.conv3d(x * 2, w, b, padding=1, activation="relu") + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, b), function(x, w, b))


def test_precisions_numpy_lacks_run_on_the_framework():
    x, w = (t.bfloat16() for t in tensors((1, 4, 4, 6, 6), (6, 4, 3, 3, 3)))
    assert torch.equal(fastconv.conv3d(x, w), F.conv3d(x, w))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            lambda x: x.to(torch.complex64),
            "conv3d: dtype complex64 is not supported; use one of float32",
        ),
        (
            lambda x: x.to_sparse(),
            "conv3d: input must be a dense tensor, got layout torch.sparse_coo",
        ),
        (lambda x: x.double(), "conv3d: input has dtype float64, but weight has float32"),
        (
            lambda x: x.numpy(),
            "conv3d: input and weight must both be NumPy arrays or both PyTorch tensors",
        ),
        (lambda x: x.to("meta"), "conv3d: input is on device meta, but weight is on cpu"),
    ],
)
def test_refusals(x, message):
    a, w = tensors((1, 4, 4, 6, 6), (6, 4, 3, 3, 3))
    with pytest.raises(UnsupportedError) as error:
        fastconv.conv3d(x(a), w)
    assert str(error.value).startswith(message)


def test_meta_tensors_give_shapes():
    x, w = (torch.empty(s, device="meta") for s in ((1, 4, 4, 6, 6), (6, 4, 3, 3, 3)))
    assert fastconv.conv3d(x, w, padding=1).shape == (1, 6, 4, 6, 6)


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

    monkeypatch.setattr(torch_ops.ops, "workspace", measured)
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        packed = torch_ops.packed_weights(runner.plan, w)
        runner(x, packed, None)
        assert sizes[-1] >= module.workspace_size(runner.plan)
