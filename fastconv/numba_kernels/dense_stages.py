"""The implicit matrix product of `dense`: the table of addresses, and a tile of y under it."""

from __future__ import annotations

from numba import njit

from ..epilogue import ACTIVATIONS
from .finish import bias_vectors, write_rows
from .memory import clear, int_at, poke
from .runs import Runs
from .simd import Code, Int, Vec, block, fma, peek


@block
def dense_tile(
    code: Code, dtype: str, rows: int, vectors: int, width: int,
    table: Int, table_stride: Int, taps: Int, run_taps: Int, shift: Int, depth: Int,
    run_depth: Int, panel: Int, ahead: Int, ahead_step: Int, sums: Int,
    count: Int, y: Int, y_stride: Int, columns: Int, bias: Int, residual: Int, activation: Int,
) -> None:  # fmt: skip
    """y (count, columns) = activation(inputs under the table @ panel + bias + residual).

    table (taps, table_stride) int64: addresses of inputs, `rows` valid per tap
    shift: elements from there to the group's first channel;  depth: channels per group
    run_taps, run_depth: of a run, see `runs`; run_taps is 1 where run_depth is less than depth
    panel (taps * depth, width), of which the first `vectors` are used
    ahead, ahead_step: memory to ask for meanwhile, elements from channel to channel
    sums (rows, vectors * lanes): scratch
    The rest as in `finish_rows`; at most `rows` are written.
    """
    lanes = code.lanes
    for i in range(rows):
        for j in range(vectors):
            code.prefetch(y, i * y_stride + j * lanes, write=True)
    first = bias_vectors(code, vectors, bias, columns, panel)
    places = [(sums, n * lanes) for n in range(rows * vectors)]
    several = code.builder.or_(run_taps < taps, run_depth < depth)
    runs = Runs(code, places, several)
    totals = _product(
        code, rows, first, width, table, table_stride, taps, run_taps, shift, depth, run_depth,
        panel, ahead, ahead_step, runs,
    )  # fmt: skip

    # No activation and relu end in registers: a lower bound, -Inf or 0, that NaN passes.
    simple = code.both(count >= rows, activation <= ACTIVATIONS.index("relu"))
    with code.builder.if_else(simple) as (yes, no):
        with yes:
            relu = activation.is_(ACTIVATIONS.index("relu"))
            bound = code.zero().like(
                code.builder.select(relu, code.zero().value, code.splat(float("-inf")).value)
            )
            masks = [code.first(columns - j * lanes) for j in range(vectors)]

            def end(add: bool) -> None:
                for n, z in enumerate(totals):
                    i, j = divmod(n, vectors)
                    at = y_stride * i + j * lanes
                    if add:
                        z = z + code.load(residual, at, masks[j])
                    code.store(bound.where(z < bound, z), y, at, masks[j])

            with code.builder.if_else(residual.is_(0)) as (alone, added):
                with alone:
                    end(add=False)
                with added:
                    end(add=True)
        with no:
            for n, total in enumerate(totals):
                code.store(total, sums, n * lanes)
            none = code.int(0)
            write_rows(code, vectors, sums, count, y, y_stride, columns, none, residual, activation)


def _product(
    code: Code, rows: int, first: list[Vec], width: int, table: Int, table_stride: Int, taps: Int,
    run_taps: Int, shift: Int, depth: Int, run_depth: Int, panel: Int, ahead: Int, ahead_step: Int,
    runs: Runs,
) -> list[Vec]:  # fmt: skip
    """`first` in every row, plus the sums over taps and channels, row by row."""
    vectors = len(first)

    def some_taps(first_tap: Int, sums: list[Vec]) -> list[Vec]:
        def run(first_channel: Int, sums: list[Vec]) -> list[Vec]:
            def tap(n: Int, sums: list[Vec]) -> list[Vec]:
                t = first_tap + n
                entries = table + t * table_stride * 8
                moved = (shift + first_channel) * code.item
                inputs = [int_at(code, entries, i) + moved for i in range(rows)]
                under = panel + (t * depth + first_channel) * (width * code.item)

                def channel(c: Int, sums: list[Vec]) -> list[Vec]:
                    code.prefetch(ahead, (first_channel + c) * ahead_step)
                    w = [code.load(under, c * width + j * code.lanes) for j in range(vectors)]
                    following = []
                    for i in range(rows):
                        x = code.broadcast(inputs[i], c)
                        following += [fma(x, w[j], sums[i * vectors + j]) for j in range(vectors)]
                    return following

                return code.loop((depth - first_channel).minimum(run_depth), channel, sums)

            is_first = code.both(first_tap.is_(0), first_channel.is_(0))
            count = (taps - first_tap).minimum(run_taps)
            return code.loop(count, tap, runs.start(is_first, sums))

        return code.loop(depth, run, sums, step=run_depth)

    return runs.total(code.loop(taps, some_taps, first * rows, step=run_taps))


