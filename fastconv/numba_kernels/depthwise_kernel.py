"""The kernel of depthwise tiles: which tile reads what, and where the next one will."""

from __future__ import annotations

import numba

from .depthwise_blocks import (
    BIAS,
    BLOCK,
    CHANNELS,
    CHUNKS,
    DILATION_H,
    DILATION_T,
    DILATION_W,
    FRAMES,
    GROUPS,
    HEIGHT,
    MULTIPLIER,
    OUT_HEIGHT,
    OUT_TIME,
    OUT_WIDTH,
    OUTS,
    PAD_H,
    PAD_T,
    PAD_W,
    PREFETCH,
    RESIDUAL,
    STRIDE_H,
    STRIDE_T,
    STRIDE_W,
    STRIPS,
    TAPS_H,
    TAPS_T,
    TAPS_W,
    TIME,
    VECTOR_CHANNELS,
    VECTOR_PARTS,
    VECTORS,
    WEIGHTS,
    WIDTH,
    X,
    Y,
    tile,
)
from .simd import peek


@numba.njit
def _share(size, index, pieces):
    """The index-th of nearly equal pieces: from, to."""
    return size * index // pieces, size * (index + 1) // pieces


@numba.njit
def _taps_inside(start, taps, dilation, size):
    """Taps from .. to - 1 of one axis are inside for an output whose first tap is at `start`."""
    first = max(0, -(start // dilation))
    return first, max(first, min(taps, -((start - size) // dilation)))


def tile_kernel(DTYPE, ITEM, LANES, ROWS, COLS, KH, KW, SH, SW, SPREAD, LISTED):
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
            frame_at = x + ITEM * channels * width * height * frame
            table = peek(params, FRAMES) + 8 * (taps_t * image + from_tap)
            frames = to_tap - from_tap
            newest = frame + (frames - 1) * dilation_t
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
                            x_at = ITEM * ((top * width + left) * channels + in_channel)
                            if LISTED == 0:
                                x_at += frame_at
                            w_at = (vector * taps_t + from_tap) * taps_h * taps_w
                            w_at = weights + ITEM * LANES * w_at
                            y_at = ITEM * ((out_row * out_width + j) * outs + out_channel)
                            bias_at = bias + ITEM * out_channel if bias != 0 else 0
                            residual_at = residual + y_at if residual != 0 else 0
                            whole = inner and inner_rows and lanes_in >= LANES and SPREAD == 1
                            if rows == ROWS and whole:
                                tile(
                                    DTYPE, ROWS, COLS, KH, KW, SH, SW, 1, 0, LISTED, params, table,
                                    x_at, w_at, frames, bias_at, residual_at, y + y_at, top, left,
                                    LANES, LANES, COLS, next_x, next_y,
                                )  # fmt: skip
                            elif rows == ROWS:
                                tile(
                                    DTYPE, ROWS, COLS, KH, KW, SH, SW, SPREAD, 1, LISTED, params,
                                    table, x_at, w_at, frames, bias_at, residual_at, y + y_at, top,
                                    left, lanes_in, lanes_out, out_width - j, next_x, next_y,
                                )  # fmt: skip
                            else:
                                tile(
                                    DTYPE, 1, COLS, KH, KW, SH, SW, SPREAD, 1, LISTED, params,
                                    table, x_at, w_at, frames, bias_at, residual_at, y + y_at, top,
                                    left, lanes_in, lanes_out, out_width - j, next_x, next_y,
                                )  # fmt: skip
                            if next_x != 0:
                                # The vectors of a tile ask for lines in the order of memory.
                                next_x += ITEM * LANES * COLS * SW
                                next_y += ITEM * LANES * COLS
                h += rows

    return kernel
