"""What a plan should cost: a model with measured constants, used only to rank candidates.

Time is the longer of computing (element-wise multiplications, plus transform operations) and moving
memory, plus the cost of a call. Rates are per thread of an AVX-512 server CPU (`bench rates`
measures them); on other CPUs all of them shrink together and the ranking holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .counts import of_plan
from .geometry import Geometry
from .plan import CONTIGUOUS, Plan


@dataclass(frozen=True)
class Rate:
    """Speed of one backend at one family.

    multiplications, transforms  operations per nanosecond and thread
    bytes                        per nanosecond, all threads together
    call_ms                      cost of a call
    """

    multiplications: float
    transforms: float = 1.0
    bytes: float = 40.0
    call_ms: float = 0.02


FAST = {
    ("numba", "winograd"): Rate(105, 30),
    ("numba", "depthwise"): Rate(75),
    ("numba", "grouped"): Rate(90),
    ("numba", "hfa"): Rate(90, 30),
    ("numba", "continual"): Rate(60, bytes=20),
    ("torch", "depthwise"): Rate(40, bytes=25),
    ("torch", "grouped"): Rate(120),
    ("torch", "hfa"): Rate(70, bytes=25),
    ("torch", "continual"): Rate(50, bytes=15, call_ms=0.05),
}
# The definition in NumPy, and backends without measurements yet.
SLOW = Rate(0.5, 0.05, 1.0, 0.2)
TORCH_SMALL_GROUPS = 40.0  # oneDNN's grouped convolution with few channels per group
LAYOUT_BYTES = 8.0  # the reorder of contiguous arrays


def multiplications(plan: Plan) -> int:
    """Element-wise multiplications of one run, whole tiles."""
    return int(of_plan(plan).multiplications)


def estimate_ms(plan: Plan) -> float:
    """Expected time of one run in milliseconds."""
    rate = FAST.get((plan.backend, plan.family), SLOW)
    counts, threads = of_plan(plan), _threads()
    per_ns = rate.multiplications
    if plan.backend == "torch" and isinstance(plan.geometry, Geometry) and plan.geometry.groups > 1:
        per_ns = min(per_ns, TORCH_SMALL_GROUPS)
    operations = (
        counts.transform_additions + counts.transform_shifts + counts.transform_multiplications
    )
    compute = (
        float(counts.multiplications) / per_ns + float(operations) / rate.transforms
    ) / threads
    memory = (counts.activation_bytes + counts.weight_bytes) / rate.bytes
    if plan.layout == CONTIGUOUS:
        memory += 2 * counts.activation_bytes / LAYOUT_BYTES
    return max(compute, memory) / 1e6 + rate.call_ms


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
