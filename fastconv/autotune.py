"""`tune`: candidate plans are checked, run by turns on real arrays, and the fastest is kept.

Nothing here runs unless somebody asks for it: plans are timed neither on import nor in a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from math import ceil, inf
from typing import Any

from . import planner, timing, winners
from .counts import of_plan
from .errors import BackendError, UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .plan import Plan, Request
from .trial import DTYPES, Trial

# A burst is long enough for the clock, and begins when caches and waiting threads have settled.
BURST_MS, FEWEST_CALLS, MANY_CALLS, MOST_CALLS = 3.0, 3, 10, 50
SETTLED_MS = 5.0  # calls so long do not depend on what ran before
FEWEST_ROUNDS, ROUNDS = 3, 15
# After so many rounds, how many times slower than the best a plan is to be given up.
GIVE_UP = {2: 2.0, 5: 1.3}
# Times this close are equal: then accuracy decides, then the order of the estimates.
TIE = 1.03
CONFIRMED = 1.1  # a second burst within this factor confirms the best one
PATIENCE = 3
INTERRUPTIONS_PER_S = 30  # more often other processes took a CPU from us: they disturb
ENTRANTS, SLACK = 10, 3.0  # by estimate: so many plans, if within this factor of the best
CONFIGURED = 2  # plans of the first race that race again in all their configurations
MOST_WEIGHT_BYTES = 1 << 30  # packed weights of all plans of a race
NO_ROOM = "no memory left for its weights beside those of better plans"
BUDGET_S = 1.0


@dataclass(frozen=True)
class Tuned:
    """What `tune` found for one request. Times are in milliseconds, None of what did not race.

    before, after  the plan that ran until now, and the one that runs from now on
    torch_ms       PyTorch's own convolution
    noisy          the machine had other things to do: tune again when it has not
    refused        plans by their label with the reason: they were wrong, broke, or found no room
    """

    request: Request
    before: Plan
    after: Plan
    before_ms: float | None
    after_ms: float
    torch_ms: float | None
    noisy: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)


def tune(
    geometry: Geometry | SeparableGeometry, *, budget_s: float = BUDGET_S, **options: Any
) -> Tuned:
    """Measure which plan is fastest here, and let `plan` and every convolution use it from now on.

    options   as for `plan`: results serve the same request and, without restrictions of algorithm,
              backend, tile and workspace, all restricted ones too
    budget_s  seconds for the comparison; compiling, packing and checking come on top

    The result is kept in `fastconv.winners.path()` for the present versions, instruction set and
    number of threads. It replaces an older one.

    Raises as `plan` does, UnsupportedError for what cannot be timed, BackendError if the file
    cannot be written or if no plan computes the right result.
    """
    return tune_request(Request.of(geometry, **options), budget_s)


def tune_request(
    request: Request,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """`tune` of a Request."""
    dtypes = DTYPES.get(request.device)
    if dtypes is None:
        raise UnsupportedError(
            f"tune: device {request.device!r} is not one of {', '.join(map(repr, DTYPES))}"
        )
    if request.dtype not in dtypes:
        raise UnsupportedError(
            f"tune: dtype {request.dtype} is not supported; use one of {', '.join(dtypes)}"
        )
    if not all(request.geometry.y_shape):
        raise UnsupportedError(
            f"tune: nothing to time, the output {request.geometry.y_shape} is empty"
        )
    before = planner.plan_of(request)
    winners.check_writable()
    contest = _Contest(request, clock)
    for plan in _entrants(request, before):
        contest.enter(plan)
    contest.race(rounds=FEWEST_ROUNDS, budget_s=budget_s)
    for plan in contest.leaders(CONFIGURED):
        for other in planner.configurations(plan, request.max_workspace_bytes):
            contest.enter(other)
    contest.race(rounds=ROUNDS, budget_s=budget_s)
    after = contest.winner(budget_s)
    times = {**contest.given_up, **contest.ms}
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    ms = dict(sorted(contest.ms.items(), key=lambda item: item[1]))
    label = winners.label(after)
    record = winners.Record(label, ms, contest.given_up, today, contest.noisy)
    winners.keep(request, record)
    torch_ms = min((t for name, t in times.items() if name.startswith("torch ")), default=None)
    return Tuned(
        request,
        before,
        after,
        times.get(winners.label(before)),
        ms[label],
        torch_ms,
        contest.noisy,
        contest.refused,
    )


def _entrants(request: Request, before: Plan) -> list[Plan]:
    """Plans worth a race: what runs now, PyTorch's, and the best by estimate."""
    found = [c for c in planner.priced(request) if c.reason is None]
    best = min((c.estimate_ms for c in found), default=inf)
    likely = [c.plan for c in found if c.estimate_ms <= SLACK * best][:ENTRANTS]
    framework = [c.plan for c in found if c.plan.backend == "torch"]
    return list(dict.fromkeys([before, *framework, *likely]))


