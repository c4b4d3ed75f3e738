"""Every candidate has a price or a reason; expected errors are those measured."""

import numpy as np
import pytest

import fastconv
from cases import arrays_for, execute
from fastconv import planner
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry
from fastconv.plan import Plan
from fastconv.reference import direct
from fastconv.transforms import transform

DENSE = Geometry.of((1, 32, 8, 12, 12), (32, 32, 3, 3, 3), padding=1)


def test_every_refused_candidate_has_a_reason():
    found = planner.candidates(Geometry.of((1, 8, 9, 9, 9), (8, 4, 3, 3, 3), groups=2))
    assert found[0].reason is None
    for c in found:
        assert (c.reason is None) == (c.estimate_ms < float("inf"))
    assert any(c.reason == "winograd is for one group, not 2" for c in found)


def test_cheapest_candidate_is_the_plan():
    found = planner.candidates(DENSE)
    assert found[0].plan == planner.plan(DENSE)
    assert found[0].estimate_ms == min(c.estimate_ms for c in found)


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


def test_without_optional_packages_the_definition_runs(monkeypatch):
    usable = {b: None if b == "reference" else "not installed" for b in fastconv.backends.BACKENDS}
    monkeypatch.setattr(fastconv.backends, "available", lambda: usable)
    planner.candidates.cache_clear()
    try:
        assert planner.plan(DENSE).backend == "reference"
    finally:
        planner.candidates.cache_clear()
