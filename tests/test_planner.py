"""Every candidate has a price or a reason; expected errors are those measured."""

import numpy as np
import pytest

import fastconv
from cases import arrays_for, execute
from fastconv import planner, winners
from fastconv.backends import kernel
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry
from fastconv.plan import Plan, Request
from fastconv.reference import direct
from fastconv.transforms import transform

DENSE = Geometry.of((1, 32, 8, 12, 12), (32, 32, 3, 3, 3), padding=1)


@pytest.fixture
def unmeasured():
    """Plans are made anew, before and after the test."""
    winners.forget()
    yield
    winners.forget()


def test_every_refused_candidate_has_a_reason():
    found = planner.candidates(Geometry.of((1, 8, 9, 9, 9), (8, 4, 3, 3, 3), groups=2))
    assert found[0].reason is None
    for c in found:
        assert (c.reason is None) == (c.estimate_ms < float("inf"))
    assert any(c.reason == "winograd is for one group, not 2" for c in found)


def test_cheapest_candidate_is_the_plan():
    found = planner.candidates(DENSE)
    assert found[0].plan == planner.plan(DENSE)
    framework = min(c.estimate_ms for c in found if c.plan.backend == "torch")
    ours = min(c.estimate_ms for c in found if c.plan.backend != "torch")
    assert found[0].estimate_ms == min(ours, framework)


def test_pytorch_runs_where_the_estimates_are_close(monkeypatch, unmeasured):
    if fastconv.backends.available()["torch"] is not None:
        pytest.skip("needs PyTorch")
    for ratio, backend in ((1.05, "torch"), (1.2, "numba")):
        price = {"torch": 1.0, "numba": 1.0 / ratio}
        monkeypatch.setattr(
            planner.costs, "estimate_ms", lambda p, price=price: price.get(p.backend, 2.0)
        )
        found = planner.priced(Request.of(DENSE))
        assert found[0].plan.backend == backend


def test_a_workspace_beyond_the_limit_is_refused_or_configured_away(monkeypatch, unmeasured):
    module = kernel("winograd", "reference")
    monkeypatch.setattr(module, "CONFIGS", ({}, {"tiles": 14}))
    monkeypatch.setattr(module, "workspace_size", lambda p: 100 if p.options else 1000)
    options = {"backend": "reference", "algorithm": "winograd"}

    def config(limit):
        return planner.plan(DENSE, max_workspace_bytes=limit, **options).config

    assert config(None) == config(4000) == ()
    assert config(3999) == config(400) == (("tiles", 14),)
    with pytest.raises(UnsupportedError, match="needs 4,000 bytes of workspace, allowed are 399"):
        config(399)
    with pytest.raises(UnsupportedError, match="max_workspace_bytes must be None or at least 0"):
        config(-1)


def test_every_door_takes_the_limit(monkeypatch, unmeasured):
    """All of them refuse alike what PyTorch, which counts as needing nothing, may not do."""
    monkeypatch.setattr(kernel("grouped", "reference"), "workspace_size", lambda p: 1000)
    monkeypatch.setattr(kernel("continual", "reference"), "workspace_size", lambda p: 1000)
    monkeypatch.setattr(kernel("hfa", "reference"), "workspace_size", lambda p: 1000)
    limit = {"backend": "reference", "max_workspace_bytes": 10}

    def ones(*shape):
        return np.ones(shape, np.float32)

    x, w = ones(1, 2, 4, 4, 4), ones(2, 2, 1, 1, 1)
    calls = [
        lambda: fastconv.conv1d(x[..., 0, 0], w[..., 0, 0], algorithm="direct", **limit),
        lambda: fastconv.conv2d(x[..., 0], w[..., 0], algorithm="direct", **limit),
        lambda: fastconv.conv3d(x, w, algorithm="direct", **limit),
        lambda: fastconv.separable_block(x, w, ones(2, 1, 1, 1, 1), w, **limit),
        lambda: fastconv.continual_step(
            x[:, :, 0], fastconv.continual_state(x[:, :, 0], w), w, **limit
        ),
    ]
    if fastconv.backends.available()["torch"] is None:
        import torch

        module = fastconv.nn.Conv3d(2, 2, 1, algorithm="direct", **limit)
        t, u = torch.from_numpy(x), torch.from_numpy(w)
        calls += [
            lambda: module(t),
            lambda: fastconv.conv3d(t, u, algorithm="direct", **limit),
            lambda: fastconv.separable_block(t, u, u[:, :1], u, **limit),
            lambda: fastconv.accelerate(
                torch.nn.Sequential(torch.nn.Conv3d(2, 2, 1)).eval(), t, algorithm="direct", **limit
            ),
        ]
    for call in calls:
        with pytest.raises(UnsupportedError, match=r"needs [48],000 bytes of workspace"):
            call()


