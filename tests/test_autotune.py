"""Tuning with an invented clock: what wins a race, and what may not; nothing here is timed."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv
from fastconv import autotune, planner, winners
from fastconv.backends import available, kernel
from fastconv.epilogue import ACTIVATIONS, Epilogue
from fastconv.errors import BackendError, UnsupportedError
from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.layouts import CONTIGUOUS, LAYOUTS
from fastconv.plan import Plan, Request
from fastconv.trial import Trial

DENSE = Geometry.of((1, 4, 6, 8, 8), (4, 4, 3, 3, 3), padding=1)
REQUEST = Request.of(DENSE, backend="reference")
USABLE = available()
USED = [b for b in ("reference", "numba", "torch") if available()[b] is None]


class Clock:
    """Time passes only in the functions made here."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def function(self, name, *ms):
        """Its calls last so many milliseconds, the last number again and again."""
        durations = list(ms)

        def run():
            self.calls.append(name)
            self.now += 1e-3 * (durations.pop(0) if len(durations) > 1 else durations[0])

        return run


def raced(clock, functions, **options):
    options = {"interruptions": lambda: 0, **options}
    return autotune.race(functions, clock=clock, **options)


def test_a_race_tells_the_times_of_its_functions():
    clock = Clock()
    times = raced(clock, {"a": clock.function("a", 1.2), "b": clock.function("b", 1.1)})
    assert times.ms == pytest.approx({"a": 1.2, "b": 1.1})
    assert times.given_up == {}
    assert not times.noisy


def test_the_clearly_slower_give_up_after_few_calls():
    clock = Clock()
    functions = {name: clock.function(name, ms) for name, ms in (("a", 7), ("b", 8), ("c", 15))}
    times = raced(clock, functions, budget_s=1e9)
    assert times.given_up == pytest.approx({"c": 15})
    # Three calls at first, then two bursts of three; long calls need none to settle.
    assert clock.calls.count("c") == 1 + 3 + 2 * 3
    assert clock.calls.count("b") > 2 * clock.calls.count("c")
    times = raced(clock, {"a": clock.function("a", 7), "b": clock.function("b", 10)}, budget_s=1e9)
    assert times.given_up == pytest.approx({"b": 10})  # 1.4 times: later


def test_nobody_gives_up_while_one_of_its_calls_came_near():
    clock = Clock()
    disturbed = clock.function("b", 100, 100, 100, 6, 100, 100, 100, 100, 100, 100, 100, 6)
    times = raced(clock, {"a": clock.function("a", 5), "b": disturbed})
    assert times.ms == pytest.approx({"a": 5, "b": 6})


def test_functions_take_turns_in_changing_order():
    clock = Clock()
    functions = {name: clock.function(name, 10) for name in "abc"}
    raced(clock, functions, rounds=3)
    turns = "".join(clock.calls[3 * (1 + 3) :: 3])  # bursts of three calls, behind the first ones
    assert turns == "abc" + "cba" + "abc"


def test_neighbours_lengthen_bursts_and_change_nothing():
    clock = Clock()
    # Two of its first three bursts, and many later calls, are disturbed.
    disturbed = clock.function("a", *[50.0] * 4, 6, 6, 6, *[50.0] * 3, *[6, 50, 50, 50, 6, 6] * 20)
    times = raced(clock, {"a": disturbed, "b": clock.function("b", 7)}, budget_s=1e9)
    assert times.ms == pytest.approx({"a": 6, "b": 7})


def test_a_single_lucky_call_does_not_win():
    clock = Clock()
    lucky = clock.function("a", 8, 8, 8, 8, 2, 8)
    times = raced(clock, {"a": lucky, "b": clock.function("b", 7)}, budget_s=1e9)
    assert times.ms["b"] < times.ms["a"]


