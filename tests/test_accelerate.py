"""`accelerate` on models nobody here wrote: same outputs, whatever their structure."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections import OrderedDict

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastconv  # noqa: E402  (after the skip)
from fastconv import backends  # noqa: E402
from fastconv.errors import UnsupportedError  # noqa: E402
from fastconv.nn.graph_forward import forwards  # noqa: E402
from models import close, leaves, randomized, run  # noqa: E402

nn, F = torch.nn, torch.nn.functional
needs_c = pytest.mark.skipif(backends.available()["c"] is not None, reason="needs the C kernels")
SIZE = (4, 10, 12)


def conv(c_in=6, c_out=6, kernel=3, **options):
    return nn.Conv3d(c_in, c_out, kernel, padding=kernel // 2, **options)


class ConvBnRelu(nn.Sequential):
    def __init__(self, c_in=6, c_out=6, kernel=3, **options):
        super().__init__(
            conv(c_in, c_out, kernel, bias=False, **options),
            nn.BatchNorm3d(c_out),
            nn.ReLU(inplace=True),
        )


class OddOrder(nn.Module):
    """conv, sum, batch norm, relu; conv, relu, batch norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()
        self.bn, self.bn2 = nn.BatchNorm3d(6), nn.BatchNorm3d(6)

    def forward(self, x):
        x = F.relu(self.bn(self.a(x) + x))
        return self.bn2(self.b(x).relu()) + self.c(x).sigmoid()


class SharedConv(nn.Module):
    """One convolution called three times, once under another name, and tied weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()
        self.again = self.a
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.again(F.silu(self.a(x))))) + self.a(x)


class ResidualOfResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = ConvBnRelu(), conv(), conv()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.b(self.a(x)) + x
        z = self.c(self.relu(y)) + y  # y was written by relu
        return self.relu(z + x)


class InPlaceAdd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = ConvBnRelu(), ConvBnRelu()

    def forward(self, x):
        y = self.a(x)
        z = self.b(y)
        z += y
        z.add_(1.5)
        z.mul_(y)
        return torch.clamp_(z, -1.0, 3.0)


class Branches(nn.Module):
    """Branches that are joined, a value that leaves twice, a tuple and a dictionary."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = ConvBnRelu(6, 5), ConvBnRelu(6, 7, 1), nn.MaxPool3d(3, 1, 1)
        self.last = conv(18, 4)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x), self.c(x)], dim=1)
        first, *rest = y.chunk(3, dim=1)
        return {"y": self.last(y), "parts": (first, rest[0] * 2), "shape": y.shape, "same": y}


class Activations(nn.Module):
    """As modules, functions, methods and in place; one that no kernel has."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(conv() for _ in range(7))
        self.hardswish = nn.Hardswish(inplace=True)
        self.silu = nn.SiLU()

    def forward(self, x):
        a, b, c, d, e, f, g = self.convs
        x = F.hardswish(a(x)) + self.hardswish(b(x))
        x = self.silu(c(x)) - torch.sigmoid(d(x))
        x = e(x)
        return F.gelu(f(x * torch.sigmoid(x))) + g(x).relu_()


class Excite(nn.Module):
    """Squeeze and excitation in front of a pointwise convolution, and the bare forms of it."""

    def __init__(self, act):
        super().__init__()
        self.depthwise = conv(20, 20, groups=20)
        self.bn = nn.BatchNorm3d(20)
        self.reduce, self.expand = nn.Conv3d(20, 8, 1), nn.Conv3d(8, 20, 1)
        self.project = nn.Conv3d(20, 20, 1)
        self.act = act

    def forward(self, x):
        y = self.bn(self.depthwise(x))
        gate = y.mean((2, 3, 4), keepdim=True)
        gate = self.expand(self.reduce(gate).relu()).sigmoid()
        return self.project(self.act(gate * y)) + x


class Pads(nn.Module):
    """Constant pads that a convolution can take, and pads that it cannot."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv3d(6, 6, 3) for _ in range(3))
        self.zero = nn.ConstantPad3d((1, 2, 0, 1, 2, 0), 0.0)

    def forward(self, x):
        x = self.a(F.pad(x, (1, 1, 1, 1, 1, 1)))
        y = self.b(self.zero(x))
        return y, self.c(F.pad(x, (1, 1, 1, 1, 1, 1), value=2.0)), F.pad(x, (0, 1))


