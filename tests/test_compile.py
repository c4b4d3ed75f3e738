"""Compiled, exported, batched and cast: the same numbers as the call itself."""

from __future__ import annotations

import io

import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv import torch_ops  # noqa: E402
from fastconv.errors import UnsupportedError  # noqa: E402

nn, F = torch.nn, torch.nn.functional
BATCH = 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    """Modules, functions with an epilogue, and a block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = fastconv.nn.Conv3d(4, 6, 3, padding=1)
        self.second = fastconv.nn.Conv3d(6, 6, 3, padding=1, groups=6)
        shapes = ((5, 6, 3, 1, 1), (5, 1, 1, 3, 3), (3, 5, 1, 1, 1))
        self.block = nn.ParameterList(nn.Parameter(normal(*s)) for s in shapes)

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        x = fastconv.conv3d(x, self.second.weight, None, 1, 1, 1, 6, activation="silu", residual=x)
        return fastconv.separable_block(x, *self.block, activations=("relu", "silu", "none"))


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("packed", torch_ops.freeze(normal(6, 4, 3, 3, 3)))

    def forward(self, x):
        steps = ([6, 4, 3, 3, 3], [1] * 3, [1] * 6, [1] * 3, 1, "relu")
        return torch.ops.fastconv.conv_prepacked(x, self.packed, None, *steps)


MODELS = {"layers": Layers, "frozen": Frozen}
X, OTHER = normal(2, 4, 5, 8, 9), normal(3, 4, 7, 10, 12)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("model", MODELS)
def test_compiled_equals_eager(model):
    module = MODELS[model]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), module(X))


@pytest.mark.parametrize("model", MODELS)
def test_compiled_once_for_all_sizes(model):
    module, graphs = MODELS[model](), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=count)
    x = X.clone()
    for axis in (0, 2, 3, 4):
        torch._dynamo.mark_dynamic(x, axis)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
        assert torch.equal(compiled(OTHER), module(OTHER))
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_exported_saved_and_loaded_equals_eager(model, strict):
    module = MODELS[model]().eval()
    axes = {i: torch.export.Dim(f"size{i}") for i in (0, 2, 3, 4)}
    program = torch.export.export(module, (X,), dynamic_shapes={"x": axes}, strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {t for t in targets if t.startswith("fastconv.")} == {
        "layers": {"fastconv.conv.default", "fastconv.separable_block.default"},
        "frozen": {"fastconv.conv_prepacked.default"},
    }[model]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    with torch.no_grad():
        assert torch.equal(again(X), module(X))
        assert torch.equal(again(OTHER), module(OTHER))


def test_compiled_gradients_equal_eager():
    module = Layers()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def gradients(call):
        x = X.clone().requires_grad_()
        return torch.autograd.grad(call(x).square().sum(), [x, *module.parameters()])

    for a, b in zip(gradients(compiled), gradients(module), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


def test_a_trace_of_real_tensors_keeps_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    module = Layers().eval()
    with torch.no_grad():
        traced = make_fx(module)(X)
        # Nothing of the example is left in it.
        torch.testing.assert_close(traced(-X), module(-X))


def convolve(x, w, b, r):
    steps = ([1] * 3, [1] * 6, [1] * 3, 2)
    return torch.ops.fastconv.conv(x, w, b, *steps, "relu", r)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_jit_trace_keeps_the_operator():
    module = Layers().eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, X, check_trace=False)
        torch.testing.assert_close(traced(-X), module(-X), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_a_compiled_optimiser_compiles_once():
    """Counting its steps must not make PyTorch compile them again."""
    module, graphs = fastconv.nn.Conv3d(4, 4, 3, groups=4), []
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(optimiser.step, backend=count)
    for _ in range(3):
        optimiser.zero_grad()
        module(X).square().mean().backward()
        step()
        with torch.no_grad():
            want = F.conv3d(X, module.weight, module.bias, groups=4)
            torch.testing.assert_close(module(X), want, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


DIMS = {
    "input": (0, None, None, None),
    "input and residual": (1, None, None, 0),
    "weight": (None, 0, None, None),
    "bias": (None, None, 0, None),
    "all": (2, 1, 1, 2),
}


def entry(tensor, dim, i):
    return tensor if dim is None else tensor.select(dim, i)


def batched(tensor, dim, seed):
    if dim is None:
        return tensor
    return normal(BATCH, *tensor.shape, seed=seed).movedim(0, dim)


@pytest.mark.parametrize("which", DIMS)
def test_vmap_is_a_loop(which):
    dims = DIMS[which]
    single = normal(2, 4, 3, 6, 6), normal(6, 2, 3, 3, 3), normal(6), normal(2, 6, 3, 6, 6)
    given = [batched(t, d, i) for i, (t, d) in enumerate(zip(single, dims, strict=True))]
    got = torch.vmap(convolve, in_dims=dims)(*given)
    for i in range(BATCH):
        want = convolve(*(entry(t, d, i) for t, d in zip(given, dims, strict=True)))
        torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("weights", [False, True])
def test_vmap_of_a_block_is_a_loop(weights):
    single = normal(1, 3, 4, 5, 5), normal(4, 3, 3, 1, 1), normal(4, 1, 1, 3, 3)
    single = (*single, normal(2, 4, 1, 1, 1))
    dims = (0, 0, None, 0) if weights else (1, None, None, None)
    given = [batched(t, d, i) for i, (t, d) in enumerate(zip(single, dims, strict=True))]

    def block(*t):
        return fastconv.separable_block(*t, activations=("relu", "none", "silu"))

    got = torch.vmap(block, in_dims=dims)(*given)
    for i in range(BATCH):
        want = block(*(entry(t, d, i) for t, d in zip(given, dims, strict=True)))
        torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-5)


def test_vmap_over_frozen_weights_is_refused():
    x, packed = normal(1, 4, 9), torch.stack([torch_ops.freeze(normal(6, 4, 3))] * 2)

    def call(p):
        return torch.ops.fastconv.conv_prepacked(x, p, None, [6, 4, 3], [1], [0, 0], [1], 1)

    with pytest.raises(UnsupportedError, match="vmap over packed weights is not served"):
        torch.vmap(call)(packed)


def test_gradients_per_sample():
    w, x = normal(6, 2, 3, 3), normal(5, 4, 6, 6)

    def loss(convolution):
        return lambda w, x: convolution(x[None], w, None, 2, 1, 1, 2).square().sum()

    got, want = (
        torch.vmap(torch.func.grad(loss(c)), in_dims=(None, 0))(w, x)
        for c in (fastconv.conv2d, F.conv2d)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_nested_levels_of_func():
    w, x = normal(2, 2, 2, 2).double(), normal(1, 2, 3, 3).double()

    def hessian(convolution):
        return torch.func.jacrev(torch.func.grad(lambda w: convolution(x, w).pow(3).sum()))(w)

    torch.testing.assert_close(hessian(fastconv.conv2d), hessian(F.conv2d))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own
def test_forward_mode_gradients_are_refused_not_lost():
    x, w = normal(1, 2, 5), normal(2, 2, 3)
    message = "has no forward-mode gradient"
    with pytest.raises(UnsupportedError, match=message):
        torch.func.jvp(lambda x: fastconv.conv1d(x, w), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedError, match=message):
        fastconv.conv1d(torch.autograd.forward_ad.make_dual(x, x), w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_pytorchs(dtype):
    x, w, b = normal(1, 4, 3, 6, 6), normal(6, 2, 3, 3, 3), normal(6)
    module = fastconv.nn.Conv3d(4, 6, 3)
    with torch.autocast("cpu", dtype=dtype):
        want = F.conv3d(x, w, b, 1, 1, 1, 2)
        assert torch.equal(fastconv.conv3d(x, w, b, 1, 1, 1, 2), want)
        # What an earlier layer made meets weights that are not cast yet.
        assert torch.equal(fastconv.conv3d(x.to(dtype), w, b, 1, 1, 1, 2), want)
        assert fastconv.conv3d(x.double(), w.double(), groups=2).dtype == torch.float64
        assert module(x).dtype == dtype
        weights = normal(3, 4, 3, 1, 1), normal(3, 1, 1, 3, 3), normal(2, 3, 1, 1, 1)
        assert fastconv.separable_block(x, *weights).dtype == dtype
    assert fastconv.conv3d(x, w, b, 1, 1, 1, 2).dtype == torch.float32


def test_autocast_keeps_the_precision_of_frozen_weights():
    x, w, b = normal(1, 4, 9).bfloat16(), normal(6, 4, 3), normal(6)
    rest = (torch_ops.freeze(w), b, [6, 4, 3], [1], [0, 0], [1], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.ops.fastconv.conv_prepacked(x, *rest)
        with pytest.raises(UnsupportedError, match="input has dtype float64"):
            torch.ops.fastconv.conv_prepacked(x.double(), *rest)
    torch.testing.assert_close(y, F.conv1d(x.float(), w, b), rtol=1e-4, atol=1e-4)


def test_autocast_trains():
    torch.manual_seed(0)
    ours = fastconv.nn.Conv3d(4, 4, 3, padding=1, groups=4)
    theirs = nn.Conv3d(4, 4, 3, padding=1, groups=4)
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(normal(1, 4, 3, 6, 6)).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