def test_short_calls_are_repeated_to_a_minimum_of_work():
    clock = Clock()
    functions = {"a": clock.function("a", 0.1), "b": clock.function("b", 0.001)}
    raced(clock, {"a": functions["a"]}, rounds=1)
    per_round = clock.calls.count("a") / autotune.FEWEST_ROUNDS
    assert per_round >= autotune.BURST_MS / 0.1
    before = len(clock.calls)
    raced(clock, {"b": functions["b"]}, rounds=1)
    assert len(clock.calls) - before <= autotune.FEWEST_ROUNDS * 2 * autotune.MOST_CALLS + 4


def test_the_budget_ends_a_race_but_not_before_the_fewest_rounds():
    clock = Clock()
    functions = {name: clock.function(name, 100) for name in "ab"}
    raced(clock, functions, rounds=50, budget_s=0.0)
    assert clock.calls.count("a") == 1 + 3 + autotune.FEWEST_ROUNDS * 3
    clock = Clock()
    raced(clock, {name: clock.function(name, 100) for name in "ab"}, rounds=50, budget_s=5.9)
    assert clock.calls.count("a") == 1 + 3 + 10 * 3


def test_a_best_time_that_does_not_come_again_is_noise_and_costs_more_rounds():
    clock = Clock()
    # The first burst is fast, and then somebody else takes the machine.
    functions = {"a": clock.function("a", *[10.0] * 4, 30.0), "b": clock.function("b", 45)}
    times = raced(clock, functions, rounds=5, budget_s=1e9)
    assert times.noisy
    assert clock.calls.count("a") == 1 + 3 + autotune.PATIENCE * 5 * 3


def test_a_process_that_others_interrupt_knows_it():
    clock = Clock()
    busy = {"interruptions": lambda: int(1.5 * autotune.INTERRUPTIONS_PER_S * clock())}
    times = raced(clock, {name: clock.function(name, 10) for name in "ab"}, **busy)
    assert times.ms == pytest.approx({"a": 10, "b": 10})
    assert times.noisy
    calm = {"interruptions": lambda: int(0.5 * autotune.INTERRUPTIONS_PER_S * clock())}
    assert not raced(clock, {"a": clock.function("a", 10)}, **calm).noisy


# Whole tunings of the reference's plans, with an invented time for each of them.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for results."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    winners.forget()
    yield tmp_path / "cache"
    winners.forget()


@pytest.fixture
def tuned(cache, monkeypatch):
    """`tuned(times, wrong, **options)`: the result of tuning where plans take these milliseconds.

    times   by label; other plans take 50
    wrong   reasons by label; a list is one reason, or None, per answer
    """

    def run(times, wrong=None, request=REQUEST, **options):
        clock, wrong = Clock(), wrong or {}

        class Invented:
            def __init__(self, request):
                pass

            def ready(self, plan):
                name = winners.label(plan)
                reason = wrong.get(name)
                if isinstance(reason, Exception):
                    raise reason

                def answer():
                    return reason.pop(0) if isinstance(reason, list) else reason

                return clock.function(name, times.get(name, 50.0)), answer

            def wrong(self, got, factor):
                return got

        monkeypatch.setattr(autotune, "Trial", Invented)
        # No model: every plan of the request races.
        monkeypatch.setattr(planner.costs, "estimate_ms", lambda plan: 1.0)
        monkeypatch.setattr(autotune, "ENTRANTS", 99)
        winners.forget()
        return autotune.tune_request(request, clock=clock, **options)

    return run


FAST, SLOW = "reference winograd 2x2x2", "reference winograd 1x2x2"


def test_the_fastest_plan_wins_and_runs_from_now_on(tuned):
    before = planner.plan_of(REQUEST)
    result = tuned({FAST: 5.0, SLOW: 8.0})
    assert winners.label(result.after) == FAST
    assert (result.after_ms, result.refused) == (pytest.approx(5.0), {})
    assert winners.label(before) != FAST
    assert planner.plan_of(REQUEST) == result.after
    record = winners.find(REQUEST)
    assert record.winner == FAST
    assert set(record.ms) <= {FAST, SLOW}
    assert record.given_up["reference grouped"] == pytest.approx(50.0)


def test_equal_times_go_to_the_more_accurate_plan(tuned):
    assert winners.label(tuned({FAST: 4.95, SLOW: 5.0}).after) == SLOW


