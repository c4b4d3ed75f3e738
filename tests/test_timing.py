"""The timer on a clock that moves only when told to."""

from __future__ import annotations

import pytest

from fastconv.timing import Timing, measure


class Clock:
    """A clock, and functions that take a given time on it each time they are called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *durations_ms: float):
        remaining = list(durations_ms)

        def function() -> None:
            self.calls.append(name)
            self.now += (remaining.pop(0) if len(remaining) > 1 else remaining[0]) / 1e3

        return function


def test_functions_take_turns():
    clock = Clock()
    functions = {"ours": clock.takes("ours", 1), "peer": clock.takes("peer", 2)}
    timings = measure(functions, repeats=2, warmup=1, clock=clock)
    assert clock.calls == ["ours", "peer"] * 3
    assert timings["ours"].median_ms == pytest.approx(1)
    assert timings["peer"].median_ms == pytest.approx(2)


def test_warmup_is_not_measured_and_not_charged():
    clock = Clock()
    timing = measure(
        {"f": clock.takes("f", 5000, 1)}, repeats=3, warmup=1, budget_s=1, clock=clock
    )["f"]
    assert timing.repeats == 3
    assert timing.q80_ms == pytest.approx(1)


@pytest.mark.parametrize(("budget_s", "rounds"), [(0, 1), (0.025, 3), (1, 10)])
def test_a_budget_ends_after_a_whole_round(budget_s, rounds):
    clock = Clock()
    functions = {name: clock.takes(name, 5) for name in "ab"}
    timings = measure(functions, repeats=10, warmup=0, budget_s=budget_s, clock=clock)
    assert [timing.repeats for timing in timings.values()] == [rounds, rounds]


def test_quantiles_are_linear_between_samples():
    timing = Timing.of([5, 1, 4, 2, 3, 6])
    assert timing == Timing(median_ms=3.5, q20_ms=2, q80_ms=5, min_ms=1, repeats=6)
    assert Timing.of([7]) == Timing(median_ms=7, q20_ms=7, q80_ms=7, min_ms=7, repeats=1)


@pytest.mark.parametrize(
    ("samples_ms", "noisy"),
    [
        ([1.0] * 5, False),
        ([1.0, 1.1, 1.2, 1.1, 1.0], False),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 9.0], False),  # one slow spell does not move q80
        ([1.0, 1.0, 1.0, 2.0, 2.0], True),
        ([1.0, 1.0], True),  # two samples say nothing of spread
    ],
)
def test_noisy(samples_ms, noisy):
    assert Timing.of(samples_ms).noisy is noisy


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_impossible_counts_are_refused(wrong):
    with pytest.raises(
        ValueError, match="^measure: expected repeats >= 1, burst >= 1 and warmup >= 0, got"
    ):
        measure({}, **wrong)


def test_a_turn_is_untimed_preparation_and_a_burst():
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = measure(
        functions, repeats=4, warmup=0, before={"a": lambda: calls.append("wake a")}, burst=2
    )
    assert calls == ["wake a", "a", "a", "b", "b"] * 2
    assert {timing.repeats for timing in found.values()} == {4}
