"""Timing on a GPU: events around bursts of calls, by turns; and CUDA graphs, without launches.

A burst calls a contender once per input set (see `contenders.inputs`), so that the L2 cache does
not answer. `api` is `torch.cuda`, or in tests something that looks like it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fastconv.timing import Timing

from .contenders import MOST_SETS, Settings

WARMUP = 3


def timed(
    functions: Mapping[str, Callable[[], object]], settings: Settings, api: Any = None
) -> tuple[dict[str, Timing], dict[str, Timing], dict[str, str]]:
    """Time functions by turns, called one by one and replayed as a graph.

    Returns the timings of a call, the timings of a call in a graph, and for functions that cannot
    be captured the reason.
    """
    api = _api(api)
    bursts = {name: _burst(function) for name, function in functions.items()}
    for burst in bursts.values():
        for _ in range(WARMUP):
            burst()
    called = _by_turns(bursts, settings, api)
    graphs: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    for name, burst in bursts.items():
        graph = _captured(burst, api)
        if isinstance(graph, str):
            refused[name] = graph
        else:
            graphs[name] = graph
    return called, _by_turns(graphs, settings, api), refused


def best_ms(function: Callable[[], object], repeats: int = 20, api: Any = None) -> float:
    """The shortest of some calls, in milliseconds."""
    api = _api(api)
    for _ in range(WARMUP):
        function()
    samples = [_between(function, api) for _ in range(repeats)]
    api.synchronize()
    return min(start.elapsed_time(end) for start, end in samples)


def _api(api: Any) -> Any:
    if api is not None:
        return api
    import torch

    return torch.cuda


def _burst(function: Callable[[], object]) -> Callable[[], None]:
    def burst() -> None:
        for _ in range(MOST_SETS):
            function()

    return burst


def _between(function: Callable[[], object], api: Any) -> tuple[Any, Any]:
    start, end = api.Event(enable_timing=True), api.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    return start, end


def _by_turns(
    bursts: Mapping[str, Callable[[], object]], settings: Settings, api: Any
) -> dict[str, Timing]:
    """Milliseconds per call of bursts that take turns, until the repeats or half the budget end."""
    samples: dict[str, list[float]] = {name: [] for name in bursts}
    began = time.monotonic()
    for _ in range(settings.repeats if bursts else 0):
        pairs = {name: _between(burst, api) for name, burst in bursts.items()}
        api.synchronize()
        for name, (start, end) in pairs.items():
            samples[name].append(start.elapsed_time(end) / MOST_SETS)
        if time.monotonic() - began >= settings.budget_s / 2:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


def _captured(burst: Callable[[], object], api: Any) -> Callable[[], object] | str:
    """The burst as a CUDA graph, or why it cannot be one."""
    try:
        return _capture(burst, api)
    except Exception as error:  # what a library does not capture is a fact about it
        api.synchronize()
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _capture(burst: Callable[[], object], api: Any) -> Callable[[], object]:
    # Capturing asks for a warm-up on a side stream.
    side = api.Stream()
    side.wait_stream(api.current_stream())
    with api.stream(side):
        burst()
    api.current_stream().wait_stream(side)
    graph = api.CUDAGraph()
    with api.graph(graph):
        burst()
    replay: Callable[[], object] = graph.replay
    return replay
