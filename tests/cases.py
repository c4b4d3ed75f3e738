"""Shared by all family tests: random geometries, arrays in both layouts, plans run in fences."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from fastconv.backends import available, interpreted, kernel
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.errors import GeometryError
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, LAYOUTS, Plan

FENCE = 64  # elements on both sides of every array a kernel may write


class OnIsa(str):
    """The C backend on one instruction set: a plan takes it for "c", `isa_of` knows better."""

    def __new__(cls, isa: str) -> OnIsa:
        name = super().__new__(cls, "c")
        name.isa = isa
        return name


def _c_backends() -> list[str]:
    """The best instruction set as plain "c", then the others."""
    if available()["c"] is not None:
        return []
    from fastconv.c_kernels import launch

    return ["c", *(OnIsa(name) for name in launch.instruction_sets() if name != launch.isa())]


def isa_of(plan: Plan) -> AbstractContextManager:
    """Packing under this context is for the instruction set that the plan's backend names."""
    if not isinstance(plan.backend, OnIsa):
        return nullcontext()
    from fastconv.c_kernels import launch

    return launch.forced(plan.backend.isa)


# FASTCONV_TEST_BACKENDS=c tests these alone, as sanitizers want it: they know no other code.
_wanted = os.environ.get("FASTCONV_TEST_BACKENDS", "reference numba torch c").split()
CPU_BACKENDS = [
    *(b for b in ("reference", "numba", "torch") if b in _wanted and available()[b] is None),
    *(b for b in _c_backends() if b in _wanted),
    # On a GPU if there is one, by the interpreter if that is asked for: tensors from `moved`.
    *(b for b in ("triton",) if b in _wanted and available()[b] is None),
]
FLOAT32_ONLY = ("c", "triton")  # of the precisions that NumPy has


def moved(array, plan: Plan):
    """An array, a tuple of them or None, as the plan's backend takes it: for Triton a tensor.

    On a GPU that is a copy, and `array` is not changed by what a kernel writes.
    """
    if plan.backend != "triton" or array is None:
        return array
    if isinstance(array, tuple):
        return tuple(moved(a, plan) for a in array)
    import torch

    return torch.from_numpy(array).to(plan.device)


def random(shape, seed: int, dtype="float32") -> np.ndarray:
    """Standard normal, so that sums cancel and errors show."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values and (N, C, *size) order, in memory as `layout` says."""
    if layout == CHANNELS_LAST:
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    return np.ascontiguousarray(array)


class Fenced:
    """A NaN-filled array between two sentinel zones; `check()` fails if they were written."""

    def __init__(self, shape, dtype="float32", layout="contiguous"):
        memory = shape
        if layout == CHANNELS_LAST:
            memory = (shape[0], *shape[2:], shape[1])
        size = int(np.prod(memory))
        self._store = np.full(size + 2 * FENCE, np.nan, dtype)
        self._store[:FENCE] = self._store[FENCE + size :] = 12345.0
        self._size = size
        self._memory, self._last = memory, layout == CHANNELS_LAST
        self.array = self._inner(self._store)

    def _inner(self, store):
        inner = store[FENCE : FENCE + self._size].reshape(self._memory)
        return np.moveaxis(inner, -1, 1) if self._last else inner

    @contextmanager
    def on(self, plan: Plan):
        """The array as the plan's backend takes it; what is written there comes back here."""
        if plan.backend != "triton":
            yield self.array
            return
        store = moved(self._store, plan)
        inner = store[FENCE : FENCE + self._size].reshape(self._memory)
        yield inner.movedim(-1, 1) if self._last else inner
        self._store[:] = store.cpu().numpy()

    def check(self) -> None:
        zones = self._store[:FENCE], self._store[FENCE + self._size :]
        assert all((z == 12345.0).all() for z in zones), "a kernel wrote outside its array"


def execute(plan: Plan, x, w, bias=None, residual=None) -> np.ndarray:
    """Run a winograd, depthwise, grouped or hfa plan on arrays in any layout, y fenced in NaN.

    For hfa, w and bias are tuples of three.
    """
    if plan.backend == "triton":
        plan = replace(plan, device="cpu" if interpreted() else "cuda")
    module = kernel(plan.family, plan.backend)
    reason = module.supports(plan.geometry, plan.dtype, plan.epilogue)
    assert reason is None, reason
    with isa_of(plan):
        packed = module.prepack(w, plan)
        workspace = Fenced((module.workspace_size(plan),), plan.dtype)
    y = Fenced(plan.geometry.y_shape, plan.dtype, plan.layout)
    x, residual = (a if a is None else laid_out(a, plan.layout) for a in (x, residual))
    before = x.copy()
    with y.on(plan) as out, workspace.on(plan) as scratch:
        inputs = (moved(x, plan), packed, moved(bias, plan), moved(residual, plan))
        module.run(plan, *inputs, out, scratch)
    y.check()
    workspace.check()
    assert np.array_equal(x, before, equal_nan=True), "the input was written"
    return y.array


@st.composite
def geometries(
    draw,
    n=None,
    family="grouped",
    max_size=9,
    max_channels=5,
    max_kernel=3,
    max_stride=2,
    max_dilation=2,
):
    """A valid random geometry: unequal axes, odd sizes, one-sided padding, batch 0 to 2."""
    n = draw(st.sampled_from((1, 2, 3))) if n is None else n

    def ints(low, high):
        return st.integers(low, high)

    def axes(low, high):
        return tuple(draw(ints(low, high)) for _ in range(n))

    kernel_size, stride = axes(1, max_kernel), axes(1, max_stride)
    dilation = (1,) * n if family in ("winograd", "hfa") else axes(1, max_dilation)
    if family == "depthwise":
        groups = draw(ints(1, max_channels))
        channels, outs = groups, groups * draw(ints(1, 3))
    elif family == "grouped":
        groups = draw(ints(1, 3))
        channels, outs = groups * draw(ints(1, max_channels)), groups * draw(ints(1, max_channels))
    else:
        groups, channels, outs = 1, draw(ints(1, max_channels)), draw(ints(1, max_channels))
    padding = tuple(draw(st.tuples(ints(0, 2), ints(0, 2))) for _ in range(n))
    size = tuple(
        max(draw(ints(1, max_size)), d * (k - 1) + 1 - sum(p))
        for k, d, p in zip(kernel_size, dilation, padding, strict=True)
    )
    batch = draw(st.sampled_from((1, 1, 2, 0)))
    try:
        return Geometry.of(
            (batch, channels, *size),
            (outs, channels // groups, *kernel_size),
            stride,
            padding,
            dilation,
            groups,
        )
    except GeometryError as error:  # the strategy builds valid geometries only
        raise AssertionError(f"strategy made an invalid geometry: {error}") from error


def epilogues():
    """Any Epilogue."""
    return st.builds(Epilogue, st.booleans(), st.sampled_from(ACTIVATIONS), st.booleans())


def layouts():
    return st.sampled_from(LAYOUTS)


def dtypes():
    return st.sampled_from(("float32", "float64"))


def arrays_for(plan: Plan, seed: int = 0):
    """x, w, bias, residual for a plan with a plain Geometry; None where the epilogue has none."""
    g = plan.geometry
    x, w = random(g.x_shape, seed, plan.dtype), random(g.w_shape, seed + 1, plan.dtype)
    bias = random((g.out_channels,), seed + 2, plan.dtype) if plan.epilogue.bias else None
    residual = random(g.y_shape, seed + 3, plan.dtype) if plan.epilogue.residual else None
    return x, w, bias, residual


def on(plan: Plan, backend: str) -> Plan:
    return replace(plan, backend=backend)
