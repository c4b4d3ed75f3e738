"""Depthwise kernels as launches: one direction of a convolution, its blocks and its offsets."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import gcd, prod

from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import depthwise_axes as axes
from . import depthwise_source, emit, launch

PROCESSORS = 132  # multiprocessors of an H100 or H200
MOST_LIVE = 160  # numbers per thread that a tile may need at once
MOST_WEIGHTS = 100  # weights times elements that a thread keeps
MOST_AHEAD = 16  # elements per thread that are loaded before the first of them is used


@dataclass(frozen=True)
class Pass:
    """The forward pass of a plan, or the gradient of its input (`backward`)."""

    plan: Plan
    backward: bool = False
    options: dict[str, int] = field(default_factory=dict, hash=False, compare=False)

    @cached_property
    def geometry(self) -> Geometry:
        return self.plan.geometry.lifted()

    @property
    def multiplier(self) -> int:
        return self.geometry.out_channels // self.geometry.in_channels

    @property
    def channels(self) -> str:
        if self.multiplier == 1:
            return ""
        several = depthwise_source.SEVERAL_INPUTS, depthwise_source.SEVERAL_OUTPUTS
        return several[0] if self.backward else several[1]

    @property
    def looped(self) -> bool:
        """Whether there are too many taps to write out: a loop goes through them."""
        return self.geometry.taps > MOST_WEIGHTS

    @property
    def read_shape(self) -> tuple[int, ...]:
        return self.geometry.y_shape if self.backward else self.geometry.x_shape

    @property
    def written_shape(self) -> tuple[int, ...]:
        return self.geometry.x_shape if self.backward else self.geometry.y_shape

    @property
    def channels_last(self) -> bool:
        return self.plan.layout == CHANNELS_LAST

    def axis(self, which: int, outs: int) -> tuple[axes.Axis, int, int, int]:
        """A tile of about `outs` outputs, their number, and the offsets of inputs and outputs."""
        g = self.geometry
        kernel, stride, dilation = g.kernel[which], g.stride[which], g.dilation[which]
        before, size = g.padding[which][0], self.written_shape[2 + which]
        if self.looped:
            stride = 1 if self.backward else stride
            return axes.forward(1, 1, stride, 1), size, before if self.backward else -before, 0
        if not self.backward:
            axis = axes.forward(outs, kernel, stride, dilation)
            return axis, -(-size // axis.outs), -before, 0
        axis = axes.backward(max(1, outs // stride), kernel, stride, dilation)
        skipped = before // stride  # strides of padding in front that no tile need cover
        tiles = -(-(size + before - skipped * stride) // axis.outs)
        return axis, tiles, skipped, skipped * stride - before

    def stream(self) -> tuple[axes.Stream, int, int, int]:
        """The walk along time, the steps of its longest residue, and the two offsets."""
        g = self.geometry
        kernel, stride, dilation = g.kernel[0], g.stride[0], g.dilation[0]
        before, size = g.padding[0][0], self.written_shape[2]
        if self.looped:
            stride = 1 if self.backward else stride
            offset = before if self.backward else -before
            return axes.gathered(axes.forward(1, 1, stride, 1)), size, offset, 0
        if not self.backward:
            stream = axes.forward_stream(kernel, stride, dilation)
            return stream, -(-size // stream.out_step), -before, 0
        stream = axes.backward_stream(kernel, stride, dilation)
        if stride == 1:
            return stream, -(-size // dilation), before - (kernel - 1) * dilation, 0
        skipped = before // stride
        steps = -(-(size + before - skipped * stride) // stride)
        return stream, steps, skipped, skipped * stride - before


@dataclass(frozen=True)
class Blocks:
    """The tuning choice.

    vector         channels of a lane
    elements       channels of a thread: its lanes times vector
    rows, columns  outputs of a tile
    registers      as in `launch.Launch`
    """

    vector: int
    elements: int
    rows: int
    columns: int
    warps: int
    registers: int

    @property
    def lanes(self) -> int:
        return 32 * self.warps * self.elements // self.vector


def blocks(p: Pass) -> Blocks:
    """The plan's own choice, what it leaves open by rule.

    A tile of several outputs reads its halo once. Where neighbouring threads are neighbouring
    columns, the L1 cache does that for the columns. Taps in time and space leave registers for
    fewer channels per thread, for sums of all ages and the weights are kept for each.
    """
    g, options = p.geometry, p.options
    flat, volume = g.kernel[1:] == (1, 1), g.kernel[0] > 1 and g.kernel[1:] != (1, 1)
    elements = options.get("elements", 0)
    if not elements:
        elements = (2 if flat else 1) if not p.channels_last else 2 if volume else 4
        while elements > 1 and (
            live(p, elements, 1, 1) > MOST_LIVE
            or (g.taps <= MOST_WEIGHTS and not held(p, elements))
        ):
            elements //= 2
    widest = 1
    if p.channels_last and p.multiplier == 1:
        widest = gcd(g.out_channels, 16 // (4 if p.plan.dtype == "float32" else 2))
    vector = min(widest, options.get("vector", elements))
    tile = (1, 1)
    if p.looped:
        return Blocks(vector, max(vector, elements), 1, 1, options.get("warps", 4), 0)
    if not flat and held(p, elements):
        tiles = product(range(1, 5), range(1, 3) if volume and p.channels_last else (1,))
        fitting = [t for t in tiles if live(p, elements, *t) <= MOST_LIVE]
        tile = min(fitting, key=lambda t: (work(p, *t), -prod(t)), default=tile)
    return Blocks(
        vector,
        max(vector, elements),
        options.get("rows", tile[0]),
        options.get("columns", tile[1]),
        options.get("warps", 4),
        options.get("registers", 0),
    )


def held(p: Pass, elements: int) -> bool:
    """Whether a thread keeps the weights in registers."""
    several = p.channels == depthwise_source.SEVERAL_INPUTS
    return not several and p.geometry.taps * elements <= p.options.get("held", MOST_WEIGHTS)


def live(p: Pass, elements: int, rows: int, columns: int) -> int:
    """Numbers that a thread keeps in registers at once: sums, a step's inputs and weights."""
    time = p.stream()[0]
    height, width = p.axis(1, rows)[0], p.axis(2, columns)[0]
    sums = time.ring * time.outs * height.outs * width.outs
    inputs = len(time.frames) * len(height.positions) * len(width.positions)
    weights = p.geometry.taps if held(p, elements) else 0
    return elements * (sums + inputs + weights)


