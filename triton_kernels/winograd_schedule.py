"""How a Winograd plan runs on a GPU: which axis the product transforms, blocks, memory, chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

from ..geometry import Geometry
from ..layouts import CHANNELS_LAST
from ..plan import Plan
from ..transforms import Transform, transform

MOST_SUMS = 6  # accumulators of a product: more points on its axis do not fit the registers
MEGABYTE = 1 << 20
SHARED_BYTES = 152 << 10  # for operands: an A100 has 163 KB, and some is needed behind the sums
TENSOR_COLUMNS = 400  # of the 512 of a B200, whose left operands take some too
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Axis:
    """An axis of the lifted geometry: sizes, and element strides of x and y."""

    transform: Transform
    size: int
    out: int
    pad: int
    stride: int
    phases: int
    x_step: int
    y_step: int

    @property
    def alpha(self) -> int:
        return self.transform.alpha

    @property
    def count(self) -> int:
        """Tiles, the last one possibly partial."""
        return -(-self.out // self.transform.m)


@dataclass(frozen=True)
class Chunk:
    """Tiles that go through all stages together: some images, or rows of tiles of one image."""

    first_image: int
    images: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Product:
    """Blocks of the product: `rows` tiles x `columns` output channels, `depth` channels a step."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Schedule:
    """What follows from a plan before there are arrays.

    axes     the three axes in the order of the loops; the product transforms the first if `fused`,
             and the others are transformed before and behind it
    direct   nothing is left to transform but the first: the product reads x and writes y
    parts    U in one piece, or as two TF32 numbers whose sum it is
    depth    channels of V and U, each phase padded to whole steps of the product
    columns  output channels of U, padded to whole blocks;  m_columns: of M
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.last = plan, plan.layout == CHANNELS_LAST
        geometry = self.geometry = plan.geometry.lifted()
        axes = _axes(geometry, plan.transforms, self.last)
        self.x_image = geometry.in_channels * prod(geometry.in_size)
        self.y_image = geometry.out_channels * prod(geometry.out_size)
        self.x_channel = 1 if self.last else prod(geometry.in_size)
        self.y_channel = 1 if self.last else prod(geometry.out_size)
        first = _fused(axes, plan)
        self.fused = first is not None
        order = sorted(range(3), key=lambda i: i != first if self.fused else axes[i].alpha > 1)
        self.order = tuple(order)
        self.axes = tuple(axes[i] for i in order)
        self.direct = self.fused and all(a.alpha == a.phases == 1 for a in self.axes[1:])
        self.phases = prod(a.phases for a in axes)
        staged = self.axes[1:] if self.fused else self.axes
        self.points = prod(a.alpha for a in staged)
        self.split = plan.precision == "ieee" and bool(plan.options.get("split", 1))
        self.split = self.split and plan.dtype == "float32"
        self.parts = 1 + self.split
        self.product = _product(self)
        step, block = self.product.depth, self.product.columns
        self.phase_depth = -(-geometry.in_channels // step) * step
        self.depth = self.phases * self.phase_depth
        self.columns = -(-geometry.out_channels // block) * block
        self.m_columns = -(-geometry.out_channels // 16) * 16

    @property
    def precision(self) -> str:
        """Of the products: 'half', 'tf32', 'ieee', or 'split' in two TF32 numbers."""
        if self.plan.dtype != "float32":
            return "half"
        return "split" if self.split else self.plan.precision

    @property
    def alpha(self) -> int:
        """Points of the axis that the product transforms."""
        return self.axes[0].alpha if self.fused else 1

    @property
    def frames(self) -> tuple[int, int]:
        """Extent of the first axis in V and in M: pixels if the product transforms it, or tiles."""
        a = self.axes[0]
        return (a.size, a.out) if self.fused else (a.count, a.count)

    @property
    def float32_per_element(self) -> int:
        """Elements of plan.dtype in a float32 number of M."""
        return 4 // ITEM[self.plan.dtype]

    def v_rows(self, chunk: Chunk) -> int:
        return chunk.images * self.frames[0] * chunk.rows * self.axes[2].count

    def m_rows(self, chunk: Chunk) -> int:
        return chunk.images * self.frames[1] * chunk.rows * self.axes[2].count

    def v_point(self, chunk: Chunk) -> int:
        """Elements of V at one point: rows x depth."""
        return self.v_rows(chunk) * self.depth

    def m_point(self, chunk: Chunk) -> int:
        """Numbers of M at one point: rows x m_columns."""
        return self.m_rows(chunk) * self.m_columns

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """What fits the memory for V and M at a time; one chunk if the product needs none."""
        batch, rows = self.geometry.batch, self.axes[1].count
        if self.direct or not prod(self.geometry.y_shape):
            return (Chunk(0, batch, 0, rows),)
        one = Chunk(0, 1, 0, 1)
        row_bytes = ITEM[self.plan.dtype] * self.elements(one)
        fitting = max(1, self.plan.options.get("chunk", 256) * MEGABYTE // row_bytes)
        return tuple(_chunks(batch, rows, fitting))

    def elements(self, chunk: Chunk) -> int:
        """Elements of plan.dtype of V and M."""
        return self.m_start(chunk) + self.points * self.m_point(chunk) * self.float32_per_element

    def m_start(self, chunk: Chunk) -> int:
        return self.points * self.v_point(chunk)

    def workspace(self) -> int:
        return 0 if self.direct else max(map(self.elements, self.chunks))


@lru_cache(maxsize=1024)
def schedule_of(plan: Plan) -> Schedule:
    """The plan's Schedule."""
    return Schedule(plan)