def test_tile_is_kept_and_checked():
    p = planner.plan(DENSE, algorithm="winograd", tile=(2, 4, 4), backend="reference")
    assert p.tile == (2, 4, 4)
    with pytest.raises(UnsupportedError, match=r"tile must have 3 entries, got \(2, 4\)"):
        planner.plan(DENSE, algorithm="winograd", tile=(2, 4), backend="reference")


def test_tolerance_refuses_with_the_expected_error():
    with pytest.raises(
        UnsupportedError, match=r"error up to \d+\.\d times direct exceeds the tolerance of 1"
    ):
        planner.plan(DENSE, algorithm="winograd", tile=(4, 4, 4), backend="reference", tolerance=1)


@pytest.mark.parametrize(
    "backend", [b for b in ("numba", "c") if fastconv.backends.available()[b] is None]
)
@pytest.mark.parametrize("ms", [(2, 2, 2), (2, 4, 4), (1, 4, 4)])
@pytest.mark.parametrize("channels", [8, 64])
def test_measured_error_is_at_most_the_expected_one(backend, ms, channels):
    """rms error on random float32 data over that of a running sum is within 1.5 of the model's."""
    g = Geometry.of((1, channels, 6, 14, 14), (16, channels, 3, 3, 3), padding=1)
    p = Plan("winograd", backend, g, transforms=tuple(transform(m, 3) for m in ms))
    x, w, _, _ = arrays_for(p)
    want = direct.correlate(x, w, g)
    running = np.zeros(g.y_shape, np.float32)
    for tap, view in direct.taps(direct.pad(x, g), g):
        for c in range(channels):
            running += w[(slice(None), c, *tap)].reshape(1, -1, 1, 1, 1) * view[:, c : c + 1]
    ours, theirs = (np.sqrt(np.mean((a - want) ** 2)) for a in (execute(p, x, w), running))
    assert ours <= 1.5 * planner.error_factor(p) * theirs


def test_explain_names_the_choice_and_every_reason(capsys):
    fastconv.explain((1, 8, 9, 9, 9), (8, 4, 3, 3, 3), groups=2, padding=1)
    text = capsys.readouterr().out
    assert text.startswith(
        "conv3d (1, 8, 9, 9, 9) * (8, 4, 3, 3, 3) -> (1, 8, 9, 9, 9), float32, channels_last_3d"
    )
    assert sum(line.startswith(">") for line in text.splitlines()) == 1
    assert "winograd is for one group, not 2" in text
    for name, reason in fastconv.backends.available().items():
        if reason is not None:
            assert f"{name}" in text
            assert reason in text


def test_plans_are_hashable_and_equal_by_value():
    plans = {planner.plan(DENSE, backend="reference") for _ in range(2)}
    assert len(plans) == 1


def test_without_optional_packages_the_definition_runs(monkeypatch, unmeasured):
    usable = {b: None if b == "reference" else "not installed" for b in fastconv.backends.BACKENDS}
    monkeypatch.setattr(fastconv.backends, "why_not", usable.__getitem__)
    assert planner.plan(DENSE).backend == "reference"


def test_a_tile_that_one_backend_has_not_compiled_runs_on_another():
    """A plan that is returned can run; asked for by name, the refusal has its reason."""
    geometry = Geometry.of((1, 16, 40), (16, 16, 3), 1, 1)
    wanted = dict(algorithm="winograd", tile=(8,), tolerance=1e9)
    plan = fastconv.plan(geometry, **wanted)
    weights = np.zeros(geometry.w_shape, "float32")
    fastconv.backends.kernel(plan.family, plan.backend).prepack(weights, plan)
    if fastconv.backends.available()["c"] is None:
        with pytest.raises(UnsupportedError, match=r"c winograd: F\(8, 3\) is not compiled"):
            fastconv.plan(geometry, backend="c", **wanted)


@pytest.mark.parametrize(
    ("dtype", "precision", "ms", "served"),
    [
        ("float16", "ieee", (2,), True),
        ("float16", "ieee", (2, 2), True),
        ("float16", "ieee", (4,), False),
        ("float32", "tf32", (4,), True),
        ("float32", "tf32", (4, 4), False),
        ("float32", "ieee", (4, 4), True),
    ],
)
def test_short_operands_bear_small_tiles(dtype, precision, ms, served):
    n = len(ms)
    geometry = Geometry.of((1, 64, *(16,) * n), (64, 64, *(3,) * n), padding=1)
    transforms = tuple(fastconv.transform(m, 3) for m in ms)
    plan = Plan("winograd", "triton", geometry, dtype, transforms=transforms, precision=precision)
    assert (planner.error_factor(plan) <= planner.DEFAULT_TOLERANCE) == served
