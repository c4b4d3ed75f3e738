"""What a plan should cost: a model with measured constants, used only to rank candidates.

Time is the longer of computing (element-wise multiplications, plus transform operations) and moving
memory, plus the cost of a call. Rates are per thread of an AVX-512 server CPU (`bench rates`
measures them); on other CPUs all of them shrink together and the ranking holds.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from math import prod

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
    ("c", "winograd"): Rate(110, 35, call_ms=0.004),
    ("c", "depthwise"): Rate(70, bytes=40, call_ms=0.004),
    ("c", "grouped"): Rate(122, call_ms=0.004),
    ("c", "hfa"): Rate(100, 35, call_ms=0.004),
    ("c", "continual"): Rate(100, bytes=30, call_ms=0.004),
    ("numba", "winograd"): Rate(105, 30),
    ("numba", "depthwise"): Rate(64, bytes=35, call_ms=0.02),
    ("numba", "grouped"): Rate(120, call_ms=0.02),
    ("numba", "hfa"): Rate(90, 30),
    ("numba", "continual"): Rate(60, bytes=20),
    ("torch", "depthwise"): Rate(36, bytes=25, call_ms=0.01),
    ("torch", "grouped"): Rate(125, call_ms=0.01),
    ("torch", "hfa"): Rate(70, bytes=25),
    ("torch", "continual"): Rate(50, bytes=15, call_ms=0.05),
}
# The definition in NumPy, and backends without measurements yet.
SLOW = Rate(0.5, 0.05, 1.0, 0.2)
# Slower cases, in multiplications per nanosecond and thread.
PIXELS_IN_LANES = 92.0  # several groups: output pixels in the lanes
TORCH_GROUPS = 45.0  # oneDNN with few channels per group
TORCH_POINTWISE = 80.0  # equal to ours on X3D-M's maps, half or less on X3D-S's
TORCH_THIN = 30.0  # oneDNN with fewer than 8 input channels, or several taps on few pixels
THIN_CHANNELS, FEW_PIXELS = 8, 256
TORCH_CONTIGUOUS_DEPTHWISE = 8.0
LAYOUT_BYTES = 8.0  # the reorder of contiguous arrays
# Transformed weights are streamed once per block of tiles: from a cache that holds them, or not.
TILES_PER_BLOCK, CACHE_BYTES, CACHED_BYTES_PER_NS, MEMORY_BYTES_PER_NS = 28, 32 << 20, 60.0, 25.0


def multiplications(plan: Plan) -> int:
    """Element-wise multiplications of one run, whole tiles."""
    return int(of_plan(plan).multiplications)


def estimate_ms(plan: Plan) -> float:
    """Expected time of one run in milliseconds."""
    rate = FAST.get((plan.backend, plan.family), SLOW)
    counts, workers = of_plan(plan), threads()
    operations = (
        counts.transform_additions + counts.transform_shifts + counts.transform_multiplications
    )
    compute = float(counts.multiplications) / _per_ns(plan, rate.multiplications)
    compute = (compute + float(operations) / rate.transforms) / workers
    memory = (counts.activation_bytes + counts.weight_bytes) / rate.bytes
    if plan.layout == CONTIGUOUS:
        memory += 2 * counts.activation_bytes / LAYOUT_BYTES
    return (max(compute, memory) + _streaming(plan, workers)) / 1e6 + rate.call_ms


def _per_ns(plan: Plan, usual: float) -> float:
    """Multiplications per nanosecond and thread, where a case is slower than its family."""
    geometry = plan.geometry
    if not isinstance(geometry, Geometry):
        return usual
    if plan.backend != "torch" and plan.family == "grouped" and geometry.groups > 1:
        return min(usual, PIXELS_IN_LANES)
    if plan.backend == "torch":
        if plan.family == "depthwise" and plan.layout == CONTIGUOUS:
            return min(usual, TORCH_CONTIGUOUS_DEPTHWISE)
        if geometry.groups > 1:
            return min(usual, TORCH_GROUPS)
        few = geometry.taps > 1 and geometry.batch * prod(geometry.out_size) < FEW_PIXELS
        if few or geometry.in_channels < THIN_CHANNELS:
            return min(usual, TORCH_THIN)
        if geometry.taps == 1:
            return min(usual, TORCH_POINTWISE)
    return usual


def _streaming(plan: Plan, workers: int) -> float:
    """Nanoseconds that a Winograd kernel waits for its transformed weights."""
    geometry = plan.geometry
    if plan.family != "winograd" or not isinstance(geometry, Geometry):
        return 0.0
    weight_bytes = of_plan(plan).weight_bytes
    tiles = geometry.batch * prod(
        -(-o // t.m) for o, t in zip(geometry.out_size, plan.transforms, strict=True)
    )
    passes = max(1.0, tiles / (TILES_PER_BLOCK * workers))
    cached = weight_bytes <= CACHE_BYTES
    return weight_bytes * passes / (CACHED_BYTES_PER_NS if cached else MEMORY_BYTES_PER_NS)


def threads() -> int:
    """Threads that kernels use: PyTorch's number where it is loaded, else the CPUs they may use."""
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if count is not None:
        return int(count())
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
