"""One timer for tuning and for benchmarks: warm-up, alternation, medians and quantiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

NOISY_SPREAD = 1.25  # q80 / q20 from which a median should not decide between close candidates


@dataclass(frozen=True)
class Timing:
    """What was measured of one function, in milliseconds."""

    median_ms: float
    q20_ms: float
    q80_ms: float
    min_ms: float
    repeats: int

    @property
    def noisy(self) -> bool:
        """True if too few repeats (fewer than 3) or if q80 exceeds q20 by more than a quarter."""
        return self.repeats < 3 or self.q80_ms > NOISY_SPREAD * self.q20_ms

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        """The summary of at least one sample."""
        ordered = sorted(samples_ms)
        return cls(
            median_ms=_quantile(ordered, 0.5),
            q20_ms=_quantile(ordered, 0.2),
            q80_ms=_quantile(ordered, 0.8),
            min_ms=ordered[0],
            repeats=len(ordered),
        )


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 2,
    budget_s: float = float("inf"),
    before: Mapping[str, Callable[[], object]] | None = None,
    burst: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions by turns, so that a slow spell of the machine falls on all of them.

    Each round gives every function its turn, in the given order: `before[name]`, if there is one,
    untimed, then `burst` timed calls. `warmup` rounds are not counted (they compile, pack and fill
    caches) nor charged to the budget; then come rounds until each function was timed `repeats`
    times, fewer if `budget_s` seconds are used up, but never fewer than one.

    Raises ValueError if `repeats` or `burst` is less than 1 or `warmup` is negative.
    """
    if repeats < 1 or burst < 1 or warmup < 0:
        raise ValueError(
            "measure: expected repeats >= 1, burst >= 1 and warmup >= 0, "
            f"got repeats {repeats}, burst {burst}, warmup {warmup}"
        )
    before = before or {}
    for _ in range(warmup):
        for function in functions.values():
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    start = clock()
    for _ in range(-(-repeats // burst)):
        for name, function in functions.items():
            if name in before:
                before[name]()
            for _ in range(burst):
                began = clock()
                function()
                samples[name].append(1e3 * (clock() - began))
        if clock() - start >= budget_s:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    """The quantile of sorted values, linear between neighbours."""
    position = fraction * (len(ordered) - 1)
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])
