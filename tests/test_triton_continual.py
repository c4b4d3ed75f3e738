"""Continual steps in Triton: precisions, offsets beyond 32 bits, launches, what compiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import cases  # noqa: E402  (after the skips)
from fastconv.backends import available, interpreted  # noqa: E402
from fastconv.continual import FORMS, state_shape  # noqa: E402
from fastconv.epilogue import Epilogue  # noqa: E402
from fastconv.geometry import Geometry  # noqa: E402
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan  # noqa: E402
from fastconv.triton_kernels import continual  # noqa: E402

runs = pytest.mark.skipif(available()["triton"] is not None, reason="no GPU, no interpreter")
DEVICE = "cpu" if interpreted() else "cuda"
forms = pytest.mark.parametrize("form", FORMS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# Frame, weight, groups: element by element and by products of blocks, with tails of both.
KINDS = {
    "depthwise": ((2, 7, 3, 5), (7, 1, 3, 3, 3), 7),
    "multiplier": ((1, 3, 3, 5), (6, 1, 2, 2, 3), 3),
    "few_per_group": ((1, 6, 3, 5), (9, 2, 2, 3, 3), 3),
    "dense": ((1, 17, 3, 5), (19, 17, 2, 3, 1), 1),
    "grouped": ((1, 12, 4, 5), (10, 6, 3, 1, 1), 2),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def plan_of(kind, form="ring", layout=CHANNELS_LAST, dtype="float32", **changes) -> Plan:
    frame, w, groups = kind
    geometry = Geometry.of(
        (*frame[:2], w[2], *frame[2:]), w, 1, (0, w[3] // 2, w[4] // 2), 1, groups
    )
    config = (("sum", 1),) if form == "sum" else ()
    plan = Plan("continual", "triton", geometry, dtype, Epilogue(True, "relu"), layout, DEVICE)
    return replace(plan, config=config, **changes)


def laid_out(tensor, layout):
    last = layout == CHANNELS_LAST
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor.contiguous()


def play(plan: Plan, frames, w, bias) -> torch.Tensor:
    """The columns (N, K, T, *out_frame) of frames (N, C, T, *frame)."""
    dtype = getattr(torch, plan.dtype)
    n, k, _, *out = plan.geometry.y_shape
    sums = bool(plan.options.get("sum"))
    shape = state_shape(plan.geometry, "sum" if sums else "ring")
    state = torch.zeros(shape, dtype=torch.float32 if sums else dtype, device=plan.device)
    state, steps = laid_out(state, plan.layout), torch.zeros(n, dtype=torch.int64)
    steps = steps.to(plan.device)
    size = continual.workspace_size(plan)
    scratch = torch.empty(size, dtype=dtype, device=plan.device) if size else None
    packed, columns = continual.prepack(w, plan), []
    for t in range(frames.shape[2]):
        y = laid_out(torch.full((n, k, *out), torch.nan, device=plan.device), plan.layout)
        y = y.to(dtype)
        x = laid_out(frames[:, :, t], plan.layout)
        continual.run(plan, x, packed, bias, None, state, steps, y, scratch)
        columns.append(y)
    assert (steps == frames.shape[2]).all()
    return torch.stack(columns, 2)


def arrays(plan: Plan, times: int):
    g, dtype = plan.geometry, getattr(torch, plan.dtype)
    shapes = (g.batch, g.in_channels, times, *g.in_size[1:]), g.w_shape, (g.out_channels,)
    return [
        torch.from_numpy(cases.random(shape, i)).to(plan.device, dtype)
        for i, shape in enumerate(shapes)
    ]


def clip_of(plan: Plan, frames, w, bias) -> torch.Tensor:
    g = plan.geometry
    padded = torch.nn.functional.pad(frames, (0, 0, 0, 0, g.in_size[0] - 1, 0))
    padding = [0, *(p for p, _ in g.padding[1:])]
    return torch.nn.functional.conv3d(padded, w, bias, 1, padding, 1, g.groups).relu()


@runs
@forms
@layouts
@kinds
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(kind, form, layout, dtype):
    """Products of halves are exact in float32; the result is rounded to half a unit."""
    plan = plan_of(kind, form, layout, dtype)
    frames, w, bias = arrays(plan, 4)
    y = play(plan, frames, w, bias).double()
    want = clip_of(plan, frames.double(), w.double(), bias.double())
    magnitude = clip_of(plan, frames.double().abs(), w.double().abs(), bias.double().abs())
    unit, terms = torch.finfo(getattr(torch, dtype)).eps / 2, np.prod(w.shape[1:])
    bound = unit * want.abs() + (terms + 8) * torch.finfo(torch.float32).eps * magnitude.max()
    assert ((y - want).abs() <= bound).all()


@runs
@forms
@layouts
@kinds
def test_offsets_of_64_bits_give_the_same(kind, form, layout, monkeypatch):
    plan = plan_of(kind, form, layout)
    given = arrays(plan, 3)
    want = play(plan, *given)
    monkeypatch.setattr(continual.launch, "wide", lambda *sizes: True)
    for cached in (continual._structure, continual._launches):
        cached.cache_clear()
    got = play(plan, *given)
    for cached in (continual._structure, continual._launches):
        cached.cache_clear()
    assert torch.equal(got, want)


@runs
@kinds
@pytest.mark.parametrize("config", continual.CONFIGS[1:], ids=str)
def test_every_configuration(kind, config):
    plan = plan_of(kind)
    given = arrays(plan, 3)
    want = clip_of(plan, *(a.double() for a in given))
    got = play(replace(plan, config=tuple(sorted(config.items()))), *given)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@runs
@kinds
def test_infinite_inputs_stay_in_their_group(kind):
    plan = plan_of(kind)
    frames, w, bias = arrays(plan, 3)
    g = plan.geometry
    frames[:, : g.in_channels // g.groups] = torch.inf
    with np.errstate(invalid="ignore"):  # inf - inf, in the interpreter
        y = play(plan, frames, w, bias)
    others = y[:, g.out_channels // g.groups :]
    assert torch.isfinite(others).all()


@runs
@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are of a GPU")
@forms
@layouts
def test_a_graph_replays_as_the_stream_goes_on(form, layout):
    """Capturing changes nothing, and every replay reads the count of frames that the last left."""
    plan = plan_of(KINDS["depthwise"], form, layout)
    frames, w, bias = arrays(plan, 7)
    want = play(plan, frames, w, bias)
    n, k, _, *out = plan.geometry.y_shape
    shape = state_shape(plan.geometry, form)
    state = laid_out(torch.zeros(shape, device=DEVICE), layout)
    steps = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    x, y = (
        laid_out(torch.zeros(s, device=DEVICE), layout)
        for s in (frames[:, :, 0].shape, (n, k, *out))
    )
    packed, size = continual.prepack(w, plan), continual.workspace_size(plan)
    scratch = torch.empty(size, device=DEVICE) if size else None
    active = torch.zeros(n, dtype=torch.bool, device=DEVICE)

    def step():
        continual.run(plan, x, packed, bias, None, state, steps, y, scratch, active)

    step()  # compiles; no stream is active
    assert not steps.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert not steps.any()
    active.fill_(True)
    for t in range(7):
        x.copy_(frames[:, :, t])
        graph.replay()
        assert torch.equal(y, want[:, :, t])
    assert steps.tolist() == [7] * n


@forms
@kinds
def test_launches_are_two_and_do_not_depend_on_extents(kind, form):
    plan = plan_of(kind, form)
    first, second = continual.launches(plan)
    frame, w, groups = kind
    larger = plan_of(((frame[0] + 1, frame[1], frame[2] + 8, frame[3] + 8), w, groups), form)
    config = (("pixels", 16), ("outs", 16), *plan.config)  # the rule for blocks reads extents
    one, other = (continual.launches(replace(p, config=config)) for p in (plan, larger))
    assert [a.kernel for a in one] == [a.kernel for a in other]
    assert second.arrays[-1] == ("seen" if form == "ring" else "active")
    assert first.programs > 0


@pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100])
@forms
def test_kernels_compile_for_a_gpu_without_one(capability, form):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    for kind, dtype in (("depthwise", "float32"), ("dense", "bfloat16")):
        plan = plan_of(KINDS[kind], form, dtype=dtype, device="cuda")
        names = {"state": "float32" if form == "sum" else dtype, "steps": "int64", "seen": "int64"}
        names |= dict.fromkeys(("x", "packed", "bias", "y"), dtype)
        names |= {"active": None, "residual": None}
        for launch in continual.launches(plan):
            target = GPUTarget("cuda", capability, 32)
            built = triton.compile(launch.source(names), target=target, options=launch.options)
            assert built.asm["cubin"]
