"""Depthwise tiles: several outputs along H and W of one vector of channels, kept in registers.

Nothing is copied or padded: outside the image a row is read from a line of zeros, columns and
channels are masked, and only tiles at an edge pay for either. With the taps known when compiling,
a row of input is loaded once for all outputs and taps that read it; otherwise loops run over them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from ..epilogue import ACTIVATIONS
from .activations import activate
from .memory import int_at
from .simd import Code, Int, Vec, block, fma, register_count

_MACHINE = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")

# The parameters of `depthwise_kernel.tile_kernel`, by position.
(
    X, Y, RESIDUAL, BIAS, WEIGHTS, ACTIVATION, TIME, HEIGHT, WIDTH, CHANNELS, OUTS,
    OUT_TIME, OUT_HEIGHT, OUT_WIDTH, TAPS_T, TAPS_H, TAPS_W, STRIDE_T, STRIDE_H, STRIDE_W,
    DILATION_T, DILATION_H, DILATION_W, PAD_T, PAD_H, PAD_W,
    VECTORS, VECTOR_CHANNELS, VECTOR_PARTS, MULTIPLIER, GROUPS, STRIPS, CHUNKS,
    PREFETCH, BLOCK, ZEROS, FRAMES,
) = range(37)  # fmt: skip


class Tile(NamedTuple):
    """What is known of a tile when it is compiled; kh = 0 for taps counted at run time."""

    rows: int
    cols: int
    kh: int
    kw: int
    stride_h: int
    stride_w: int
    spread: int  # outputs that read one input channel
    masked: int  # 0: every load and every store is inside
    listed: int  # 1: the addresses of the frames are in a table, 0: frames lie one after another

    @property
    def in_rows(self) -> int:
        return (self.rows - 1) * self.stride_h + self.kh

    @property
    def in_cols(self) -> int:
        return (self.cols - 1) * self.stride_w + self.kw

    def uses(self, r: int, q: int) -> list[tuple[int, int]]:
        """(output, tap) pairs that read input row r, column q."""
        return [
            (i * self.cols + j, (r - i * self.stride_h) * self.kw + q - j * self.stride_w)
            for i in range(self.rows)
            for j in range(self.cols)
            if 0 <= r - i * self.stride_h < self.kh and 0 <= q - j * self.stride_w < self.kw
        ]


@block
def tile(
    code: Code, dtype: str, rows: int, cols: int, kh: int, kw: int, stride_h: int, stride_w: int,
    spread: int, masked: int, listed: int, params: Int, table: Int, x: Int, weights: Int,
    frames: Int, bias: Int, residual: Int, y: Int, top: Int, left: Int, lanes_in: Int,
    lanes_out: Int, count: Int, next_x: Int, next_y: Int,
) -> None:  # fmt: skip
    """y = activation(bias + sum over frames and taps + residual) for rows x cols outputs.

    x: where input row `top`, column `left` of the first frame is, or would be; how far behind a
        frame's begin, if the frames are listed in the table
    bias, residual: 0 for none
    lanes_in, lanes_out: channels that exist from here on;  count: columns of outputs that exist
    next_x, next_y: from where on to fetch into the cache for later tiles; 0 for nothing
    """
    shape = Tile(rows, cols, kh, kw, stride_h, stride_w, spread, masked, listed)
    y_row = int_at(code, params, OUT_WIDTH) * int_at(code, params, OUTS)
    y_col = int_at(code, params, OUTS)
    _fetch(code, shape, params, next_x, next_y, y_row)
    lanes = code.select(bias.is_(0), 0, lanes_out)
    start = code.load(code.select(bias.is_(0), weights, bias), 0, code.first(lanes))
    sums = _unrolled if kh else _looped
    acc = [start] * rows * cols
    acc = sums(code, shape, params, table, x, weights, frames, top, left, lanes_in, acc)

    places = [(i * cols + j, y_row * i + y_col * j, j) for i in range(rows) for j in range(cols)]
    masks: list = [None] * cols
    if masked:
        masks = [code.first(lanes_out)] * cols
    if masked and not kh:
        masks = [code.first(code.select(count > j, lanes_out, 0)) for j in range(cols)]

    def add_residual(_: Int, carry: list[Vec]) -> list[Vec]:
        return [carry[a] + code.load(residual, at, masks[j]) for a, at, j in places]

    acc = code.loop(code.select(residual.is_(0), 0, 1), add_residual, acc)
    acc = activated(code, int_at(code, params, ACTIVATION), acc)
    for a, at, j in places:
        code.store(acc[a], y, at, masks[j])


def _fetch(code: Code, shape: Tile, params: Int, x: Int, y: Int, y_row: Int) -> None:
    """Ask for this vector's share of the rows that the next tiles read and write first."""
    x_row = int_at(code, params, WIDTH) * int_at(code, params, CHANNELS)
    with code.when(x > 0):
        for i in range(shape.rows * shape.stride_h):
            for j in range(shape.cols * shape.stride_w):
                code.prefetch(x, x_row * i + code.lanes * j, level=1)
        for i in range(shape.rows):
            for j in range(shape.cols):
                code.prefetch(y, y_row * i + code.lanes * j, write=True)


