"""What a plan should cost: a model with measured constants, used only to rank candidates.

Time is the longer of computing (element-wise multiplications, plus transform operations) and moving
memory, plus what nothing hides: copies to another layout, weights that stream by, and the call
itself with the start of its threads. Rates are per thread of an AVX-512 server CPU (`bench rates`
measures them); on other CPUs all of them shrink together and the ranking holds. Where it does not,
`tune` measures.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from math import prod

from . import costs_cuda
from .counts import ELEMENT_BYTES, of_plan
from .geometry import Geometry, SeparableGeometry
from .plan import CONTIGUOUS, Plan
from .transforms import transform


@dataclass(frozen=True)
class Rate:
    """Speed of one backend at one family.

    multiplications, transforms  operations per nanosecond and thread
    bytes                        per nanosecond, all threads together, from memory; caches that hold
                                 all of it give IN_CACHE times as many
    call_ms                      cost of a call: Python, allocation, starting the threads
    """

    multiplications: float
    transforms: float = 1.0
    bytes: float = 40.0
    call_ms: float = 0.02


# A step of a stream computes as fast as the family of its window: depthwise, grouped or winograd.
FAST = {
    ("c", "winograd"): Rate(118, 52, call_ms=0.004),
    ("c", "depthwise"): Rate(70, bytes=60, call_ms=0.004),
    ("c", "grouped"): Rate(118, call_ms=0.004),
    ("c", "hfa"): Rate(120, 45, call_ms=0.004),
    ("c", "continual"): Rate(0, bytes=60, call_ms=0.006),
    ("numba", "winograd"): Rate(110, 50),
    ("numba", "depthwise"): Rate(68, bytes=55),
    ("numba", "grouped"): Rate(114),
    ("numba", "hfa"): Rate(100, 50),
    ("numba", "continual"): Rate(0, bytes=40, call_ms=0.055),
    ("torch", "depthwise"): Rate(38, bytes=34, call_ms=0.008),
    ("torch", "grouped"): Rate(125, call_ms=0.006),
    ("torch", "continual"): Rate(0, bytes=60, call_ms=0.05),
}
# The definition in NumPy, and backends without measurements yet.
SLOW = Rate(0.5, 0.05, 1.0, 0.2)
# Slower cases, in multiplications per nanosecond and thread.
STRIDED_DEPTHWISE = 0.6  # of the usual rate: neighbours share fewer inputs
PIXELS_IN_LANES = 108.0  # several groups: output pixels in the lanes
# Winograd there: inputs and outputs per nanosecond and transformed axis, and of V and M.
LANES_AXIS, LANES_POINTS = 5.4, 25.0
TORCH_GROUPS = 45.0  # oneDNN with few channels per group
TORCH_POINTWISE = 80.0  # equal to ours on X3D-M's maps, half or less on X3D-S's
TORCH_THIN = 15.0  # oneDNN with fewer than 8 input channels
TORCH_FEW_PIXELS = 30.0  # several taps on few pixels, or on one frame
THIN_CHANNELS, FEW_PIXELS = 8, 256
TORCH_WINDOW_BYTES = 14.0  # of a stream's window, per nanosecond
TORCH_CONTIGUOUS_FLAT = 1.5  # depthwise, contiguous, and a kernel flat on one of three axes
LAYOUT_BYTES, LAYOUT_BYTES_IN_CACHE = 10.0, 40.0  # the reorder of contiguous arrays
LANES = 16  # output channels come in whole vectors, where they are in the lanes
CACHE_BYTES, IN_CACHE = 32 << 20, 2.0  # activations have half of it
# Transformed weights are streamed once per block of tiles: from a cache that holds them, or not.
LARGE_WEIGHTS = 16 << 20  # that the C backend does not stream once per block
TILES_PER_BLOCK, CACHED_BYTES_PER_NS, MEMORY_BYTES_PER_NS = 28, 40.0, 20.0


def multiplications(plan: Plan) -> int:
    """Element-wise multiplications of one run, whole tiles."""
    return int(of_plan(plan).multiplications)


def estimate_ms(plan: Plan) -> float:
    """Expected time of one run in milliseconds."""
    if plan.device != "cpu":
        return costs_cuda.estimate_ms(plan)
    if plan.backend == "torch" and isinstance(plan.geometry, SeparableGeometry):
        return sum(map(estimate_ms, costs_cuda.stages(plan)))  # PyTorch runs one after the other
    rate, workers = FAST.get((plan.backend, plan.family), SLOW), threads()
    compute = multiplications(plan) * _padding(plan) / _per_ns(plan, rate)
    compute += _transforms(plan, rate)
    moved = costs_cuda.moved_bytes(plan)
    memory = moved / (rate.bytes * (IN_CACHE if moved <= CACHE_BYTES // 2 else 1.0))
    hidden = max(compute / workers, memory)
    extra = _layout_copies(plan) + _streaming(plan, workers) + _window(plan)
    return (hidden + extra) / 1e6 + rate.call_ms


def threads() -> int:
    """Threads that kernels use: PyTorch's number where it is loaded, else the CPUs they may use."""
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if count is not None:
        return int(count())
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _transforms(plan: Plan, rate: Rate) -> float:
    """Nanoseconds of one thread."""
    geometry = plan.geometry
    if plan.family == "winograd" and isinstance(geometry, Geometry) and geometry.groups > 1:
        values = prod(geometry.x_shape) + prod(geometry.y_shape)
        tiled = [t.alpha / t.m for t in plan.transforms if t.m > 1]
        moved = values * (len(tiled) / LANES_AXIS + prod(tiled) / LANES_POINTS)
        return moved * _vector_share() if plan.backend == "c" else moved
    return _transform_operations(plan) / _rate_of_window(plan, rate).transforms


