"""The stages of a strip: frames into the ring, sums of shifted pixels, and the way to y.

`strips` says how a strip lies in the ring and decides the sizes.
"""

from __future__ import annotations

from numba import njit

from ..epilogue import ACTIVATIONS
from .activations import activate
from .emit import LINE_BYTES
from .finish import finish_rows
from .layout import transpose_tile
from .memory import clear, int_at, poke
from .runs import Runs
from .simd import Code, Int, Vec, block, call, fma, peek


@block
def pixels_product(
    code: Code,
    dtype: str,
    channels: int,
    vectors: int,
    table: Int,
    taps: Int,
    run_taps: Int,
    depth: Int,
    source: Int,
    source_stride: Int,
    weights: Int,
    bias: Int,
    sums: Int,
    sums_stride: Int,
) -> None:
    """sums (channels, vectors * lanes) = bias + sum over taps and depth of weights times pixels.

    table (taps, 2) int64: offset into a channel of source, offset into the weights
    source (depth, source_stride);  bias (channels,)
    weights (depth, channels) at each tap's offset
    run_taps: of a run, see `runs`
    """
    places = [
        (sums, k * sums_stride + j * code.lanes) for k in range(channels) for j in range(vectors)
    ]
    runs = Runs(code, places, run_taps < taps)

    def tap(t: Int, totals: list[Vec]) -> list[Vec]:
        pixels = source + int_at(code, table, 2 * t) * code.item
        factors = weights + int_at(code, table, 2 * t + 1) * code.item

        def channel(c: Int, totals: list[Vec]) -> list[Vec]:
            start = c * source_stride
            x = [code.load(pixels, start + j * code.lanes) for j in range(vectors)]
            following = []
            for k in range(channels):
                w = code.broadcast(factors, c * channels + k)
                following += [fma(w, x[j], totals[k * vectors + j]) for j in range(vectors)]
            return following

        return code.loop(depth, channel, totals)

    def run(start: Int, totals: list[Vec]) -> list[Vec]:
        some = (taps - start).minimum(run_taps)
        totals = runs.start(start.is_(0), totals)
        return code.loop(some, lambda n, totals: tap(start + n, totals), totals)

    first = [code.broadcast(bias, k) for k in range(channels) for _ in range(vectors)]
    totals = runs.total(code.loop(taps, run, first, step=run_taps))
    for total, place in zip(totals, places, strict=True):
        code.store(total, *place)


@block
def activate_row(code: Code, dtype: str, row: Int, count: Int, activation: Int) -> None:
    """row (count,) = activation(row), whole vectors."""
    for number, name in enumerate(ACTIVATIONS):
        if name != "none":

            def vector(i: Int, _: list[Vec], name: str = name) -> None:
                code.store(activate(code.load(row, i), name), row, i)

            with code.when(activation.is_(number)):
                code.loop(count, vector, step=code.lanes)


