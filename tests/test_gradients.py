"""Gradient kernels against their definition, and the definition against differences."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
from hypothesis import given

import cases
from fastconv.backends import available
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, Plan
from fastconv.reference import direct, gradients

C = [b for b in cases.CPU_BACKENDS if b == "c"]
needs_c = pytest.mark.skipif(not C, reason=str(available()["c"]))


def c_module(family: str):
    return importlib.import_module(f"fastconv.c_kernels.{family}_gradients")


def of_input(module, plan: Plan, gy, w) -> np.ndarray:
    gx = cases.Fenced(plan.geometry.x_shape, plan.dtype, plan.layout)
    workspace = cases.Fenced((module.workspace_size(plan),), plan.dtype)
    module.input_gradient(plan, cases.laid_out(gy, plan.layout), w, gx.array, workspace.array)
    gx.check()
    workspace.check()
    return gx.array


def of_weight(module, plan: Plan, x, gy) -> np.ndarray:
    gw = cases.Fenced(plan.geometry.w_shape, plan.dtype)
    workspace = cases.Fenced((module.workspace_size(plan),), plan.dtype)
    x, gy = (cases.laid_out(a, plan.layout) for a in (x, gy))
    module.weight_gradient(plan, x, gy, gw.array, workspace.array)
    gw.check()
    workspace.check()
    return gw.array


def assert_sum_close(got, want, magnitude, terms: int) -> None:
    """Direct sums in float32: tests/tolerance.py has the bounds, here with one more for the parts
    that are summed apart."""
    u = float(np.finfo(np.float32).eps)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.abs(got - want).max(initial=0) <= u * (terms + 9) * np.max(magnitude, initial=0)


@given(cases.geometries())
def test_the_definition_is_the_adjoint_of_the_convolution(g):
    """<conv(x, w), gy> = <x, input gradient> = <w, weight gradient>."""
    plan = Plan("grouped", "reference", g, "float64")
    x, w, gy = (
        cases.random(s, i, "float64") for i, s in enumerate((g.x_shape, g.w_shape, g.y_shape))
    )
    want = np.sum(direct.correlate(x, w, g) * gy)
    size = np.sum(direct.correlate(abs(x), abs(w), g) * abs(gy)) + 1
    assert abs(np.sum(x * of_input(gradients, plan, gy, w)) - want) <= 1e-13 * size
    assert abs(np.sum(w * of_weight(gradients, plan, x, gy)) - want) <= 1e-13 * size


def check_weight_gradient(family, backend, g, layout) -> None:
    module, plan = c_module(family), Plan(family, backend, g, layout=layout)
    x, gy = cases.random(g.x_shape, 0), cases.random(g.y_shape, 1)
    exact = Plan(family, "reference", g, "float64")
    with cases.isa_of(plan):
        got = of_weight(module, plan, x, gy)
    terms = g.batch * int(np.prod(g.out_size))
    magnitude = of_weight(gradients, exact, abs(x), abs(gy))
    assert_sum_close(got, of_weight(gradients, exact, x, gy), magnitude, terms)


@needs_c
@pytest.mark.parametrize("backend", C)
@given(g=cases.geometries(family="grouped", max_channels=9, max_kernel=5), layout=cases.layouts())
def test_grouped_weight_gradient(backend, g, layout):
    check_weight_gradient("grouped", backend, g, layout)


@needs_c
@pytest.mark.parametrize("backend", C)
@given(
    g=cases.geometries(family="depthwise", max_channels=40, max_kernel=5), layout=cases.layouts()
)
def test_depthwise_gradients(backend, g, layout):
    check_weight_gradient("depthwise", backend, g, layout)
    if g.in_channels != g.out_channels:
        assert "multiplier" in c_module("depthwise").supports(g, "float32")
        return
    plan = Plan("depthwise", backend, g, layout=layout)
    gy, w = cases.random(g.y_shape, 1), cases.random(g.w_shape, 2)
    exact = Plan("depthwise", "reference", g, "float64")
    with cases.isa_of(plan):
        got = of_input(c_module("depthwise"), plan, gy, w)
    magnitude = of_input(gradients, exact, abs(gy), abs(w))
    assert_sum_close(got, of_input(gradients, exact, gy, w), magnitude, g.taps)


# Groups within a vector, across vectors, more outputs than inputs; several rows of taps at once.
SHAPES = {
    "6 of 6": ((2, 24, 3, 9, 17), (24, 6, 3, 3, 3), 4),
    "8 of 8": ((1, 64, 3, 6, 6), (64, 8, 3, 3, 3), 8),
    "12 of 12": ((1, 36, 2, 5, 5), (36, 12, 1, 3, 3), 3),
    "4 to 20": ((1, 8, 2, 5, 5), (40, 4, 1, 3, 3), 2),
    "20 to 4": ((1, 40, 2, 5, 5), (8, 20, 3, 1, 1), 2),
    "one to 3": ((1, 20, 2, 5, 5), (60, 1, 1, 3, 3), 20),
    "depthwise": ((2, 54, 4, 11, 9), (54, 1, 3, 3, 3), 54),
    "depthwise lines": ((2, 24, 7, 4, 9), (24, 1, 5, 1, 1), 24),
    "depthwise 5x5": ((1, 35, 2, 9, 9), (35, 1, 1, 5, 5), 35),
}


@needs_c
@pytest.mark.parametrize("backend", C)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_weight_gradient_of_layers(backend, shape, stride):
    x, w, groups = SHAPES[shape]
    padding = [k // 2 for k in w[2:]]
    g = Geometry.of(x, w, stride, padding, 1, groups)
    check_weight_gradient("depthwise" if w[1] == 1 else "grouped", backend, g, CHANNELS_LAST)


@needs_c
@pytest.mark.parametrize("shape", ["depthwise", "8 of 8"])
def test_weight_gradient_does_not_depend_on_threads(shape, monkeypatch):
    from fastconv.c_kernels import launch

    x, w, groups = SHAPES[shape]
    g = Geometry.of(x, w, 1, 1, 1, groups)
    plan = Plan("grouped", "c", g)
    arrays = cases.random((g.x_shape), 0), cases.random(g.y_shape, 1)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(launch, "threads", lambda n=threads: n)
        found.append(of_weight(c_module("grouped"), plan, *arrays))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@needs_c
@pytest.mark.parametrize("family", ["depthwise", "grouped"])
def test_modules_have_the_shape_of_the_definition(family):
    for name in ("supports", "workspace_size", "input_gradient", "weight_gradient"):
        ours, definition = (
            list(inspect.signature(getattr(module, name)).parameters)
            for module in (c_module(family), gradients)
        )
        assert ours == definition, name


@pytest.mark.parametrize(
    ("family", "shape", "groups", "reason"),
    [
        ("depthwise", (8, 4, 3), 2, "not depthwise"),
        ("depthwise", (16, 1, 3), 8, "a multiplier of 2 is not served"),
        ("grouped", (16, 40, 3), 2, "40 channels per group are more than 32"),
        ("grouped", (8, 8, 3), 1, "one group"),
    ],
)
@needs_c
def test_refusals(family, shape, groups, reason):
    g = Geometry.of((1, shape[1] * groups, 9), shape, 1, 0, 1, groups)
    assert reason in c_module(family).supports(g, "float32")
    assert c_module(family).supports(g, "float64") is not None