# What `dense._prepared` puts where: addresses of the call, then what is known before it.
(
    X, Y, BIAS, RESIDUAL, SCRATCH, PANELS, ACTIVATION, THREAD_STEP, TABLE, SUMS,
    T, H, W, C, PIXELS, OT, OH, OW, K, DEPTH, GROUP, KT, KH, KW, ST, SH, SW,
    PAD_T, PAD_H, PAD_W, DT, DH, DW, SIZE, BLOCKS, SHARE, PANELS_PER_GROUP, PANEL_COUNT,
    AHEAD_STEP, RUN_TAPS, RUN_DEPTH,
) = range(41)  # fmt: skip


@njit(error_model="numpy")
def _fill_table(params, table, zeros, first, last, item):
    """table (taps, SIZE): where each tap of the output pixels first .. last - 1 begins."""
    t, h, w = peek(params, T), peek(params, H), peek(params, W)
    ot, oh, ow = peek(params, OT), peek(params, OH), peek(params, OW)
    step, pixel = peek(params, SW), peek(params, C) * item
    p = first
    while p < last:
        # A run: the pixels of this block in one row of the output.
        row, start = p // ow, p % ow
        stop = min(start + last - p, ow)
        image, out_t, out_h = row // (ot * oh), row // oh % ot, row % oh
        entry = table + (p - first - start) * 8
        for i in range(peek(params, KT)):
            in_t = out_t * peek(params, ST) - peek(params, PAD_T) + i * peek(params, DT)
            for j in range(peek(params, KH)):
                in_h = out_h * peek(params, SH) - peek(params, PAD_H) + j * peek(params, DH)
                inside = 0 <= in_t < t and 0 <= in_h < h
                for q in range(peek(params, KW)):
                    in_w = q * peek(params, DW) - peek(params, PAD_W)
                    low, high = start, start
                    if inside:
                        # Outputs o whose column in_w + o * step lies in 0 .. w - 1.
                        low = min(max((step - 1 - in_w) // step, start), stop)
                        high = max(min((w - 1 - in_w) // step + 1, stop), low)
                    source = peek(params, X) + (((image * t + in_t) * h + in_h) * w + in_w) * pixel
                    for o in range(start, low):
                        poke(entry, o, zeros)
                    for o in range(low, high):
                        poke(entry, o, source + o * step * pixel)
                    for o in range(high, stop):
                        poke(entry, o, zeros)
                    entry += peek(params, SIZE) * 8
        p += stop - start


def dense_kernel(DTYPE, ITEM, ROWS, VECTORS, SHORT, WIDTH):
    """One item is a block of output pixels times a share of the panels."""

    def kernel(params, item, thread):
        zeros = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        table, sums = zeros + peek(params, TABLE), zeros + peek(params, SUMS)
        size, blocks, share = peek(params, SIZE), peek(params, BLOCKS), peek(params, SHARE)
        taps = peek(params, KT) * peek(params, KH) * peek(params, KW)
        depth, k, group = peek(params, DEPTH), peek(params, K), peek(params, GROUP)
        run_taps, run_depth = peek(params, RUN_TAPS), peek(params, RUN_DEPTH)
        x, bias, residual = peek(params, X), peek(params, BIAS), peek(params, RESIDUAL)

        clear(DTYPE, zeros, peek(params, C))
        first = item % blocks * size
        last = min(first + size, peek(params, PIXELS))
        _fill_table(params, table, zeros, first, last, ITEM)
        for i in range(taps):  # the register block reaches beyond the last pixel
            for o in range(last - first, min(last - first + ROWS, size)):
                poke(table, i * size + o, zeros)

        first_panel = item // blocks * share
        for n in range(first_panel, min(first_panel + share, peek(params, PANEL_COUNT))):
            g = n // peek(params, PANELS_PER_GROUP)
            column = n % peek(params, PANELS_PER_GROUP) * WIDTH
            channel = g * group + column
            columns = min(group - column, WIDTH)
            short = columns <= SHORT * (WIDTH // VECTORS)  # a vector less than a panel has
            for p in range(0, last - first, ROWS):
                at = ((first + p) * k + channel) * ITEM
                source, entries = g * depth, table + p * 8
                weights = peek(params, PANELS) + n * taps * depth * WIDTH * ITEM
                ahead = x + ((first + p + ROWS) * peek(params, C) + source) * ITEM
                y = peek(params, Y) + at
                shift, added = bias + channel * ITEM * (bias != 0), residual + at * (residual != 0)
                if SHORT and short:
                    dense_tile(
                        DTYPE, ROWS, SHORT, WIDTH, entries, size, taps, run_taps, source, depth,
                        run_depth, weights, ahead, peek(params, AHEAD_STEP), sums,
                        last - first - p, y, k, columns, shift, added, peek(params, ACTIVATION),
                    )  # fmt: skip
                else:
                    dense_tile(
                        DTYPE, ROWS, VECTORS, WIDTH, entries, size, taps, run_taps, source, depth,
                        run_depth, weights, ahead, peek(params, AHEAD_STEP), sums,
                        last - first - p, y, k, columns, shift, added, peek(params, ACTIVATION),
                    )  # fmt: skip

    return kernel