@block
def expect_pixels(
    code: Code, dtype: str, write: int, start: Int, first: Int, last: Int, step: Int, share: Int
) -> None:
    """Ask for the lines of `share` elements at start + i * step, first <= i < last, into L2."""

    def pixel(i: Int, _: list[Vec]) -> None:
        at = (first + i) * step

        def line(n: Int, _: list[Vec]) -> None:
            code.prefetch(start, at + n, write=bool(write), level=2)

        code.loop(share, line, step=LINE_BYTES // code.item)
        code.prefetch(start, at + share - 1, write=bool(write), level=2)

    code.loop(last - first, pixel)


# What `strips._prepared` puts where: addresses of the call, then what is known before it.
(
    X, Y, RESIDUAL, SCRATCH, BIAS, WEIGHTS, ACTIVATION, THREAD_STEP, SUMS, TILE, TABLE,
    T, H, W, C, OT, OH, OW, K, ST, SH, SW, PAD_T, PAD_H, PAD_W, KT, DT, GROUPS,
    SOME, HIGH, WIDE, LENGTH, FRAME, SLOTS, STRIDE, SUMS_STRIDE, ROW_PHASES, COLUMN_PHASES,
    RESIDUES, OFFSETS, AREA, SPAN_H, RUN_TAPS, PACK, MULTIPLY, UNPACK,
) = range(46)  # fmt: skip


@njit(error_model="numpy")
def _strip(params, item):
    """Image, first group and their number, first output row and number, first column and number."""
    across = -(-peek(params, OW) // peek(params, WIDE))
    down = -(-peek(params, OH) // peek(params, HIGH))
    chunks = -(-peek(params, GROUPS) // peek(params, SOME))
    column = item % across * peek(params, WIDE)
    row = item // across % down * peek(params, HIGH)
    group = item // (across * down) % chunks * peek(params, SOME)
    return (
        item // (across * down * chunks),
        group,
        min(peek(params, SOME), peek(params, GROUPS) - group),
        row,
        min(peek(params, HIGH), peek(params, OH) - row),
        column,
        min(peek(params, WIDE), peek(params, OW) - column),
    )


def pack_kernel(DTYPE, ITEM, LANES):
    """Transpose a frame's rows of a strip into the ring: item = (strip, frame)."""

    def kernel(params, item, thread):
        t, h, w, c = peek(params, T), peek(params, H), peek(params, W), peek(params, C)
        image, first_group, some, first_row, rows, first_column, _ = _strip(params, item // t)
        depth, frame, length = c // peek(params, GROUPS), peek(params, FRAME), peek(params, LENGTH)
        stride, step = peek(params, STRIDE), peek(params, SW)
        row_phases, column_phases = peek(params, ROW_PHASES), peek(params, COLUMN_PHASES)
        packed_rows = frame // (row_phases * column_phases * length)
        channels = some * depth
        slot = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        slot += item % t % peek(params, SLOTS) * frame * ITEM
        for phase in range(row_phases * column_phases):
            top = first_row * peek(params, SH) - peek(params, PAD_H)
            top += peek(peek(params, RESIDUES), phase // column_phases)
            start = first_column * step - peek(params, PAD_W)
            start += peek(peek(params, RESIDUES), row_phases + phase % column_phases)
            left, right = (
                max((step - 1 - start) // step, 0),
                min((w - 1 - start) // step + 1, length),
            )
            for r in range(packed_rows - peek(params, HIGH) + rows):
                row = top + r * peek(params, SH)
                if row < 0 or row >= h:
                    continue
                source = (((image * t + item % t) * h + row) * w + start) * c + first_group * depth
                target = (phase * packed_rows + r) * length
                for n in range(0, channels, LANES):
                    q = left
                    while q < right:
                        if right - left >= LANES:
                            q = min(q, right - LANES)  # some pixels again, rather than fewer
                        transpose_tile(
                            DTYPE, peek(params, X) + (source + q * step * c + n) * ITEM, step * c,
                            slot + (target + n * stride + q) * ITEM, stride,
                            right - q, channels - n,
                        )  # fmt: skip
                        q += LANES

    return kernel


def multiply_kernel(DTYPE, ITEM, LANES, CHANNELS, VECTORS):
    """The sums of a strip at one output time: item = (strip, time)."""

    def kernel(params, item, thread):
        t, h, w, c = peek(params, T), peek(params, H), peek(params, W), peek(params, C)
        ot, oh, ow, k = peek(params, OT), peek(params, OH), peek(params, OW), peek(params, K)
        image, first_group, some, row, rows, _, columns = _strip(params, item // ot)
        depth, outputs = c // peek(params, GROUPS), k // peek(params, GROUPS)
        blocks, area, kt = -(-outputs // CHANNELS), peek(params, AREA), peek(params, KT)
        channels = some * depth
        stride, sums_stride = peek(params, STRIDE), peek(params, SUMS_STRIDE)
        ring = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        sums, table = ring + peek(params, SUMS), ring + peek(params, TABLE)
        taps = 0
        for i in range(kt):
            at = item % ot * peek(params, ST) - peek(params, PAD_T) + i * peek(params, DT)
            if 0 <= at < t:
                for s in range(area):
                    slot = at % peek(params, SLOTS) * peek(params, FRAME)
                    poke(table, 2 * taps, slot + peek(peek(params, OFFSETS), s))
                    poke(table, 2 * taps + 1, (i * area + s) * depth * CHANNELS)
                    taps += 1
        pixels = (rows - 1) * peek(params, LENGTH) + columns

        # Between the sums: lines of this output, and of the next frame that will be packed.
        y = (((image * ot + item % ot) * oh + row) * ow) * k + first_group * outputs
        frame = (item % ot + 1) * peek(params, ST) - peek(params, PAD_T)
        frame += (kt - 1) * peek(params, DT)
        top = row * peek(params, SH) - peek(params, PAD_H)
        bottom = min(top + (rows - 1) * peek(params, SH) + peek(params, SPAN_H), h)
        top = max(top, 0)
        x = ((image * t + frame) * h + top) * w * c + first_group * depth
        leaving = rows * ow
        arriving = max(bottom - top, 0) * w if frame < t else 0
        step, steps = 0, some * blocks * -(-pixels // (VECTORS * LANES))
        for g in range(some):
            for n in range(blocks):
                under = (first_group + g) * blocks + n
                for p in range(0, pixels, VECTORS * LANES):
                    expect_pixels(
                        DTYPE, 1, peek(params, Y) + y * ITEM,
                        step * leaving // steps, (step + 1) * leaving // steps, k, some * outputs,
                    )  # fmt: skip
                    expect_pixels(
                        DTYPE, 0, peek(params, X) + x * ITEM,
                        step * arriving // steps, (step + 1) * arriving // steps, c, channels,
                    )  # fmt: skip
                    step += 1
                    pixels_product(
                        DTYPE, CHANNELS, VECTORS, table, taps, peek(params, RUN_TAPS), depth,
                        ring + (g * depth * stride + p) * ITEM, stride,
                        peek(params, WEIGHTS) + under * kt * area * depth * CHANNELS * ITEM,
                        peek(params, BIAS) + under * CHANNELS * ITEM,
                        sums + ((g * outputs + n * CHANNELS) * sums_stride + p) * ITEM,
                        sums_stride,
                    )  # fmt: skip

    return kernel


def unpack_kernel(DTYPE, ITEM, LANES):
    """Activation and residual, and the way to y: item = (strip, time)."""

    def kernel(params, item, thread):
        ot, k, residual = peek(params, OT), peek(params, K), peek(params, RESIDUAL)
        image, group, some, row, rows, column, columns = _strip(params, item // ot)
        outputs = k // peek(params, GROUPS)
        sums_stride, length = peek(params, SUMS_STRIDE), peek(params, LENGTH)
        ring = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        sums, tile = ring + peek(params, SUMS), ring + peek(params, TILE)
        if residual == 0 and peek(params, ACTIVATION) != 0:
            for n in range(some * outputs):
                row_of_sums = sums + n * sums_stride * ITEM
                count = (rows - 1) * length + columns
                activate_row(DTYPE, row_of_sums, count, peek(params, ACTIVATION))
        for r in range(rows):
            at = (image * ot + item % ot) * peek(params, OH) + row + r
            target = (at * peek(params, OW) + column) * k + group * outputs
            for n in range(0, some * outputs, LANES):
                left, q = some * outputs - n, 0
                while q < columns:
                    if residual == 0 and columns >= LANES:
                        q = min(q, columns - LANES)
                    source = sums + (n * sums_stride + r * length + q) * ITEM
                    to = (target + q * k + n) * ITEM
                    y = peek(params, Y) + to
                    if residual == 0:
                        transpose_tile(DTYPE, source, sums_stride, y, k, left, columns - q)
                    else:
                        transpose_tile(DTYPE, source, sums_stride, tile, LANES, LANES, LANES)
                        finish_rows(
                            DTYPE, 1, tile, min(LANES, columns - q), y, k, min(left, LANES),
                            0, residual + to, peek(params, ACTIVATION),
                        )  # fmt: skip
                    q += LANES

    return kernel


def strips_kernel(DTYPE, ITEM):
    """One item is a strip of output rows of some groups, all of T."""

    def kernel(params, item, thread):
        t, ot = peek(params, T), peek(params, OT)
        some = _strip(params, item)[2]
        ring = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        channels = some * (peek(params, C) // peek(params, GROUPS))
        # Padding stays zero: for one strip it is the same rows and columns in every frame.
        clear(DTYPE, ring, channels * peek(params, STRIDE))
        following = 0
        for o in range(ot):
            first = o * peek(params, ST) - peek(params, PAD_T)
            following = max(following, first)
            while following <= min(first + (peek(params, KT) - 1) * peek(params, DT), t - 1):
                call(peek(params, PACK), params, item * t + following, thread)
                following += 1
            call(peek(params, MULTIPLY), params, item * ot + o, thread)
            call(peek(params, UNPACK), params, item * ot + o, thread)

    return kernel
