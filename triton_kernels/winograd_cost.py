"""What a Winograd plan should cost: its launches' bytes and multiplications at measured rates.

Rates are of an H200, of each kernel run alone on rotating inputs larger than its L2 cache.
"""

from __future__ import annotations

from math import prod

from ..plan import Plan
from .winograd_schedule import ITEM, Chunk, Schedule, schedule_of, sums

CALL_NS, START_NS = 2000.0, 1500.0  # of a run, and of each kernel
RAMP_NS = 6000.0  # of a product: its first loads and its last stores overlap with nothing
INPUT_BYTES, OUTPUT_BYTES = 3300.0, 3700.0  # per nanosecond, of the transforms
CONTIGUOUS = 0.75  # of these where x and y are contiguous
# Nanoseconds of the whole chip per program, for itself and per step and 2^17 multiplications: with
# one sum, several, and more than four.
PROGRAM_NS = {
    "split": ((10.0, 3.6), (12.0, 3.73), (12.0, 8.0)),
    "tf32": ((10.0, 2.4), (10.0, 2.0), (12.0, 4.0)),
    "half": ((10.0, 1.2), (10.0, 1.2), (12.0, 2.4)),
    "ieee": ((20.0, 18.0), (20.0, 18.0), (20.0, 18.0)),
}
MULTIPLICATIONS = 1 << 17
PROCESSORS = 132
BYTES = 3500.0  # of a product that waits for memory


def estimate_ms(plan: Plan) -> float:
    """Expected time of one run in milliseconds."""
    s = schedule_of(plan)
    if not prod(s.geometry.y_shape):
        return 0.0
    if s.direct:
        rows = s.geometry.batch * s.axes[0].count * prod(a.out for a in s.axes[1:])
        moved = ITEM[plan.dtype] * (_x(s) + _y(s))
        return (max(_product(s, rows), moved / BYTES) + START_NS + CALL_NS) / 1e6
    return (sum(_staged(s, chunk) for chunk in s.chunks) + CALL_NS) / 1e6


def _x(s: Schedule) -> int:
    return s.geometry.batch * s.x_image


def _y(s: Schedule) -> int:
    return s.geometry.batch * s.y_image * (2 if s.plan.epilogue.residual else 1)


def _staged(s: Schedule, chunk: Chunk) -> float:
    item, share = ITEM[s.plan.dtype], 1.0 if s.last else CONTIGUOUS
    part = chunk.images * chunk.rows / (s.geometry.batch * s.axes[1].count)
    v, m = item * s.points * s.v_point(chunk), 4 * s.points * s.m_point(chunk)
    starts = (1, 1) if s.fused else (s.axes[0].alpha, s.axes[0].transform.m)
    before = (item * _x(s) * part * starts[0] + v) / INPUT_BYTES
    behind = (item * _y(s) * part + m * starts[1]) / OUTPUT_BYTES
    tiles = s.axes[0].count if s.fused else s.frames[0]
    rows = chunk.images * tiles * chunk.rows * s.axes[2].count
    product = max(_product(s, rows), (v + m) / BYTES)
    return (before + behind) / share + product + (sum(starts) + 1) * START_NS


def _product(s: Schedule, rows: int) -> float:
    """Nanoseconds of a product over this many tiles."""
    p = s.product
    count = sums(s.axes[0]) if s.fused else 1
    alone, step = PROGRAM_NS[s.precision][(count > 1) + (count > 4)]
    programs = s.points * -(-rows // p.rows) * (s.columns // p.columns)
    work = s.alpha * p.rows * p.columns * p.depth / MULTIPLICATIONS
    each = alone * p.rows * p.columns / (64 * 32) / (1 if count > 1 else 8)
    each += s.depth // p.depth * step * work
    return max(programs, PROCESSORS) * each + RAMP_NS
