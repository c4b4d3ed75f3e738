"""Hypothesis profiles, and arrays whose unwritten elements and broken edges show."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import settings

from cases import Fenced, OnIsa

# What was tuned on this machine does not change what the tests test.
os.environ["FASTCONV_CACHE"] = f"{tempfile.gettempdir()}/fastconv-tests-{os.getpid()}"
# Kernels compile on their first call, so no example has a deadline. CI repeats the same examples.
settings.register_profile(
    "default", max_examples=20, deadline=None, derandomize=bool(os.environ.get("CI"))
)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("default")


@pytest.fixture
def poisoned() -> Iterator[Callable[..., np.ndarray]]:
    """`poisoned(shape, dtype, layout)`: a NaN-filled array; its fences are checked afterwards."""
    handed_out: list[Fenced] = []

    def make(*args: object, **kwargs: object) -> np.ndarray:
        handed_out.append(Fenced(*args, **kwargs))
        return handed_out[-1].array

    yield make
    for array in handed_out:
        array.check()


@pytest.fixture(autouse=True)
def _same_threads_for_every_test():
    """What a test, a demo or a benchmark sets does not serialise the tests behind it."""
    torch, numba = sys.modules.get("torch"), sys.modules.get("numba")
    before = (torch and torch.get_num_threads(), numba and numba.get_num_threads())
    yield
    if torch and torch.get_num_threads() != before[0]:
        torch.set_num_threads(before[0])
    if numba and numba.get_num_threads() != before[1]:
        numba.set_num_threads(before[1])


def pytest_make_parametrize_id(val: object) -> str | None:
    return f"c-{val.isa}" if isinstance(val, OnIsa) else None
