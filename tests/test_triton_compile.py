"""Every Triton kernel compiled ahead of time, without a GPU: registers, shared memory, addresses.

Default configurations on layers of networks and on odd ones. Nothing spills but what `SPILLED`
lists, everything fits the chip, and no integer overflows in arrays beyond 2^31 elements.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fastconv.backends import installed, interpreted
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.plan import CHANNELS_LAST, CONTIGUOUS, Plan
from fastconv.transforms import transform

if not (installed("torch") and installed("triton")):
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

FULL = Epilogue(True, "silu", True)
BIAS = Epilogue(True, "relu")
FLOAT, HALF, BRAIN = "float32", "float16", "bfloat16"
# Besides sm_90, for the first plans of each family: so many of them.
SEVERAL = {"sm_80": 2, "sm_100": 2, "gfx942": 1}


def conv(x, w, stride=1, padding="same", dilation=1, groups=1) -> Geometry:
    if padding == "same" and stride != 1:
        padding = tuple(k // 2 for k in w[2:])
    return Geometry.of(x, w, stride, padding, dilation, groups)


def grouped_like(family, x, w, dtype=FLOAT, layout=CHANNELS_LAST, precision="ieee", **options):
    epilogue = FULL if dtype == FLOAT else BIAS
    geometry = conv(x, w, **options)
    return Plan(family, "triton", geometry, dtype, epilogue, layout, precision=precision)


def depthwise(x, taps, *rest, multiplier=1, **options) -> Plan:
    w = (multiplier * x[1], 1, *taps)
    return grouped_like("depthwise", x, w, *rest, groups=x[1], **options)


def grouped(x, w, *rest, **options) -> Plan:
    return grouped_like("grouped", x, w, *rest, **options)


def winograd(x, w, m, *rest, **options) -> Plan:
    p = grouped_like("winograd", x, w, *rest, **options)
    taps = zip(p.geometry.kernel, p.geometry.stride, strict=True)
    ts = tuple(transform(a, -(-r // s)) for a, (r, s) in zip(m, taps, strict=True))
    return replace(p, transforms=ts)


def continual(x, w, dtype=FLOAT, layout=CHANNELS_LAST, **options) -> Plan:
    """x (N, C, frames of the window, *frame); no padding in time."""
    space = tuple(k // 2 for k in w[3:])
    geometry = conv(x, w, padding=(0, *space), **options)
    return Plan("continual", "triton", geometry, dtype, FULL, layout)


def hfa(x, channels, taps, m, dtype=FLOAT, layout=CHANNELS_LAST, precision="ieee", **options):
    (c, mid, k), (kt, kh, kw) = (x[1], *channels), taps
    shapes = (mid, c, kt, 1, 1), (mid, 1, 1, kh, kw), (k, mid, 1, 1, 1)
    g = SeparableGeometry.of(x, *shapes, **options)
    stride = g.temporal.stride[0]
    ts = transform(m, -(-kt // stride)), transform(1, kh), transform(1, kw)
    epilogues = (BIAS, Epilogue(True, "hardswish"), FULL if dtype == FLOAT else BIAS)
    return Plan("hfa", "triton", g, dtype, epilogues, layout, transforms=ts, precision=precision)


PLANS = {
    "depthwise": [
        depthwise((1, 54, 16, 56, 56), (3, 3, 3)),
        depthwise((8, 108, 16, 28, 28), (3, 3, 3), BRAIN),
        depthwise((8, 216, 16, 14, 14), (3, 3, 3), HALF, CONTIGUOUS),
        depthwise((1, 108, 16, 56, 56), (3, 3, 3), FLOAT, stride=(1, 2, 2)),
        depthwise((1, 24, 16, 112, 112), (5, 1, 1)),
        depthwise((1, 128, 16, 56, 56), (1, 3, 3), FLOAT, CONTIGUOUS),
        depthwise((2, 17, 9, 13, 11), (3, 3, 3), FLOAT, stride=2, dilation=2, padding=3),
        depthwise((2, 3, 40, 37), (5, 4), BRAIN, multiplier=2),
        depthwise((2, 5, 100), (7,), FLOAT, CONTIGUOUS),
    ],
    "grouped": [
        grouped((1, 96, 8, 56, 56), (96, 6, 3, 3, 3), FLOAT, groups=16),
        grouped((8, 192, 8, 28, 28), (192, 12, 3, 3, 3), BRAIN, groups=16),
        grouped((1, 256, 8, 28, 28), (256, 8, 3, 3, 3), FLOAT, CONTIGUOUS, groups=32),
        grouped((1, 256, 8, 28, 28), (256, 8, 1, 3, 3), FLOAT, CHANNELS_LAST, "tf32", groups=32),
        grouped((1, 3, 16, 112, 112), (64, 3, 3, 7, 7), FLOAT, stride=(1, 2, 2)),
        grouped((8, 64, 16, 56, 56), (128, 64, 1, 1, 1), HALF),
        grouped((2, 51, 9, 13, 11), (34, 3, 3, 3, 2), FLOAT, groups=17, stride=2, padding=1),
        grouped((2, 1, 30), (1, 1, 3), BRAIN, CONTIGUOUS, dilation=2),
    ],
    "winograd": [
        winograd((1, 64, 16, 56, 56), (128, 64, 3, 3, 3), (2, 4, 4)),
        winograd((1, 64, 16, 56, 56), (144, 64, 1, 3, 3), (1, 4, 4)),
        winograd((8, 256, 8, 28, 28), (256, 256, 3, 3, 3), (4, 4, 4), FLOAT, CONTIGUOUS),
        winograd((1, 144, 16, 56, 56), (64, 144, 3, 1, 1), (4, 1, 1)),
        winograd((1, 64, 16, 56, 56), (64, 64, 1, 3, 3), (1, 2, 2), HALF),
        winograd((1, 64, 8, 28, 28), (64, 64, 3, 3, 3), (2, 2, 2), FLOAT, CHANNELS_LAST, "tf32"),
        winograd((2, 17, 9, 13, 11), (1, 17, 3, 3, 3), (2, 2, 2), FLOAT, stride=(1, 2, 2)),
        winograd((2, 3, 33), (17, 3, 5), (2,), FLOAT, CONTIGUOUS),
    ],
    "hfa": [
        hfa((8, 64, 16, 56, 56), (64, 64), (3, 3, 3), 2),
        hfa((8, 128, 16, 56, 56), (128, 128), (3, 3, 3), 1, BRAIN),
        hfa((1, 256, 8, 28, 28), (256, 256), (3, 3, 3), 4),
        hfa((1, 256, 8, 28, 28), (256, 256), (3, 3, 3), 1, HALF, CONTIGUOUS),
        hfa((8, 64, 16, 56, 56), (64, 64), (3, 3, 3), 4, FLOAT, CONTIGUOUS, "tf32"),
        hfa((8, 64, 16, 56, 56), (64, 64), (3, 3, 3), 4, HALF),
        hfa((1, 128, 8, 28, 28), (512, 128), (3, 3, 3), 1, FLOAT, CONTIGUOUS),
        hfa((1, 24, 16, 112, 112), (24, 54), (5, 1, 1), 2, BRAIN),
        hfa((2, 17, 9, 13, 11), (35, 21), (3, 5, 4), 2, FLOAT, stride=(2, 2, 1)),
        hfa((1, 1, 3, 4, 5), (1, 1), (1, 1, 1), 1, HALF, CONTIGUOUS),
    ],
    "continual": [
        continual((1, 54, 3, 56, 56), (54, 1, 3, 3, 3), groups=54),
        continual((1, 24, 3, 112, 112), (54, 24, 3, 1, 1)),
        continual((8, 108, 5, 28, 28), (108, 1, 5, 3, 3), BRAIN, groups=108, stride=(1, 2, 2)),
        continual((2, 17, 5, 13, 11), (34, 17, 3, 3, 3), FLOAT, CONTIGUOUS, dilation=(2, 1, 1)),
    ],
}
# Arrays of more than 2^31 elements: in the batch, in a channel, in a frame, in a row.
WIDE = {
    "depthwise": [
        depthwise((300, 64, 40, 64, 64), (3, 3, 3)),
        depthwise((1, 17, 3000, 300, 200), (3, 3, 3), BRAIN, CONTIGUOUS, stride=(1, 2, 2)),
        depthwise((1, 1, 2, 60000, 30000), (1, 3, 3), BRAIN),
    ],
    "grouped": [
        grouped((300, 64, 40, 64, 64), (64, 4, 3, 3, 3), BRAIN, groups=16),
        grouped((1, 34, 2000, 300, 200), (34, 2, 3, 3, 3), FLOAT, CONTIGUOUS, groups=17),
        grouped((1, 2, 2, 60000, 30000), (16, 2, 1, 1, 1), BRAIN, CONTIGUOUS),
    ],
    "winograd": [
        winograd((300, 64, 40, 64, 64), (64, 64, 3, 3, 3), (2, 2, 2)),
        winograd((1, 16, 3000, 300, 200), (16, 16, 1, 3, 3), (1, 4, 4), FLOAT, CONTIGUOUS),
    ],
    "hfa": [
        hfa((300, 64, 40, 64, 64), (64, 64), (3, 3, 3), 1, BRAIN),
        hfa((1, 17, 3000, 300, 200), (17, 17), (3, 3, 3), 4, FLOAT, CONTIGUOUS),
        hfa((1, 1, 2, 60000, 30000), (1, 1), (3, 3, 3), 2),
        hfa((1, 2, 2, 60000, 30000), (2, 2), (1, 3, 3), 1, BRAIN, CONTIGUOUS),
    ],
    "continual": [
        continual((9, 64, 5, 1000, 1000), (64, 1, 5, 3, 3), groups=64),
        continual((3, 17, 3, 10000, 5000), (17, 17, 3, 1, 1), BRAIN, CONTIGUOUS),
    ],
}
# Bytes per thread that kernels spill on some of these plans, at most; every other kernel none.
SPILLED = {
    "grouped_tiles": 8,  # the input gradient of 17 groups of 3 channels
    "grouped_weight_sums": 24,  # the windows of 3x7x7 of a stem
    "hfa_spatial_kernel": 8,  # 128 channels in bfloat16 on sm_80
    "winograd_product": 16,  # F(2, 4, 4) in float32 on sm_100
}
GRADIENTS = {"depthwise": (0, 2, 3, 6, 7), "grouped": (0, 1, 2, 4, 6)}
DIRECTIONS = ("input_gradient", "weight_gradient")


def exists(module: str) -> bool:
    return importlib.util.find_spec(f"fastconv.triton_kernels.{module}") is not None


@dataclass(frozen=True)
class Job:
    """A plan, or a gradient of it, for a chip."""

    plan: Plan
    chip: str = "sm_90"
    gradient: str | None = None

    @property
    def id(self) -> str:
        g, p = self.plan.geometry, self.plan
        first = g.temporal if isinstance(g, SeparableGeometry) else g
        shapes = ("x".join(map(str, s)) for s in (first.x_shape, first.w_shape))
        tile = "".join(f"-m{'x'.join(map(str, p.tile))}" for _ in p.tile[:1])
        what = self.gradient or p.family
        last = "" if p.layout == CHANNELS_LAST else "-contiguous"
        precision = "-tf32" if p.precision == "tf32" else ""
        return f"{self.chip}-{what}-{'-'.join(shapes)}{tile}-{p.dtype}{precision}{last}"


def _jobs(table: dict[str, list[Plan]], every: bool) -> list[Job]:
    """Of the families that there are; `every` chip and gradient, or sm_90 and the first plans."""
    found = []
    for family, plans in table.items():
        if exists(family):
            found += [Job(p) for p in plans]
            found += [Job(p, c) for c, n in SEVERAL.items() for p in plans[:n] if every]
        if exists(f"{family}_gradients"):
            chosen = [plans[i] for i in GRADIENTS[family]] if every else plans[:2]
            found += [Job(p, "sm_90", d) for p in chosen for d in DIRECTIONS]
    return found


LAYERS, LARGE = _jobs(PLANS, True), _jobs(WIDE, False)


def _started(job: Job) -> Any:
    """The kernel starts of a job, or what its module raised: a failure of this job's test alone."""
    import ptx

    try:
        return ptx.starts(job.plan, job.gradient)
    except Exception as error:
        return error


