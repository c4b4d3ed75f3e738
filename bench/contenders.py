"""What ours and every peer look like to the harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastconv.plan import Plan


@dataclass(frozen=True)
class Prepared:
    """A contender ready to run one problem: weights packed, code compiled.

    call       one run as its users would do it, from input to output; for `streams` one step
    output     the answer to compare with `Problem.want`, (N, K, *size); runs whatever it takes
    precision  of the operands
    algorithm  what ran, in a few words
    plans      ours only: the plans of one run, for counting
    factor     how much more error than a direct sum's the algorithm may make
    """

    call: Callable[[], Any]
    output: Callable[[], np.ndarray]
    precision: str = "float32"
    algorithm: str = ""
    plans: tuple[Plan, ...] = field(default=(), repr=False)
    factor: float = 1.0


def as_array(result: Any) -> np.ndarray:
    """A NumPy array of an array or tensor, float32 at least."""
    if isinstance(result, np.ndarray):
        return result
    tensor = result.detach().cpu()
    return np.asarray(tensor if tensor.element_size() >= 4 else tensor.float())