class _Contest:
    """Plans of one request, ready to run, and their times so far, by label.

    ms        of the plans still in the race;  given_up: of the others
    refused   why a plan may not race
    """

    def __init__(self, request: Request, clock: Callable[[], float]) -> None:
        self.ms: dict[str, float] = {}
        self.noisy = False
        self.given_up: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self._trial, self._clock = Trial(request), clock
        self._plans: dict[str, Plan] = {}
        self._running: dict[str, Callable[[], object]] = {}
        self._answers: dict[str, Callable[[], Any]] = {}
        self._room = MOST_WEIGHT_BYTES

    def enter(self, plan: Plan) -> None:
        """Pack, run once and check a plan; it races only if its result is right."""
        name = winners.label(plan)
        if name in self._plans or name in self.refused:
            return
        size = of_plan(plan).weight_bytes
        if size > self._room and self._running:
            self.refused[name] = NO_ROOM
            return
        try:
            call, answer = self._trial.ready(plan)
            reason = self._trial.wrong(answer(), planner.error_factor(plan))
        except Exception as error:  # whatever a kernel does wrong, the others race on
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self.refused[name] = reason
            return
        self._room -= size
        self._plans[name], self._running[name], self._answers[name] = plan, call, answer

    def race(self, rounds: int, budget_s: float) -> None:
        """Time all plans that are still running; the clearly slower are given up."""
        if not self._running:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise BackendError(f"tune: no plan computes the right result: {reasons}")
        times = race(self._running, rounds, budget_s, self._clock)
        self.ms, self.noisy = times.ms, times.noisy
        self.given_up.update(times.given_up)
        for name in times.given_up:
            self._room += of_plan(self._plans[name]).weight_bytes
            del self._running[name], self._answers[name]

    def leaders(self, count: int) -> list[Plan]:
        """The fastest so far."""
        return [self._plans[name] for name in sorted(self.ms, key=self.ms.__getitem__)[:count]]

    def winner(self, budget_s: float) -> Plan:
        """The fastest; of equals the most accurate, of those the first that entered.

        It is checked once more: its memory is no longer fresh, its threads are warm.
        """
        while True:
            if not self.ms:  # whoever made them give up was wrong
                self._readmit()
                self.race(ROUNDS, budget_s)
            best = min(self.ms.values())
            equals = [p for name, p in self._plans.items() if self.ms.get(name, inf) <= TIE * best]
            plan = min(equals, key=planner.error_factor)
            name = winners.label(plan)
            reason = self._trial.wrong(self._answers[name](), planner.error_factor(plan))
            if reason is None:
                return plan
            self.refused[name] = f"after {self.ms.pop(name):.3f} ms: {reason}"
            del self._running[name], self._answers[name]

    def _readmit(self) -> None:
        """Let the plans that gave up race again."""
        plans = [self._plans.pop(name) for name in self.given_up]
        self.given_up = {}
        for plan in plans:
            self.enter(plan)


@dataclass(frozen=True)
class Times:
    """Milliseconds of what ran to the end of a race, and of what was given up on the way.

    noisy  the machine had other things to do: the best time was not reached a second time, or other
           processes often took a CPU from us
    """

    ms: dict[str, float]
    given_up: dict[str, float]
    noisy: bool


def race(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
    interruptions: Callable[[], int] | None = None,
) -> Times:
    """Time functions by turns.

    In every round each function has a burst of calls, every other round in reverse order. A
    function counts by the best of its bursts, a burst by its lower quantile: neighbours on the
    machine only ever lengthen calls, and a single lucky call does not win. It is given up only if
    none of its calls came near the best. There are `rounds` rounds, fewer if the budget is used up,
    but never fewer than FEWEST_ROUNDS; more, PATIENCE times the budget at most, while the times
    are noisy. `interruptions` counts how often this process lost a CPU.
    """
    running = dict(functions)
    first = {name: _burst(function, FEWEST_CALLS, 1, clock) for name, function in running.items()}
    bursts = {name: [_typical(burst)] for name, burst in first.items()}
    fastest = {name: burst.min_ms for name, burst in first.items()}
    given_up: dict[str, float] = {}
    count = interruptions or _interruptions
    start, before = clock(), count()
    for number in range(1, PATIENCE * rounds + 1):
        for name in list(running) if number % 2 else reversed(list(running)):
            calls = ceil(BURST_MS / max(fastest[name], 1e-6))
            calls = min(max(calls, FEWEST_CALLS), MOST_CALLS)
            settle = 0 if fastest[name] >= SETTLED_MS else calls
            burst = _burst(running[name], calls, settle, clock)
            bursts[name].append(_typical(burst))
            fastest[name] = min(fastest[name], burst.min_ms)
        limit = GIVE_UP.get(number, inf) * min(min(bursts[name]) for name in running)
        for name in [name for name in running if fastest[name] > limit]:
            given_up[name] = min(bursts[name])
            del running[name]
        ms = {name: min(bursts[name]) for name in running}
        best, again, *_ = sorted(bursts[min(ms, key=ms.__getitem__)])
        spent = clock() - start
        noisy = again > CONFIRMED * best or count() - before > INTERRUPTIONS_PER_S * spent
        enough = number >= rounds or spent >= budget_s or len(running) == 1
        if number >= FEWEST_ROUNDS and enough and (not noisy or spent >= PATIENCE * budget_s):
            break
    return Times(ms, given_up, noisy)


def _interruptions() -> int:
    """How often a thread of this process had to make room for another one; 0 where unknown."""
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _typical(burst: timing.Timing) -> float:
    """The lower quantile; of few calls, where that is all but the shortest, the median."""
    return burst.q20_ms if burst.repeats >= MANY_CALLS else burst.median_ms


def _burst(
    function: Callable[[], object], calls: int, settle: int, clock: Callable[[], float]
) -> timing.Timing:
    """Consecutive calls, behind calls that are not timed."""
    one = {"": function}
    return timing.measure(one, repeats=calls, burst=calls, warmup=settle, clock=clock)[""]