class Looks(nn.Module):
    """Cannot be recorded: what it does depends on the numbers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = ConvBnRelu(), ConvBnRelu()

    def forward(self, x):
        return self.up(x) if x.mean() > 0 else self.down(x) - 1


class HasLooks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.looks, self.last = ConvBnRelu(), Looks(), ConvBnRelu()

    def forward(self, x):
        return self.last(self.looks(self.first(x)))


class Shifts(nn.Module):
    """Writes slices, as temporal shift does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = ConvBnRelu(), ConvBnRelu()

    def forward(self, x):
        x = self.a(x)
        y = torch.zeros_like(x)
        y[:, :2, 1:] = x[:, :2, :-1]
        y[:, 2:] = x[:, 2:]
        return self.b(y)


class Shapes(nn.Module):
    """Control flow and padding by shapes."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(conv() for _ in range(3))

    def forward(self, x):
        for i in range(x.shape[2] % 4 + 1):
            x = self.convs[i % 3](x)
        c, *size = x.shape[1:]
        rows = F.pad(x, [s % 2 for s in size for _ in (0, 1)][::-1])
        return rows.view(rows.size(0), c, -1).transpose(1, 2) @ x.new_ones(c, 2)


class Counts(nn.Module):
    """Writes a buffer, and is a model of its own for 2D inputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)
        )

    def forward(self, x):
        self.calls += 1
        return self.net(x) + self.calls


