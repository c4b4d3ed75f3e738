"""Depthwise tiles, from a plan to its kernel: how channels lie in vectors, and who does what."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

import numpy as np

from ..geometry import Geometry
from ..plan import Plan
from .depthwise_kernel import tile_kernel
from .finish import activation_number
from .memory import aligned
from .simd import Kernel, address, kernel, parallel_for, register_count, threads, vector_width

UNROLLED_MACS = 1 << 20  # below, compiling for the taps would not pay
SERIAL_MACS = 1 << 18  # below, starting threads would not pay
MOST_TAPS = 49
STRIP_BYTES = 512 << 10  # of input that a strip reads for one output frame: stays in L2
PREFETCH_BYTES = 16 << 20  # of x and y: more than stays in the caches between two layers
NEAR_BLOCK = 4  # vectors of a column of tiles: its rows stay in L1; with prefetching, all of them


@dataclass(frozen=True)
class Vectors:
    """How channels lie in vectors: the lanes of a vector read whole input channels.

    With multiplier m a vector has `channels` input channels, each read by m lanes; where m exceeds
    the lanes, an input channel has `parts` vectors.
    """

    lanes: int
    multiplier: int
    channels: int
    parts: int
    count: int

    @classmethod
    def of(cls, geometry: Geometry, dtype: str) -> Vectors:
        lanes = vector_width(dtype)
        multiplier = geometry.out_channels // geometry.in_channels
        channels, parts = max(1, lanes // multiplier), -(-multiplier // lanes)
        count = -(-geometry.in_channels // channels) * parts
        return cls(lanes, multiplier, channels, parts, count)

    @property
    def spread(self) -> int:
        """Neighbouring lanes that read one input channel."""
        return min(self.multiplier, self.lanes)

    def outputs(self, in_channels: int) -> np.ndarray:
        """The output channel of every lane (count, lanes), -1 where there is none."""
        vector, lane = np.ogrid[: self.count, : self.lanes]
        channel = vector // self.parts * self.channels
        offset = vector % self.parts * self.lanes + lane
        many = np.minimum(self.channels, in_channels - channel) * self.multiplier
        return np.where(offset < many, channel * self.multiplier + offset, -1)


@dataclass(frozen=True)
class Shape:
    """Outputs of a tile, and the taps it is compiled for; kh = 0 for taps counted at run time."""

    rows: int
    cols: int
    kh: int = 0
    kw: int = 0
    stride_h: int = 1
    stride_w: int = 1


@functools.lru_cache(maxsize=256)
def tile_shape(plan: Plan) -> Shape:
    """The tile of a plan, by its config or by the registers and the width of the output."""
    geometry, options = plan.geometry.lifted(), plan.options
    _, height, width = geometry.out_size
    (_, kh, kw), (_, stride_h, stride_w) = geometry.kernel, geometry.stride
    many = register_count() > 16
    # Wide tiles reuse more; where memory is far, what a tile reads and asks for must stay in L1.
    choice = (7, 8, 5, 4) if many and not _is_far(geometry, plan.dtype) else (4, 3)
    # Least outputs in tiles, one more for the start of each.
    best = min(choice, key=lambda cols: -(-width // cols) * (cols + 1))
    cols = options.get("cols", best)
    rows = min(options.get("rows", 2), height)
    fits = (
        geometry.dilation[1:] == (1, 1)
        and max(stride_h, stride_w) <= 2
        and max(geometry.padding[2]) < kw
        and width >= cols
        and kh * kw <= MOST_TAPS
    )
    if fits and options.get("unrolled", geometry.macs >= UNROLLED_MACS):
        return Shape(rows, cols, kh, kw, stride_h, stride_w)
    return Shape(rows=1, cols=8 if many else 4)


def _is_far(geometry: Geometry, dtype: str) -> bool:
    """Whether x and y come from memory rather than from a cache."""
    elements = prod(geometry.x_shape) + prod(geometry.y_shape)
    return elements * np.dtype(dtype).itemsize > PREFETCH_BYTES


def pack(weights: np.ndarray, plan: Plan) -> np.ndarray:
    """w (K, 1, *kernel) as (vectors, taps, lanes), zeros behind for a row outside the image."""
    geometry = plan.geometry
    outputs = Vectors.of(geometry, plan.dtype).outputs(geometry.in_channels)
    w = np.asarray(weights, plan.dtype).reshape(geometry.out_channels, geometry.taps).T
    # (taps, vectors, lanes) -> (vectors, taps, lanes)
    filled = np.where(outputs >= 0, w[:, outputs], 0).swapaxes(0, 1)
    packed = aligned((filled.size + _zeros(plan),), plan.dtype)
    packed[: filled.size] = filled.ravel()
    packed[filled.size :] = 0
    return packed


def _zeros(plan: Plan) -> int:
    """Elements that a tile reads of a row."""
    shape, geometry = tile_shape(plan), plan.geometry
    columns = (shape.cols - 1) * shape.stride_w + shape.kw if shape.kh else 0
    return columns * geometry.in_channels + vector_width(plan.dtype)


def scratch_size(plan: Plan) -> int:
    """Elements of workspace: none."""
    return 0


def run(plan, x, packed, bias, residual, y, workspace, frames=None) -> None:
    """As `depthwise.run`, for x, residual and y (N, T, H, W, C) in C order.

    frames: addresses (N, KT) of the frames that make the only column along T, instead of x
    """
    compiled, fixed, items = _launch(plan, threads(), frames is not None)
    bias = None if bias is None else np.ascontiguousarray(bias, plan.dtype)
    arrays = (x, y, residual, bias, packed)
    zeros = address(packed) + packed.nbytes - _zeros(plan) * packed.itemsize
    parallel_for(compiled, (*map(address, arrays), *fixed, zeros, address(frames)), items)


@functools.lru_cache(maxsize=256)
def _launch(plan: Plan, workers: int, listed: bool) -> tuple[Kernel, tuple[int, ...], int]:
    """The kernel of a plan, the parameters between its arrays and its zeros, how many items."""
    geometry, shape = plan.geometry.lifted(), tile_shape(plan)
    vectors, itemsize = Vectors.of(geometry, plan.dtype), np.dtype(plan.dtype).itemsize
    if geometry.macs < SERIAL_MACS:
        workers = 1
    groups, strips, chunks = _cut(geometry, vectors, shape.rows, itemsize, workers)
    far = not listed and _is_far(geometry, plan.dtype)
    fixed = (
        activation_number(plan.epilogue),
        *geometry.in_size, geometry.in_channels, geometry.out_channels,
        *geometry.out_size, *geometry.kernel, *geometry.stride, *geometry.dilation,
        *(before for before, _ in geometry.padding),
        vectors.count, vectors.channels, vectors.parts, vectors.multiplier,
        groups, strips, chunks, int(far), vectors.count if far else NEAR_BLOCK,
    )  # fmt: skip
    constants = (
        plan.dtype, itemsize, vectors.lanes, shape.rows, shape.cols, shape.kh, shape.kw,
        shape.stride_h, shape.stride_w, vectors.spread, int(listed),
    )  # fmt: skip
    return kernel(tile_kernel, *constants), fixed, geometry.batch * groups * strips * chunks


def _cut(
    geometry: Geometry, vectors: Vectors, rows: int, itemsize: int, workers: int
) -> tuple[int, int, int]:
    """Groups of vectors, strips of rows, chunks of frames: a strip in L2, work for every thread."""
    time, height, _ = geometry.out_size
    frame = prod(geometry.in_size[1:]) * geometry.in_channels * itemsize
    most = max(1, height // rows)
    groups = strips = chunks = 1
    if geometry.kernel[0] > 1:
        strips = min(most, -(-frame * geometry.span[0] // STRIP_BYTES))

    def items() -> int:
        return geometry.batch * groups * strips * chunks

    # Frames, then vectors, then rows, until the threads have equal shares.
    while items() % workers and chunks < time:
        chunks += 1
    while items() % workers and groups < vectors.count:
        groups += 1
    while items() < workers and strips < most:
        strips += 1
    return groups, strips, chunks