def _reader(code: Code, shape: Tile) -> Callable:
    """load(address, offset, mask) of an input vector, its channels repeated for their outputs."""
    lanes = [lane // shape.spread for lane in range(code.lanes)]

    def load(address: Int, offset: Int | int, mask) -> Vec:
        vector = code.load(address, offset, mask)
        return vector.shuffle(vector, lanes) if shape.spread > 1 else vector

    return load


def _unrolled(
    code: Code, shape: Tile, params: Int, table: Int, x: Int, weights: Int, frames: Int, top: Int,
    left: Int, lanes_in: Int, acc: list[Vec],
) -> list[Vec]:  # fmt: skip
    """acc + the sums, every row and column of the input loaded once per frame.

    Only the kw - 1 outermost columns on either side may be outside the image.
    """
    load = _reader(code, shape)
    height, width = int_at(code, params, HEIGHT), int_at(code, params, WIDTH)
    x_col = int_at(code, params, CHANNELS)
    x_row = width * x_col
    x_frame = int_at(code, params, DILATION_T) * height * x_row * code.item
    zeros = int_at(code, params, ZEROS)
    masks: list = [None] * shape.in_cols
    if shape.masked:
        for q in range(shape.in_cols):
            inner = shape.kw - 1 <= q <= shape.in_cols - shape.kw
            inside = code.within(code.int(0), left + q, width)
            masks[q] = code.first(lanes_in if inner else code.select(inside, lanes_in, 0))

    # Every row as an address in the first frame and a step from frame to frame; outside, zeros.
    rows = []
    for r in range(shape.in_rows):
        row, step = x + x_row * (r * code.item), code.int(1) if shape.listed else x_frame
        if shape.masked:
            exists = code.within(code.int(0), top + r, height)
            row, step = code.select(exists, row, zeros), code.select(exists, step, 0)
        rows.append((row, step))

    taps = shape.kh * shape.kw
    # All weights of a frame in registers beside the sums, or only those of a row of input.
    hold = shape.rows * shape.cols + taps < register_count() - 3

    def frame(k: Int, acc: list[Vec]) -> list[Vec]:
        def load_weights(needed: set[int]) -> dict[int, Vec]:
            return {t: code.load(weights, (k * taps + t) * code.lanes) for t in sorted(needed)}

        w = load_weights(set(range(taps)) if hold else set())
        frame_or_number = int_at(code, table, k) if shape.listed else k
        acc = list(acc)
        for r, (row, step) in enumerate(rows):
            acc = _pinned(code, acc)
            uses = [shape.uses(r, q) for q in range(shape.in_cols)]
            if not hold:
                w = load_weights({tap for pairs in uses for _, tap in pairs})
            place = row + frame_or_number * step
            for q, pairs in enumerate(uses):
                if pairs:
                    pixel = load(place, x_col * q, masks[q])
                for output, tap in pairs:
                    acc[output] = fma(pixel, w[tap], acc[output])
        return acc

    return code.loop(frames, frame, acc)


def _pinned(code: Code, acc: list[Vec]) -> list[Vec]:
    """The same vectors, in registers at this point of the machine code.

    Without it LLVM loads the pixels of several rows before it uses the first, and runs out of
    registers.
    """
    register = {"x86_64": "v" if register_count() > 16 else "x", "aarch64": "w"}.get(_MACHINE)
    if register is None:
        return acc
    kinds = [z.type for z in acc]
    form = ir.FunctionType(ir.LiteralStructType(kinds), kinds)
    constraints = ",".join([f"={register}"] * len(acc) + [str(a) for a in range(len(acc))])
    values = [z.value for z in acc]
    pinned = code.builder.asm(form, "", constraints + ",~{memory}", values, True)
    return [z.like(code.builder.extract_value(pinned, a)) for a, z in enumerate(acc)]


def _looped(
    code: Code, shape: Tile, params: Int, table: Int, x: Int, weights: Int, frames: Int, top: Int,
    left: Int, lanes_in: Int, acc: list[Vec],
) -> list[Vec]:  # fmt: skip
    """acc + the sums of one row of outputs, taps, strides and dilations at run time."""
    load = _reader(code, shape)
    height, width = int_at(code, params, HEIGHT), int_at(code, params, WIDTH)
    x_col = int_at(code, params, CHANNELS)
    kh, kw = int_at(code, params, TAPS_H), int_at(code, params, TAPS_W)
    stride, dilation_h = int_at(code, params, STRIDE_W), int_at(code, params, DILATION_H)
    dilation_w = int_at(code, params, DILATION_W)
    x_row = width * x_col * code.item
    x_frame = int_at(code, params, DILATION_T) * height * x_row

    def tap(row: Int, k: Int, acc: list[Vec]) -> list[Vec]:
        w = code.load(weights, k * code.lanes)
        following = []
        for j, z in enumerate(acc):
            column = k % kw * dilation_w + stride * j
            mask = None
            if shape.masked:
                inside = code.within(code.int(0), left + column, width)
                mask = code.first(code.select(inside, lanes_in, 0))
            following.append(fma(load(row, column * x_col, mask), w, z))
        return following

    def taps_of_row(index: Int, acc: list[Vec]) -> list[Vec]:
        frame, r = index // kh, index % kh
        exists = code.within(code.int(0), top + r * dilation_h, height)
        place = int_at(code, table, frame) if shape.listed else frame * x_frame
        row = x + place + r * dilation_h * x_row

        def taps(k: Int, acc: list[Vec]) -> list[Vec]:
            return tap(row, index * kw + k, acc)

        return code.loop(code.select(exists, kw, 0), taps, acc)

    return code.loop(frames * kh, taps_of_row, acc)


def activated(code: Code, number: Int, acc: list[Vec]) -> list[Vec]:
    """The activation of a number known at run time: through scratch, so that its code is short."""
    scratch = code.scratch(len(acc))

    def apply(_: Int, acc: list[Vec]) -> list[Vec]:
        for a, z in enumerate(acc):
            code.store(z, scratch, a * code.lanes)
        for candidate, name in enumerate(ACTIVATIONS):
            if name == "none":
                continue

            def one(i: Int, _: list[Vec], name: str = name) -> None:
                code.store(activate(code.load(scratch, i), name), scratch, i)

            with code.when(number.is_(candidate)):
                code.loop(len(acc) * code.lanes, one, step=code.lanes)
        return [code.load(scratch, a * code.lanes) for a in range(len(acc))]

    return code.loop(code.select(number.is_(ACTIVATIONS.index("none")), 0, 1), apply, acc)