def test_a_wrong_result_never_wins(tuned):
    result = tuned({FAST: 1.0, SLOW: 8.0}, wrong={FAST: "rms error 1"})
    assert winners.label(result.after) == SLOW
    assert result.refused == {FAST: "rms error 1"}
    assert FAST not in {**winners.find(REQUEST).ms, **winners.find(REQUEST).given_up}


def test_a_result_that_turns_wrong_in_the_race_does_not_win_either(tuned):
    result = tuned({FAST: 5.0, SLOW: 8.0}, wrong={FAST: [None, "rms error 1"]})
    assert winners.label(result.after) == SLOW
    assert result.refused == {FAST: "after 5.000 ms: rms error 1"}


def test_a_plan_that_breaks_is_left_out(tuned):
    result = tuned({FAST: 1.0, SLOW: 8.0}, wrong={FAST: RuntimeError("boom")})
    assert winners.label(result.after) == SLOW
    assert result.refused == {FAST: "RuntimeError: boom"}


def test_without_any_right_result_nothing_is_kept(tuned):
    found = [winners.label(c.plan) for c in planner.candidates(DENSE, backend="reference")]
    with pytest.raises(BackendError, match="tune: no plan computes the right result: reference "):
        tuned({}, wrong=dict.fromkeys(found, "rms error 1"))
    assert winners.find(REQUEST) is None


def test_configurations_of_the_leaders_race_too(tuned, monkeypatch):
    module = kernel("winograd", "reference")
    monkeypatch.setattr(module, "CONFIGS", ({}, {"tiles": 14, "phased": 1}))
    other = f"{FAST} phased=1 tiles=14"
    result = tuned({FAST: 5.0, SLOW: 8.0, other: 4.0})
    assert winners.label(result.after) == other
    assert result.after.options == {"phased": 1, "tiles": 14}
    assert planner.plan_of(REQUEST) == result.after


def test_weights_beyond_the_memory_stay_out(tuned, monkeypatch):
    monkeypatch.setattr(autotune, "MOST_WEIGHT_BYTES", 4 * 4 * 4 * 27 + 1)
    result = tuned({FAST: 5.0})
    assert winners.label(result.after) != FAST
    assert "no memory left" in result.refused[FAST]


def test_restricted_requests_are_served_as_far_as_the_race_can_tell(cache):
    times = {"reference winograd 4x2x2": 3.0, FAST: 5.0, "reference grouped": 8.0}
    request = Request.of(DENSE)
    candidates = [c.plan for c in planner.candidates(DENSE, backend="reference") if not c.reason]
    assert {winners.label(p) for p in candidates} >= {*times}
    winners.keep(request, winners.Record("reference winograd 4x2x2", times, {SLOW: 90.0}))

    def label(**options):
        return winners.label(planner.plan(DENSE, backend="reference", **options))

    by_estimate = winners.label(min(candidates, key=planner.costs.estimate_ms))
    assert label() == "reference winograd 4x2x2"
    assert label(algorithm="direct") == "reference grouped"
    assert label(tile=(2, 2, 2)) == FAST
    assert label(tolerance=4.5) == by_estimate  # another tolerance is another question
    assert label(layout=CONTIGUOUS) == by_estimate
    # Given up: not known well enough to prefer it.
    options = {"backend": "reference", "algorithm": "winograd", "tile": (1, 2, 2)}
    assert planner.candidates(DENSE, **options)[0].measured_ms is None
    # A race of its own goes before the general one.
    direct = Request.of(DENSE, backend="reference")
    winners.keep(direct, winners.Record(FAST, {FAST: 2.0}))
    assert label() == FAST


def test_a_result_of_a_restricted_race_serves_only_its_like(cache):
    winners.keep(REQUEST, winners.Record(FAST, {FAST: 2.0}))
    assert planner.plan(DENSE, backend="reference").tile == (2, 2, 2)
    general = planner.candidates(DENSE)
    assert all(c.measured_ms is None for c in general)
    narrow = planner.candidates(DENSE, backend="reference", tolerance=1.0)
    assert all(c.measured_ms is None for c in narrow)