def _chunks(batch: int, rows: int, fitting: int) -> Iterator[Chunk]:
    """Whole images, or even parts of one, of at most `fitting` rows of tiles."""
    if fitting >= rows:
        parts = -(-batch // (fitting // rows))
        step = -(-batch // parts)
        for first in range(0, batch, step):
            yield Chunk(first, min(step, batch - first), 0, rows)
    else:
        step = -(-rows // -(-rows // fitting))
        for image in range(batch):
            for first in range(0, rows, step):
                yield Chunk(image, 1, first, min(step, rows - first))


def _axes(geometry: Geometry, transforms: tuple[Transform, ...], last: bool) -> list[Axis]:
    lifted = (transform(1, 1),) * (3 - len(transforms)) + transforms
    found = []
    for i, t in enumerate(lifted):
        x_step = prod(geometry.in_size[i + 1 :]) * (geometry.in_channels if last else 1)
        y_step = prod(geometry.out_size[i + 1 :]) * (geometry.out_channels if last else 1)
        size, out, stride = geometry.in_size[i], geometry.out_size[i], geometry.stride[i]
        phases = min(stride, geometry.kernel[i])
        found.append(Axis(t, size, out, geometry.padding[i][0], stride, phases, x_step, y_step))
    return found


def _fused(axes: list[Axis], plan: Plan) -> int | None:
    """The axis that the product transforms; where there is a choice, the first: it leaves planes.

    Two axes alone are cheaper transformed before and behind: the product has larger blocks.
    """
    transformed = [i for i, a in enumerate(axes) if a.alpha > 1]
    able = [i for i in transformed if axes[i].stride == 1 and sums(axes[i]) <= MOST_SUMS]
    wanted = plan.options.get("fuse", len(transformed) != 2)
    return able[0] if able and wanted else None


def sums(axis: Axis) -> int:
    """Accumulators of a product over this axis; m = 1 adds up its taps in one."""
    return 1 if axis.transform.m == 1 else axis.alpha


def _product(s: Schedule) -> Product:
    """Blocks as measured on an H200: small ones where there are many sums, several per processor.

    None has more than 128 registers of sums per thread, more shared memory than an A100, or more
    tensor memory than a B200, where each `tl.dot` of a step gets a piece of its own.
    """
    count = sums(s.axes[0]) if s.fused else 1
    options, channels = s.plan.options, s.geometry.out_channels
    if count > 1:
        rows, columns, warps, stages = 64, 32 if count <= 4 else 16, 4, 2
    elif s.alpha > 1:
        rows, columns, warps, stages = 128, 64, 8, 3
    elif _least_padding(channels, 128) == 128:
        rows, columns, warps, stages = 128, 128, 8, 3
    else:
        rows, columns, warps, stages = 128, 64, 4, 3
    rows, warps = options.get("rows", rows), options.get("warps", warps)
    columns = _least_padding(channels, options.get("columns", columns))
    half = s.plan.dtype != "float32"
    depth = options.get("depth", 32 if half and s.geometry.in_channels > 16 else 16)
    stages = options.get("stages", stages)

    def fits() -> bool:
        step = s.alpha * depth * (rows + s.parts * columns) * ITEM[s.plan.dtype]
        if count * rows * columns > 128 * 32 * warps or (stages - 1) * step > SHARED_BYTES:
            return False
        return s.alpha * (2 * s.parts - 1) * columns <= TENSOR_COLUMNS

    while columns > 16 and not fits():
        columns //= 2
    if not fits():
        stages = 2
    return Product(rows, columns, depth, warps, stages)


def _least_padding(channels: int, most: int) -> int:
    """The block of output channels that computes least, where a block costs 16 channels more."""
    blocks = [b for b in (128, 64, 32, 16) if b <= most]
    return min(blocks, key=lambda b: -(-channels // b) * (b + 16))