def _report(started: Any, job: Job) -> list[tuple]:
    """Per kernel start its name, its `Needs` (not of a large job), and steps that may overflow."""
    import addresses
    import ptx

    if isinstance(started, Exception):
        raise started
    # A kernel started for part after part of an array: the last part is the farthest.
    last = {(id(s.launch.kernel), s.launch.constants): s for s in started}
    found = []
    for start in last.values():
        needs, name = None, start.launch.kernel.__name__
        if job in LARGE:
            ttir = start.ttir()
        else:
            code = start.compiled(job.chip)
            ttir, needs = code.asm["ttir"], ptx.needs(code, job.chip)
        found.append((name, needs, addresses.overflows(ttir, start.launch)))
    return found


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """`_report` of the jobs by id, as they come from two threads, in a cache of their own."""
    cache = str(tmp_path_factory.mktemp("triton"))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("TRITON_CACHE_DIR", cache)
        calls = [getattr(item, "callspec", None) for item in request.session.items]
        jobs = [call.params["job"] for call in calls if call and "job" in call.params]
        yield {job.id: pool.submit(_report, _started(job), job) for job in jobs}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("job", LAYERS, ids=lambda job: job.id)
def test_registers_and_shared_memory_suffice(job, reports):
    from ptx import SHARED_BYTES

    found = reports[job.id].result()
    assert found, "no kernel is started"
    for name, needs, overflows in found:
        assert needs.stack_bytes <= SPILLED.get(name, 0), f"{name} spills: {needs}"
        # Short of tensor memory, Triton 3.6 leaves a kernel that returns at once, and says nothing.
        assert needs.stores, f"{name} stores nothing"
        assert needs.shared_bytes <= SHARED_BYTES[job.chip], f"{name}: {needs}"
        assert overflows == [], name


@pytest.mark.parametrize("job", LARGE, ids=lambda job: job.id)
def test_no_address_overflows(job, reports):
    found = reports[job.id].result()
    assert found, "no kernel is started"
    assert {name: overflows for name, _, overflows in found if overflows} == {}


def test_the_reader_of_intervals_sees_overflows(monkeypatch):
    """The same block, its kernels told that 32 bits are enough."""
    import addresses
    import ptx
    from fastconv.triton_kernels import hfa as module

    monkeypatch.setattr(module.launch, "wide", lambda *elements: False)
    module.launches.cache_clear()
    try:
        first, second = ptx.starts(WIDE["hfa"][1])
        for start in (first, second):
            assert addresses.overflows(start.ttir(), start.launch)
    finally:
        module.launches.cache_clear()