def work(p: Pass, rows: int, columns: int) -> float:
    """A measure of work: outputs, those beyond the end too, and what their tiles read."""
    total = 1.0
    for axis, outs in ((1, rows), (2, columns)):
        tile, tiles, *_ = p.axis(axis, outs)
        total *= tiles * (2 * tile.outs + len(tile.positions))
    return total


def structure(p: Pass, b: Blocks) -> depthwise_source.Structure:
    """What the kernel's text depends on."""
    g, e = p.geometry, p.plan.epilogue
    time = p.stream()[0]
    height, width = p.axis(1, b.rows)[0], p.axis(2, b.columns)[0]
    several = p.channels == depthwise_source.SEVERAL_INPUTS
    unrolled = p.options.get("unroll", int(g.kernel[1:] == (1, 1))) and not several
    loops = tuple(zip(g.stride, g.dilation, strict=True)) if p.looped else None
    unroll = time.ring if unrolled else 1
    written = unroll * len(time.frames) * len(height.positions)
    row = len(width.positions) * b.elements
    ahead = p.options.get("ahead", max(2, MOST_AHEAD // row))
    return depthwise_source.Structure(
        time=time,
        height=height,
        width=width,
        kernel=g.kernel,
        vector=b.vector,
        channels_last=p.channels_last,
        channels=p.channels,
        backward=p.backward,
        hold=held(p, b.elements),
        unroll=unroll,
        ahead=0 if several or p.looped else min(written, ahead),
        wide=wide(p, b),
        bias=e.bias and not p.backward,
        residual=e.residual and not p.backward,
        loops=loops,
    )


def wide(p: Pass, b: Blocks) -> bool:
    """Whether some offset needs 64 bits; the option of that name asks for them."""
    g = p.geometry
    padded = g.batch * g.in_channels * prod(g.padded_size)
    margin = 2 * (b.rows + b.columns) * max(g.stride) + b.lanes
    return bool(p.options.get("wide")) or launch.wide(
        padded, prod(g.y_shape) * 2 + margin, prod(g.w_shape)
    )


def frames_per_walk(p: Pass, programs: int) -> int:
    """Steps of a program: few enough programs split the walk, so that all processors work."""
    stream, steps, *_ = p.stream()
    frames = steps
    wanted = p.options.get("frames")
    if wanted:
        return min(steps, wanted)
    while programs * stream.residues * -(-steps // frames) < 4 * PROCESSORS and frames > max(
        1, 2 * stream.ring - 2
    ):
        frames = -(-frames // 2)
    return frames


def strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Elements between neighbours along (N, C, T, H, W) of a dense array."""
    _, c, t, h, w = shape
    if channels_last:
        return (t * h * w * c, 1, h * w * c, w * c, c)
    return (c * t * h * w, t * h * w, h * w, w, 1)


def kernel_launch(p: Pass, arrays: tuple[str, ...]) -> launch.Launch:
    """The launch of a pass.

    arrays  names of what is read, the weights, the bias, the residual and what is written
    """
    b = blocks(p)
    s = structure(p, b)
    _, rows, in_h, out_h = p.axis(1, b.rows)
    _, columns, in_w, out_w = p.axis(2, b.columns)
    stream, steps, in_t, out_t = p.stream()
    n, channels = p.written_shape[:2]
    vectors = channels // b.vector
    units = n * vectors * rows * columns
    lane_blocks = -(-units // b.lanes)
    frames = frames_per_walk(p, lane_blocks)
    chunks = stream.residues * -(-steps // frames)
    constants = {
        "G": b.lanes,
        "ACTIVATION": "none" if p.backward else p.plan.epilogue.activation,
        "HAS_BIAS": s.bias,
        "HAS_RESIDUAL": s.residual,
    }
    return launch.Launch(
        kernel=emit.kernel(depthwise_source.source(s), general=depthwise_source.INTEGERS),
        programs=lane_blocks * chunks,
        arrays=arrays,
        scalars=(
            *(units, chunks, frames, p.multiplier, vectors, columns, rows),
            *p.read_shape[2:],
            *p.written_shape[2:],
            *(in_t, in_h, in_w, out_t, out_h, out_w),
            *(e // b.vector for e in strides(p.read_shape, p.channels_last)),
            *(e // b.vector for e in strides(p.written_shape, p.channels_last)),
        ),
        constants=tuple(constants.items()),
        warps=b.warps,
        registers=b.registers,
    )