def _transform_operations(plan: Plan) -> float:
    """Of the input and output transforms; the depthwise stage of a block sums in its products."""
    if plan.family == "hfa":
        assert isinstance(plan.geometry, SeparableGeometry)
        time = plan.transforms[0]
        if time.m == 1:
            return 0.0
        geometry, one = plan.geometry.temporal, transform(1, 1)
        plan = replace(plan, family="winograd", geometry=geometry, transforms=(time, one, one))
    c = of_plan(plan)
    return float(c.transform_additions + c.transform_shifts + c.transform_multiplications)


def _window_family(plan: Plan) -> str:
    """The family that computes a stream's columns."""
    g = plan.geometry
    assert isinstance(g, Geometry)
    if plan.transforms:
        return "winograd"
    return "depthwise" if g.is_depthwise and g.groups > 1 else "grouped"


def _rate_of_window(plan: Plan, rate: Rate) -> Rate:
    """Of the family that computes a stream's columns; of other plans their own."""
    if plan.family != "continual":
        return rate
    return FAST.get((plan.backend, _window_family(plan)), SLOW)


def _padding(plan: Plan) -> float:
    """Multiplications executed per one that counts: our kernels fill whole vectors of outputs."""
    geometry = plan.geometry
    if plan.backend == "torch" or not isinstance(geometry, Geometry) or geometry.groups > 1:
        return 1.0
    return -(-geometry.out_channels // LANES) * LANES / geometry.out_channels


def _per_ns(plan: Plan, rate: Rate) -> float:
    """Multiplications per nanosecond and thread, where a case is slower than its family."""
    geometry, usual = plan.geometry, rate.multiplications
    if not isinstance(geometry, Geometry):
        return usual
    family = plan.family
    if family == "continual":
        family, usual = _window_family(plan), _rate_of_window(plan, rate).multiplications
    if family == "depthwise" and max(geometry.stride) > 1:
        usual *= STRIDED_DEPTHWISE
    if plan.backend != "torch":
        several = family == "grouped" and geometry.groups > 1
        return min(usual, PIXELS_IN_LANES) if several else usual
    if family == "depthwise":
        flat = geometry.n == 3 and min(geometry.kernel) == 1 and plan.layout == CONTIGUOUS
        return min(usual, TORCH_CONTIGUOUS_FLAT) if flat else usual
    if geometry.groups > 1:
        return min(usual, TORCH_GROUPS)
    if geometry.in_channels < THIN_CHANNELS:
        return min(usual, TORCH_THIN)
    few = geometry.batch * prod(geometry.out_size) < FEW_PIXELS
    if prod(geometry.kernel[1:]) > 1 and (few or plan.family == "continual"):
        return min(usual, TORCH_FEW_PIXELS)
    return min(usual, TORCH_POINTWISE) if geometry.taps == 1 else usual


def _vector_share() -> float:
    """Lanes of the C backend's vectors, of those that the rates were measured with. Where there are
    fewer, everything multiplies more slowly, but values move as fast: they count for less.
    """
    from . import backends

    if backends.available()["c"] is not None:
        return 1.0
    from .c_kernels import launch

    return launch.lanes() / LANES


def _layout_copies(plan: Plan) -> float:
    """Nanoseconds of copying contiguous arrays to channels last and back."""
    if plan.layout != CONTIGUOUS:
        return 0.0
    moved = of_plan(plan).activation_bytes
    cached = moved <= CACHE_BYTES // 2
    return 2 * moved / (LAYOUT_BYTES_IN_CACHE if cached else LAYOUT_BYTES)


def _window(plan: Plan) -> float:
    """Nanoseconds in which PyTorch's backend puts the window of a column together."""
    if plan.backend != "torch" or plan.family != "continual":
        return 0.0
    assert isinstance(plan.geometry, Geometry)
    return prod(plan.geometry.x_shape) * ELEMENT_BYTES[plan.dtype] / TORCH_WINDOW_BYTES


def _streaming(plan: Plan, workers: int) -> float:
    """Nanoseconds that a Winograd kernel waits for its transformed weights."""
    geometry = plan.geometry
    streamed = plan.family in ("winograd", "continual") and bool(plan.transforms)
    if not streamed or not isinstance(geometry, Geometry) or geometry.groups > 1:
        return 0.0
    weight_bytes = of_plan(plan).weight_bytes
    tiles = geometry.batch * prod(
        -(-o // t.m) for o, t in zip(geometry.out_size, plan.transforms, strict=True)
    )
    passes = max(1.0, tiles / (TILES_PER_BLOCK * workers))
    cached = weight_bytes <= CACHE_BYTES
    if plan.backend == "c" and weight_bytes > LARGE_WEIGHTS:
        # In phases: read once, by all threads together.
        return weight_bytes / (2 * MEMORY_BYTES_PER_NS)
    return weight_bytes * passes / (CACHED_BYTES_PER_NS if cached else MEMORY_BYTES_PER_NS)
