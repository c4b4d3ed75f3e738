"""Depthwise tiles: several outputs along H and W of one vector of channels, kept in registers.

Nothing is packed or padded: rows outside the image are skipped, columns and channels outside it are
masked loads, and only tiles at an edge pay for either. With the taps known when compiling, a row of
input is loaded once for all outputs and taps that read it; otherwise loops run over the taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba

from ..epilogue import ACTIVATIONS
from .activations import activate
from .memory import int_at
from .simd import Code, Int, Vec, block, fma, peek

# The parameters of `tile_kernel`, by position.
(
    X, Y, RESIDUAL, BIAS, WEIGHTS, ACTIVATION, TIME, HEIGHT, WIDTH, CHANNELS, OUTS,
    OUT_TIME, OUT_HEIGHT, OUT_WIDTH, TAPS_T, TAPS_H, TAPS_W, STRIDE_T, STRIDE_H, STRIDE_W,
    DILATION_T, DILATION_H, DILATION_W, PAD_T, PAD_H, PAD_W,
    VECTORS, VECTOR_CHANNELS, VECTOR_PARTS, MULTIPLIER, GROUPS, STRIPS, CHUNKS,
    PREFETCH, BLOCK, ZEROS,
) = range(36)  # fmt: skip


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
    spread: int, masked: int, params: Int, x: Int, weights: Int, frames: Int, bias: Int,
    residual: Int, y: Int, top: Int, left: Int, lanes_in: Int, lanes_out: Int, count: Int,
    next_x: Int, next_y: Int,
) -> None:  # fmt: skip
    """y = activation(bias + sum over frames and taps + residual) for rows x cols outputs.

    x: where input row `top`, column `left` of the first frame is, or would be
    bias, residual: 0 for none
    lanes_in, lanes_out: channels that exist from here on; count: columns of outputs that exist
    next_x, next_y: from where on to fetch into the cache for later tiles; 0 for nothing
    """
    shape = Tile(rows, cols, kh, kw, stride_h, stride_w, spread, masked)
    y_row = int_at(code, params, OUT_WIDTH) * int_at(code, params, OUTS)
    y_col = int_at(code, params, OUTS)
    _fetch(code, shape, params, next_x, next_y, y_row)
    lanes = code.select(bias.is_(0), 0, lanes_out)
    start = code.load(code.select(bias.is_(0), weights, bias), 0, code.first(lanes))
    sums = _unrolled if kh else _looped
    acc = sums(code, shape, params, x, weights, frames, top, left, lanes_in, [start] * rows * cols)

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
    code: Code, shape: Tile, params: Int, x: Int, weights: Int, frames: Int, top: Int, left: Int,
    lanes_in: Int, acc: list[Vec],
) -> list[Vec]:  # fmt: skip
    """acc + the sums, every row and column of the input loaded once per frame.

    Only the kw - 1 outermost columns on either side may be outside the image.
    """
    load = _reader(code, shape)
    height, width = int_at(code, params, HEIGHT), int_at(code, params, WIDTH)
    x_col = int_at(code, params, CHANNELS)
    x_row = width * x_col
    x_frame = int_at(code, params, DILATION_T) * height * x_row
    zeros = (int_at(code, params, ZEROS) - x) // code.item
    masks: list = [None] * shape.in_cols
    if shape.masked:
        for q in range(shape.in_cols):
            inner = shape.kw - 1 <= q <= shape.in_cols - shape.kw
            inside = code.within(code.int(0), left + q, width)
            masks[q] = code.first(lanes_in if inner else code.select(inside, lanes_in, 0))

    rows = []
    for r in range(shape.in_rows):
        row, step = x_row * r, x_frame
        if shape.masked:
            exists = code.within(code.int(0), top + r, height)
            row, step = code.select(exists, row, zeros), code.select(exists, step, 0)
        rows.append((row, step))

    def frame(k: Int, acc: list[Vec]) -> list[Vec]:
        taps = shape.kh * shape.kw
        w = [code.load(weights, (k * taps + tap) * code.lanes) for tap in range(taps)]

        acc = list(acc)
        for r in range(shape.in_rows):
            row = rows[r][0] + k * rows[r][1]
            for q in range(shape.in_cols):
                uses = shape.uses(r, q)
                if uses:
                    pixel = load(x, row + x_col * q, masks[q])
                for output, tap in uses:
                    acc[output] = fma(pixel, w[tap], acc[output])
        return acc

    return code.loop(frames, frame, acc)


def _looped(
    code: Code, shape: Tile, params: Int, x: Int, weights: Int, frames: Int, top: Int, left: Int,
    lanes_in: Int, acc: list[Vec],
) -> list[Vec]:  # fmt: skip
    """acc + the sums of one row of outputs, taps, strides and dilations at run time."""
    load = _reader(code, shape)
    height, width = int_at(code, params, HEIGHT), int_at(code, params, WIDTH)
    x_col = int_at(code, params, CHANNELS)
    kh, kw = int_at(code, params, TAPS_H), int_at(code, params, TAPS_W)
    stride, dilation_h = int_at(code, params, STRIDE_W), int_at(code, params, DILATION_H)
    dilation_w = int_at(code, params, DILATION_W)
    frame_rows = int_at(code, params, DILATION_T) * height

    def tap(row: Int, k: Int, acc: list[Vec]) -> list[Vec]:
        w = code.load(weights, k * code.lanes)
        following = []
        for j, z in enumerate(acc):
            column = k % kw * dilation_w + stride * j
            mask = None
            if shape.masked:
                inside = code.within(code.int(0), left + column, width)
                mask = code.first(code.select(inside, lanes_in, 0))
            following.append(fma(load(x, (row * width + column) * x_col, mask), w, z))
        return following

    def taps_of_row(index: Int, acc: list[Vec]) -> list[Vec]:
        frame, r = index // kh, index % kh
        exists = code.within(code.int(0), top + r * dilation_h, height)
        row = frame * frame_rows + r * dilation_h

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


@numba.njit
def _share(size, index, pieces):
    """The index-th of nearly equal pieces: from, to."""
    return size * index // pieces, size * (index + 1) // pieces


@numba.njit
def _taps_inside(start, taps, dilation, size):
    """Taps from .. to - 1 of one axis are inside for an output whose first tap is at `start`."""
    first = max(0, -(start // dilation))
    return first, max(first, min(taps, -((start - size) // dilation)))


def tile_kernel(DTYPE, ITEM, LANES, ROWS, COLS, KH, KW, SH, SW, SPREAD):
    """An item is a strip of output rows through a range of frames, for a group of vectors."""

    def kernel(params, item, thread):
        x, y, residual = peek(params, X), peek(params, Y), peek(params, RESIDUAL)
        bias, weights = peek(params, BIAS), peek(params, WEIGHTS)
        time, height, width = peek(params, TIME), peek(params, HEIGHT), peek(params, WIDTH)
        channels, outs = peek(params, CHANNELS), peek(params, OUTS)
        out_time, out_height = peek(params, OUT_TIME), peek(params, OUT_HEIGHT)
        out_width, per = peek(params, OUT_WIDTH), peek(params, VECTOR_CHANNELS)
        taps_t, taps_h, taps_w = peek(params, TAPS_T), peek(params, TAPS_H), peek(params, TAPS_W)
        stride_h, stride_w = peek(params, STRIDE_H), peek(params, STRIDE_W)
        dilation_t, pad_h = peek(params, DILATION_T), peek(params, PAD_H)
        parts, multiplier = peek(params, VECTOR_PARTS), peek(params, MULTIPLIER)
        block, prefetch = peek(params, BLOCK), peek(params, PREFETCH)
        # Rows and columns of input that a tile reaches; several rows come without dilation.
        reach_h = (ROWS - 1) * SH + (taps_h - 1) * peek(params, DILATION_H) + 1
        reach_w = (COLS - 1) * stride_w + (taps_w - 1) * peek(params, DILATION_W) + 1

        groups, strips, chunks = peek(params, GROUPS), peek(params, STRIPS), peek(params, CHUNKS)
        image = item // (groups * strips * chunks)
        group, strip = item // (strips * chunks) % groups, item // chunks % strips
        first_vector, last_vector = _share(peek(params, VECTORS), group, groups)
        first_row, last_row = _share(out_height, strip, strips)
        first_time, last_time = _share(out_time, item % chunks, chunks)

        for t in range(first_time, last_time):
            start = t * peek(params, STRIDE_T) - peek(params, PAD_T)
            from_tap, to_tap = _taps_inside(start, taps_t, dilation_t, time)
            frame = image * time + start + from_tap * dilation_t
            newest = frame + (to_tap - 1 - from_tap) * dilation_t
            h = first_row
            while h < last_row:
                rows = ROWS if h + ROWS <= last_row else 1
                top = h * stride_h - pad_h
                inner_rows = KH == 0 or (top >= 0 and top + reach_h <= height)
                out_row = (image * out_time + t) * out_height + h
                for begin in range(first_vector, last_vector, block):
                    for column in range(0, out_width, COLS):
                        # Known taps: the last tile overlaps the one before it.
                        j = column if KH == 0 else min(column, out_width - COLS)
                        left = j * stride_w - peek(params, PAD_W)
                        inner = left >= 0 and left + reach_w <= width and j + COLS <= out_width
                        next_x = next_y = 0
                        if prefetch != 0:
                            # The next tile, the rows that this frame has not seen yet.
                            next_frame, next_out, next_j = newest, out_row, j + COLS
                            next_row = top + reach_h - ROWS * stride_h
                            if j + COLS >= out_width:
                                next_out, next_row = out_row + rows, next_row + rows * stride_h
                                next_j = 0
                            if next_j == 0 and h + rows >= last_row:
                                next_out = out_row + out_height - h + first_row
                                next_row = first_row * stride_h - pad_h
                                next_frame = newest + peek(params, STRIDE_T)
                            if next_frame < (image + 1) * time:
                                next_row = max(0, min(next_row, height - ROWS * stride_h))
                                next_x = (next_frame * height + next_row) * width
                                next_x = x + ITEM * channels * (next_x + next_j * stride_w)
                                next_y = y + ITEM * outs * (next_out * out_width + next_j)
                        for vector in range(begin, min(last_vector, begin + block)):
                            in_channel = out_channel = vector * LANES
                            lanes_in = lanes_out = channels - in_channel
                            if SPREAD > 1:
                                in_channel = vector // parts * per
                                out_channel = in_channel * multiplier + vector % parts * LANES
                                lanes_in = min(channels - in_channel, per)
                                lanes_out = lanes_in * multiplier - vector % parts * LANES
                            x_at = ((frame * height + top) * width + left) * channels + in_channel
                            x_at = x + ITEM * x_at
                            w_at = (vector * taps_t + from_tap) * taps_h * taps_w
                            w_at = weights + ITEM * LANES * w_at
                            y_at = ITEM * ((out_row * out_width + j) * outs + out_channel)
                            bias_at = bias + ITEM * out_channel if bias != 0 else 0
                            residual_at = residual + y_at if residual != 0 else 0
                            whole = inner and inner_rows and lanes_in >= LANES and SPREAD == 1
                            if rows == ROWS and whole:
                                tile(
                                    DTYPE, ROWS, COLS, KH, KW, SH, SW, 1, 0, params, x_at, w_at,
                                    to_tap - from_tap, bias_at, residual_at, y + y_at, top, left,
                                    LANES, LANES, COLS, next_x, next_y,
                                )  # fmt: skip
                            elif rows == ROWS:
                                tile(
                                    DTYPE, ROWS, COLS, KH, KW, SH, SW, SPREAD, 1, params, x_at,
                                    w_at, to_tap - from_tap, bias_at, residual_at, y + y_at, top,
                                    left, lanes_in, lanes_out, out_width - j, next_x, next_y,
                                )  # fmt: skip
                            else:
                                tile(
                                    DTYPE, 1, COLS, KH, KW, SH, SW, SPREAD, 1, params, x_at, w_at,
                                    to_tap - from_tap, bias_at, residual_at, y + y_at, top, left,
                                    lanes_in, lanes_out, out_width - j, next_x, next_y,
                                )  # fmt: skip
                            if next_x != 0:
                                # The vectors of a tile ask for lines in the order of memory.
                                next_x += ITEM * LANES * COLS * SW
                                next_y += ITEM * LANES * COLS
                h += rows

    return kernel
