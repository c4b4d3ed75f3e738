"""The same kernels under pytest-benchmark, for people who compare commits.

    pytest bench --benchmark-autosave -k depthwise
    pytest bench --benchmark-compare

Inputs and checks are those of `python -m fastconv bench`; here only our kernels run.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastconv import backends
from fastconv.bench import cases, machine, ours, problems
from fastconv.bench.cases import Case
from fastconv.bench.contenders import Settings
from fastconv.bench.job import set_up
from fastconv.errors import BackendError, UnsupportedError

pytest.importorskip("pytest_benchmark")
BACKENDS = [name for name in ("numba", "c", "torch") if backends.available()[name] is None]
CASES = [case for case in cases.table() if case.kind != "networks"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_kernel(benchmark: Any, case: Case, backend: str) -> None:
    settings = Settings(machine.cpus())
    set_up(settings)
    problem = problems.make(case)
    try:
        prepared = ours.prepare(problem, ours.Choice(backend), settings)
    except (BackendError, UnsupportedError) as error:
        pytest.skip(str(error))
    _, error_rms = problem.errors(prepared.output())
    assert error_rms <= problem.allowed_rms(prepared.precision, prepared.factor)
    benchmark.extra_info["algorithm"] = prepared.algorithm
    benchmark(prepared.call)