class Own(torch.autograd.Function):
    """Swish with a memory-saving backward, as video libraries write it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = ConvBnRelu()

    def forward(self, x):
        return Own.apply(self.a(x)).contiguous().view(x.shape[0], -1)


MODELS = {
    "odd order": OddOrder,
    "shared": SharedConv,
    "residual of residual": ResidualOfResidual,
    "in place": InPlaceAdd,
    "branches": Branches,
    "activations": Activations,
    "pads": Pads,
    "control flow by numbers": HasLooks,
    "control flow at the top": Looks,
    "slices written": Shifts,
    "shapes": Shapes,
    "own function": OwnFunction,
    "separable": lambda: nn.Sequential(
        nn.Conv3d(6, 24, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(24),
        nn.ReLU(),
        nn.Conv3d(24, 24, (1, 3, 3), padding=(0, 1, 1), groups=24),
        nn.ReLU(),
        nn.Conv3d(24, 8, 1),
        nn.BatchNorm3d(8),
    ),
    "pools": lambda: nn.Sequential(
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        nn.AvgPool3d((2, 2, 3), 1, (1, 1, 1)),
        nn.AvgPool3d((2, 2, 3), 1, (1, 1, 1), count_include_pad=False),
        nn.MaxPool3d(2, 2, ceil_mode=True),
    ),
    "classifier": lambda: nn.Sequential(
        ConvBnRelu(6, 17),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(17, 9),
        nn.BatchNorm1d(9),
        nn.Hardswish(),
        nn.Linear(9, 4),
        nn.Softmax(1),
    ),
    "derived": lambda: nn.Sequential(type("Mine", (nn.Conv3d,), {})(6, 6, 3), nn.ReLU6()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose3d(6, 6, 2, 2), ConvBnRelu(), nn.GELU()),
    "reflect": lambda: nn.Sequential(conv(padding_mode="reflect"), nn.InstanceNorm3d(6)),
}


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_models_own(name, fold):
    torch.manual_seed(1)
    model = randomized(MODELS[name]())
    x = torch.randn(2, 6, *SIZE)
    kept = x.clone()
    new, report = fastconv.accelerate(model, x, fold=fold)
    assert type(new) is type(model)
    assert report.error <= report.allowed
    for args in ((x,), (-x,), (x.contiguous(memory_format=torch.channels_last_3d),)):
        close(run(new, *args), run(model, *args))
    other = torch.randn(1, 6, 5, 9, 11)  # a shape that comes later
    close(run(new, other), run(model, other))
    close(run(new, x), run(model, x))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("act", [nn.Identity(), nn.SiLU(inplace=True), nn.ReLU(), nn.Hardswish()])
def test_squeeze_and_excitation_is_part_of_the_next_convolution(act):
    torch.manual_seed(2)
    model = randomized(nn.Sequential(Excite(act), Excite(act)))
    x = torch.randn(2, 20, *SIZE)
    new, report = fastconv.accelerate(model, x)
    close(run(new, x), run(model, x))
    if backends.available()["c"] is None:
        fused = {layer.name: layer.fused for layer in report.layers}
        assert fused["0.project"][0] == "scaled input"
        assert fused["0.project"][-1] == "sum"
        assert fused["0.depthwise"] == ("batch norm",)
        assert fused["1.expand"] == ("sigmoid",)
        assert report.others == ()


@needs_c
def test_a_block_is_as_many_passes_as_convolutions():
    torch.manual_seed(3)
    model = randomized(nn.Sequential(OrderedDict(a=ResidualOfResidual(), b=Branches())))
    _, report = fastconv.accelerate(model, torch.randn(1, 6, *SIZE))
    fused = {layer.name: layer.fused for layer in report.layers}
    assert fused["a.a.0"] == ("batch norm", "relu")
    assert fused["a.b"] == ("sum", "relu")
    assert fused["a.c"] == ("sum",)
    assert report.traced
    assert dict(report.others).keys() == {"chunk", "mul"}


def test_fold_false_leaves_the_weights():
    model = randomized(ConvBnRelu())
    x = torch.randn(1, 6, *SIZE)
    _, report = fastconv.accelerate(model, x, fold=False)
    assert report.layers[0].fused == ()


def test_stays_and_reasons_are_told():
    model = randomized(HasLooks())
    x = torch.randn(1, 6, *SIZE)
    new, report = fastconv.accelerate(model, x)
    assert report.traced
    ((name, reason),) = report.stays
    assert name == "looks"
    assert "numbers in a tensor" in reason
    assert f"looks stays as it is: {reason}" in str(report)
    # Its children are accelerated, whichever of them runs.
    assert {f.module for f in forwards(new)} == {new, new.looks.up, new.looks.down}
    for other in (x + 3, x - 3):
        close(run(new, other), run(model, other))


def test_a_model_that_writes_a_buffer_keeps_writing_it():
    model = Counts().eval()
    x = torch.randn(2, 3, 12, 14)
    new, report = fastconv.accelerate(copy.deepcopy(model), x, check=False)
    assert not report.traced
    new.calls.zero_()
    for i in range(1, 4):
        close(run(new, x), run(model, x))
        assert new.calls.item() == i


def test_hooks_are_honoured():
    torch.manual_seed(4)
    model = randomized(nn.Sequential(ConvBnRelu(), ConvBnRelu()))
    x, seen = torch.randn(1, 6, *SIZE), []
    model[0][0].register_forward_hook(lambda module, args, y: seen.append(y.sum()) or y + 1)
    new, report = fastconv.accelerate(model, x)
    assert ("0.0", "has hooks") in report.stays
    seen.clear()
    close(run(new, x), run(model, x))
    assert len(seen) == 2
    later = []
    handle = new[1][1].register_forward_hook(lambda *_: later.append(1))
    new[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    close(run(new, x), run(model, x))
    assert later == [1]
    handle.remove()


def test_an_input_that_is_written_stays_written():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv3d(6, 6, 1)).eval()
    x = torch.randn(1, 6, *SIZE)
    new, report = fastconv.accelerate(model, x.clone(), check=False)
    assert not report.traced
    mine, theirs = x.clone(), x.clone()
    close(run(new, mine), run(model, theirs))
    assert torch.equal(mine, theirs)
    assert mine.min() >= 0


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = ConvBnRelu(), ConvBnRelu(3, 6)

    def forward(self, x, y, *, twice=False, scale: float = 1.0):
        z = (self.a(x) + self.b(y)) * scale
        return (z, z) if twice else z


def test_signature_several_inputs_and_keywords():
    torch.manual_seed(5)
    model = randomized(Several())
    x, y = torch.randn(1, 6, *SIZE), torch.randn(1, 3, *SIZE)
    new, report = fastconv.accelerate(model, (x, y))
    assert report.traced
    for other in (new, copy.deepcopy(new)):
        assert inspect.signature(other.forward) == inspect.signature(model.forward)
    close(run(new, x, y), run(model, x, y))
    with torch.no_grad():
        close(new(x, y, twice=True, scale=0.5), model(x, y, twice=True, scale=0.5))
        close(new(x=x, y=y), model(x, y))
        with pytest.raises(TypeError):
            new(x)


def test_layout_of_the_output_is_the_inputs():
    model = randomized(nn.Sequential(ConvBnRelu(6, 20)))
    x = torch.randn(1, 6, *SIZE)
    new, _ = fastconv.accelerate(model, x)
    assert run(new, x).is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert run(new, last).is_contiguous(memory_format=torch.channels_last_3d)
    strided = torch.randn(1, 12, *SIZE)[:, ::2]
    close(run(new, strided), run(model, strided))


def test_outputs_are_not_memory_that_is_used_again():
    torch.manual_seed(6)
    model = randomized(Branches())
    x = torch.randn(1, 6, *SIZE)
    new, _ = fastconv.accelerate(model, x)
    first = run(new, x)
    kept = [t.clone() for t in leaves(first)]
    run(new, torch.randn_like(x))
    for a, b in zip(leaves(first), kept, strict=True):
        assert torch.equal(a, b)
    for t in leaves(first):
        t.fill_(7.0)  # and writing them does no harm
    close(run(new, x), run(model, x))


def test_training_mode_runs_the_modules_with_gradients():
    torch.manual_seed(7)
    model = randomized(nn.Sequential(ConvBnRelu(), conv(6, 2)))
    x = torch.randn(2, 6, *SIZE)
    new, _ = fastconv.accelerate(copy.deepcopy(model), x)
    for m in (model, new):
        m.train()
        optimiser = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            m(x).square().mean().backward()
            optimiser.step()
        m.eval()
    for (name, a), (_, b) in zip(new.state_dict().items(), model.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    close(run(new, x), run(model, x))  # with the weights and statistics of now
    with torch.enable_grad():
        assert new(x).requires_grad  # also in eval mode
    new[0][1].train()  # one batch norm alone
    model[0][1].train()
    close(run(new, x), run(model, x))


WRITES = {
    "in place": lambda m: m[0][0].weight.mul_(2),
    "statistics": lambda m: m[0][1].running_var.add_(1),
    "replaced": lambda m: setattr(m[0][0], "weight", nn.Parameter(m[0][0].weight * 3)),
    "data": lambda m: setattr(m[0][0].weight, "data", m[0][0].weight.data * 3),
    "through data": lambda m: m[0][0].weight.data.mul_(3),
    "statistics through data": lambda m: m[0][1].running_mean.data.add_(3),
    "through an array": lambda m: np.multiply(w := m[0][0].weight.detach().numpy(), 3, out=w),
    "some elements, and told": lambda m: (
        m[0][0].weight.data[1, 1, 1].mul_(9),
        [forward.forget_plans() for forward in forwards(m)[:1]],
    ),
    "state dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "module": lambda m: m[0].__setitem__(2, nn.Sigmoid()),
}


@pytest.mark.parametrize("write", WRITES)
def test_weights_that_are_written_are_seen(write):
    torch.manual_seed(8)
    model = randomized(nn.Sequential(ConvBnRelu()))
    x = torch.randn(1, 6, *SIZE)
    new, _ = fastconv.accelerate(copy.deepcopy(model), x)
    close(run(new, x), run(model, x))
    with torch.no_grad():
        for m in (model, new):
            WRITES[write](m)
    close(run(new, x), run(model, x))


def test_copies_files_and_state_dicts():
    torch.manual_seed(9)
    model = randomized(HasLooks())
    x = torch.randn(1, 6, *SIZE)
    new, _ = fastconv.accelerate(model, x)
    want = run(new, x)
    assert new.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(new.parameters(), model.parameters(), strict=True))
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), loaded):
        assert other.first[0].weight is not new.first[0].weight
        with torch.no_grad():
            other.first[0].weight.zero_()
        assert not torch.equal(run(other, x), want)
        other.load_state_dict(model.state_dict())
        assert torch.equal(run(other, x), want)
    assert torch.equal(run(new, x), want)


def test_threads_do_not_share_memory():
    torch.manual_seed(10)
    model = randomized(nn.Sequential(Excite(nn.SiLU()), ConvBnRelu(20, 9)))
    xs = [torch.randn(1, 20, 3 + i % 2, 8, 9) for i in range(6)]
    new, _ = fastconv.accelerate(model, xs[0])
    want = [run(model, x) for x in xs]
    wrong: list[float] = []

    def serve(first):
        for i in range(first, first + 12):
            off = (run(new, xs[i % 6]) - want[i % 6]).abs().max()
            wrong.append(float(off)) if off > 1e-4 else None

    workers = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_other_precisions_and_empty_batches_are_pytorchs():
    model = randomized(nn.Sequential(ConvBnRelu()))
    x = torch.randn(1, 6, *SIZE)
    new, _ = fastconv.accelerate(model, x)
    assert run(new, x[:0]).shape == (0, 6, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(new, x).dtype == run(model, x).dtype == torch.bfloat16
    double, _ = fastconv.accelerate(copy.deepcopy(model).double(), x.double())
    torch.testing.assert_close(run(double, x.double()), run(model.double(), x.double()))


WRONG = {
    "rank": lambda x: x[0, 0],
    "channels": lambda x: x[:, :3],
    "precision": lambda x: x.double(),
    "integers": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "an array": lambda x: x.numpy(),
    "nothing": lambda x: None,
}
UNUSUAL = {
    "overlapping": lambda x: torch.randn(2000).as_strided(x.shape, (0, 100, 20, 3, 1)),
    "negated": lambda x: torch.complex(x, x).conj().imag,
    "expanded": lambda x: x[:, :, :1].expand_as(x),
    "NaN": lambda x: x.masked_fill(x > 1, float("nan")),
    "infinite": lambda x: x.masked_fill(x > 1, float("inf")),
    "another batch": lambda x: x.expand(3, -1, -1, -1, -1),
    "a parameter": lambda x: nn.Parameter(x.clone()),
}


def test_what_is_wrong_is_refused_and_what_is_unusual_is_served():
    model = randomized(nn.Sequential(conv(6, 6), nn.ReLU(), nn.Conv3d(6, 5, 1)))
    x = torch.randn(1, 6, *SIZE)
    new, _ = fastconv.accelerate(model, x)
    want = run(new, x)
    for change in WRONG.values():
        with pytest.raises((NotImplementedError, ValueError)):
            run(new, change(x))
    assert torch.equal(run(new, x), want)
    for change in UNUSUAL.values():
        other = change(x)
        torch.testing.assert_close(
            run(new, other), run(model, other), rtol=1e-4, atol=1e-4, equal_nan=True
        )


def test_a_compiled_or_exported_copy_is_the_model():
    model = randomized(nn.Sequential(ConvBnRelu(), nn.AdaptiveAvgPool3d(1)))
    x = torch.randn(1, 6, *SIZE)
    new, _ = fastconv.accelerate(model, x)
    with torch.no_grad():
        exported = torch.export.export(new, (x,), strict=False)
        close(exported.module()(x), model(x))
        close(torch.compile(new, backend="eager")(x), model(x))


def test_vmap_runs_the_modules():
    model = randomized(nn.Sequential(nn.Conv3d(6, 6, 1, bias=False), nn.ReLU()))
    new, _ = fastconv.accelerate(model, torch.randn(1, 6, *SIZE))
    xs = torch.randn(3, 1, 6, *SIZE)
    with torch.no_grad():
        try:
            got = torch.func.vmap(new)(xs)
        except Exception:  # the convolution may refuse; the program may not be used
            return
        close(got, torch.func.vmap(model)(xs))


def test_numbers_that_were_baked_in_are_found():
    class Secret(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            from fastconv import torch_ops

            with torch.utils._python_dispatch._disable_current_modes():
                shift = float(x.double()[0, 0, 0, 0, 0])  # unseen
            assert torch_ops is not None
            return self.conv(x) + shift

    with pytest.raises(UnsupportedError, match="on the mirrored example input the models differ"):
        fastconv.accelerate(Secret().eval(), torch.randn(1, 6, *SIZE))


def test_times_are_measured_when_asked_for():
    model = randomized(nn.Sequential(ConvBnRelu(), ConvBnRelu()))
    x = torch.randn(1, 6, *SIZE)
    _, report = fastconv.accelerate(model, x, times=True)
    assert all(layer.ms is not None and layer.ms > 0 for layer in report.layers)
    assert str(report).splitlines()[0].endswith("ms")
    assert fastconv.accelerate(model, x)[1].layers[0].ms is None