def test_explain_shows_what_was_measured(cache, capsys):
    arguments = ((1, 4, 6, 8, 8), (4, 4, 3, 3, 3))
    fastconv.explain(*arguments, padding=1, backend="reference")
    assert "measured" not in capsys.readouterr().out
    times = {FAST: 5.0, "reference grouped": 8.0}
    winners.keep(REQUEST, winners.Record(FAST, times, {SLOW: 90.0}))
    fastconv.explain(*arguments, padding=1, backend="reference")
    lines = capsys.readouterr().out.splitlines()
    assert "measured" in lines[1]
    first, direct = lines[2], next(line for line in lines if " grouped " in line)
    assert first.startswith(">  reference  winograd F(2x2x2, 3x3x3)")
    assert "5.000 ms" in first
    assert direct.split()[-3:] == ["8.000", "ms", "slower"]
    assert any(line.split()[-4:] == ["~90.000", "ms", "clearly", "slower"] for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "xpu", "backend": "reference"}, "device 'xpu' is not one of 'cpu', 'cuda'"),
        ({"dtype": "float16"}, "dtype float16 is not supported; use one of float32, float64"),
    ],
)
def test_what_cannot_be_timed_is_refused(cache, options, message):
    with pytest.raises(UnsupportedError, match=f"tune: {message}"):
        fastconv.tune(DENSE, **options)
    with pytest.raises(UnsupportedError, match="tune: nothing to time, the output .* is empty"):
        fastconv.tune(Geometry.of((0, 4, 6, 8, 8), (4, 4, 3, 3, 3)))


# The trial: every backend's plans are right on its arrays, and a small mistake is seen.


def plans_of(request):
    found = [c.plan for c in planner.priced(request) if c.reason is None]
    return found[:2] + found[-1:]


TRIALS = [
    Request.of(DENSE),
    Request.of(DENSE, dtype="float64", layout=CONTIGUOUS),
    *(
        Request.of(DENSE, epilogue=Epilogue(True, activation, True), layout=layout)
        for activation, layout in zip(ACTIVATIONS, LAYOUTS * 3, strict=False)
    ),
    Request.of(Geometry.of((2, 4, 9), (4, 4, 3), 2, 1), epilogue=Epilogue(True)),
    Request.of(Geometry.of((1, 6, 9, 7), (6, 1, 3, 3), 1, 1, groups=6)),
    Request.of(
        SeparableGeometry.of((1, 4, 6, 7, 7), (8, 4, 3, 1, 1), (8, 1, 1, 3, 3), (5, 8, 1, 1, 1)),
        epilogue=(Epilogue(True, "relu"), Epilogue(), Epilogue(True, "silu", True)),
    ),
    Request.of(
        Geometry.of((2, 4, 3, 6, 6), (4, 4, 3, 3, 3), 1, (0, 1, 1)),
        epilogue=Epilogue(True, "relu", True),
        continual=True,
    ),
]


@pytest.mark.parametrize("backend", USED)
@pytest.mark.parametrize("request_", TRIALS, ids=str)
def test_right_results_pass_the_trial(backend, request_):
    trial = Trial(request_)
    restricted = Request.of(**{**vars(request_), "backend": backend})
    for plan in plans_of(restricted):
        call, answer = trial.ready(plan)
        call()
        factor = planner.error_factor(plan)
        assert trial.wrong(answer(), factor) is None, plan.algorithm


@pytest.mark.skipif("numba" not in USED, reason="needs Numba")
@pytest.mark.parametrize("request_", [TRIALS[0], TRIALS[-1]], ids=["convolution", "stream"])
def test_without_pytorch_plans_run_on_arrays(monkeypatch, request_):
    monkeypatch.setattr(
        fastconv.backends, "available", lambda: {**USABLE, "torch": "not installed"}
    )
    trial = Trial(request_)
    plan = plans_of(Request.of(**{**vars(request_), "backend": "numba"}))[0]
    call, answer = trial.ready(plan)
    call()
    assert isinstance(answer(), np.ndarray)
    assert trial.wrong(answer(), planner.error_factor(plan)) is None


@pytest.mark.parametrize(
    "mistake", [1e-3, float("nan"), float("inf")], ids=["one part in a thousand", "nan", "inf"]
)
def test_one_wrong_element_is_seen(monkeypatch, mistake):
    module = kernel("grouped", "reference")
    right = module.run

    def run(plan, x, packed, bias, residual, y, workspace):
        right(plan, x, packed, bias, residual, y, workspace)
        y[0, -1, -1, -1, -1] += mistake

    monkeypatch.setattr(module, "run", run)
    trial = Trial(REQUEST)
    _, answer = trial.ready(Plan("grouped", "reference", DENSE))
    reason = trial.wrong(answer(), 1.0)
    assert reason is not None
    assert reason.startswith("its result is wrong")


def test_a_wrong_kernel_does_not_win_a_real_race(cache, monkeypatch):
    """As above, but from end to end: only who wins is invented."""
    module = kernel("winograd", "reference")
    right = module.run

    def run(plan, x, packed, bias, residual, y, workspace):
        right(plan, x, packed, bias, residual, y, workspace)
        y *= np.float32(1.0001)

    def all_equal(functions, rounds, budget_s, clock):
        return autotune.Times(dict.fromkeys(functions, 1.0), {}, False)

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(autotune, "race", all_equal)
    result = fastconv.tune(DENSE, backend="reference")
    assert result.after.family == "grouped"
    assert result.refused
    assert all("its result is wrong: rms error" in reason for reason in result.refused.values())


# Models.


@pytest.mark.skipif(len(USED) < 3, reason="needs PyTorch and Numba")
def test_accelerate_measures_what_its_layers_ask_for_once(cache, monkeypatch):
    import torch

    from fastconv.nn import rewrite

    asked = []

    def invented(request):
        asked.append(request)
        plans = [c.plan for c in planner.candidates(request.geometry, **options(request))]
        plan = next(p for p in plans if p.backend == "numba")
        name = winners.label(plan)
        winners.keep(request, winners.Record(name, {name: 1.0}))

    def options(request):
        return {k: v for k, v in vars(request).items() if k != "geometry"}

    monkeypatch.setattr(rewrite, "tune_request", invented)
    layers = [torch.nn.Conv3d(16, 16, 3, padding=1) for _ in range(2)]
    model = torch.nn.Sequential(*layers, torch.nn.Conv3d(16, 16, 1)).eval()
    x = torch.randn(1, 16, 6, 12, 12)
    _, report = fastconv.accelerate(model, x)
    assert asked == []
    assert "numba" not in {layer.plan.backend for layer in report.layers}  # by estimate
    new, report = fastconv.accelerate(model, x, tune=True, tolerance=3)
    assert [request.geometry.kernel for request in asked] == [(3, 3, 3), (1, 1, 1)]
    assert {request.tolerance for request in asked} == {3.0}
    assert {layer.plan.backend for layer in report.layers} == {"numba"}
    with torch.no_grad():
        torch.testing.assert_close(new(x), model(x), atol=1e-4, rtol=1e-4)
    fastconv.accelerate(model, x, tune=True, tolerance=3)
    assert len(asked) == 2


@pytest.mark.skipif(available()["torch"] is not None, reason="needs PyTorch")
def test_a_module_runs_the_winner_from_its_next_call_on(cache):
    import torch

    module = fastconv.nn.Conv3d(4, 4, 3, padding=1, bias=False, backend="torch")
    x = torch.randn(DENSE.x_shape)
    with torch.no_grad():
        want = module(x)
        module.backend = "auto"
        before = module.plan_for(x)
        found = planner.candidates(DENSE, layout=CONTIGUOUS)
        other = next(c.plan for c in found if not c.reason and c.plan != before)
        request = Request.of(DENSE, layout=CONTIGUOUS)
        winners.keep(request, winners.Record(winners.label(other), {winners.label(other): 1.0}))
        assert module.plan_for(x) == other
        torch.testing.assert_close(module(x), want, atol=1e-4, rtol=1e-4)
