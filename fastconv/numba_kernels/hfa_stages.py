"""The stages of the fully separable block: rows of pixels between three convolutions."""

from __future__ import annotations

from collections.abc import Callable

from ..epilogue import ACTIVATIONS
from .activations import activate
from .finish import finish_rows
from .gemm import gemm_rows
from .memory import clear, int_at, poke
from .simd import Code, Int, Vec, block, peek
from .tiles import transforms_of

COLUMNS = 7  # outputs of a direct depthwise tile: their sums and the weights of 3 x 3 taps fit


def _with_activation(code: Code, number: Int, body: Callable[[str], None]) -> None:
    """body(name) for the activation that `number` names at run time."""
    for i, name in enumerate(ACTIVATIONS):
        with code.when(number.is_(i)):
            body(name)


@block
def frames_in(
    code: Code, dtype: str, spec: str, table: Int, count: Int, v: Int, point_step: Int
) -> None:
    """V = BT d along time, element by element of a span of pixels.

    table (alpha, 2) int64: where the span begins in each frame, and 1, or a vector of zeros and 0
    count: elements of the span; nothing beyond is read, whole vectors are written
    v [point * point_step + element]
    """
    (t,) = transforms_of(spec)
    starts = [(int_at(code, table, 2 * i), int_at(code, table, 2 * i + 1)) for i in range(t.alpha)]

    def points(i: Int, mask=None) -> None:
        values = [code.load(start, i * step, mask) for start, step in starts]
        for p, value in enumerate(t.input_program.apply(values)):
            code.store(value, v, point_step * p + i)

    whole = count // code.lanes * code.lanes
    code.loop(whole, lambda i, _: points(i), step=code.lanes)
    with code.when(whole < count):
        points(whole, code.first(count - whole))


@block
def frames_out(
    code: Code, dtype: str, spec: str, vectors: int, m: Int, point_step: Int, pixels: Int,
    y: Int, frame_step: Int, pixel_step: Int, bias: Int, activation: Int,
) -> None:  # fmt: skip
    """y = activation(AT M + bias) along time for one panel of channels.

    m [point * point_step + (pixel, column)], y [frame * frame_step + pixel * pixel_step + column]
    """
    (t,) = transforms_of(spec)
    width = vectors * code.lanes

    def body(name: str) -> None:
        shifts = [code.load(bias, j * code.lanes) for j in range(vectors)]

        def pixel(i: Int, _: list[Vec]) -> None:
            for j in range(vectors):
                column = j * code.lanes
                values = [code.load(m, point_step * p + i * width + column) for p in range(t.alpha)]
                for f, value in enumerate(t.output_program.apply(values)):
                    where = frame_step * f + i * pixel_step + column
                    code.store(activate(value + shifts[j], name), y, where)

        code.loop(pixels, pixel)

    _with_activation(code, activation, body)


@block
def depthwise_rows(
    code: Code, dtype: str, spec: str, table: Int, channels: Int, x_step: Int, weights: Int,
    bias: Int, activation: Int, y: Int, y_row: Int, y_step: Int, rows: Int, columns: Int,
) -> None:  # fmt: skip
    """y = activation(depthwise x + bias) for the rows of one tile, F(m, r) in height and width.

    table (alpha,) int64: addresses of input rows (columns of tiles, x_step)
    weights (alpha * alpha, channels) U of both axes;  channels: whole vectors
    y [row * y_row + column * y_step + channel]: at most `rows` and `columns` are written
    """
    high, wide = transforms_of(spec)
    inputs = [int_at(code, table, i) for i in range(high.alpha)]
    direct = high.m == wide.m == 1
    tile = _direct if direct else _fast
    step = COLUMNS if direct else wide.m

    def body(name: str) -> None:
        def vector(c: Int, _: list[Vec]) -> None:
            u = [code.load(weights, channels * p + c) for p in range(high.alpha * wide.alpha)]
            shift = code.load(bias, c)

            def one(column: Int, _: list[Vec]) -> None:
                def x(i: int, j: int) -> Vec:
                    return code.load(inputs[i], (column + j) * x_step + c)

                for i, row in enumerate(tile(x, u, high, wide)):
                    for j, value in enumerate(row):
                        with code.when(code.both(rows > i, columns > column + j)):
                            where = y_row * i + (column + j) * y_step + c
                            code.store(activate(value + shift, name), y, where)

            code.loop(columns, one, step=step)

        code.loop(channels, vector, step=code.lanes)

    _with_activation(code, activation, body)


def _direct(x: Callable, u: list[Vec], high, wide) -> list[list[Vec]]:
    """COLUMNS sums of one row, every input loaded once."""
    sums: list[Vec] = [None] * COLUMNS  # type: ignore[list-item]  # set by their first product
    for i in range(high.r):
        for j in range(COLUMNS + wide.r - 1):
            value = x(i, j)
            for k in range(wide.r):
                o = j - k
                if 0 <= o < COLUMNS:
                    product = value * u[i * wide.r + k]
                    sums[o] = product if sums[o] is None else sums[o] + product
    return [sums]


def _fast(x: Callable, u: list[Vec], high, wide) -> list[list[Vec]]:
    """m x m outputs: BT along both axes, the products, AT along both."""
    rows = [
        wide.input_program.apply([x(i, j) for j in range(wide.alpha)]) for i in range(high.alpha)
    ]
    columns = [high.input_program.apply([row[j] for row in rows]) for j in range(wide.alpha)]
    products = [
        high.output_program.apply([v * u[i * wide.alpha + j] for i, v in enumerate(column)])
        for j, column in enumerate(columns)
    ]
    return [wide.output_program.apply([column[i] for column in products]) for i in range(high.m)]


# What `hfa._prepared` puts where: addresses of the call, then what is known before it.
(
    X, Y, RESIDUAL, UT, UD, UP, SCRATCH, BIAS_T, BIAS_D, BIAS_P, ACT_T, ACT_D, ACT_P,
    ZERO_ROW, V, M, DEPTHWISE, SUMS, TABLES, THREAD_STEP, V_POINT, M_POINT,
    T, H, W, C, OT, OH, OW, K, MIDDLE, COLUMNS_T, COLUMNS_D, PANELS_T, PANELS_P,
    PAD_T, PAD_H, PAD_W, ROWS, STRIPS, RING_ROWS, ROW_COLUMNS,
) = range(42)  # fmt: skip


def hfa_kernel(
    DTYPE, ITEM, TIME, SPACE, M_TIME, ALPHA_TIME, M_HIGH, ALPHA_HIGH, TAPS_HIGH,
    ROWS_T, VECTORS_T, WIDTH_T, ROWS_P, VECTORS_P, WIDTH_P,
):  # fmt: skip
    """One item is a strip of output rows of a tile of output frames."""

    def kernel(params, item, thread):
        t, h, w, c = peek(params, T), peek(params, H), peek(params, W), peek(params, C)
        ot, oh, ow, k = peek(params, OT), peek(params, OH), peek(params, OW), peek(params, K)
        middle, step = peek(params, MIDDLE), peek(params, COLUMNS_T)
        channels, most = peek(params, COLUMNS_D), peek(params, ROWS)
        slots, row = peek(params, RING_ROWS), peek(params, ROW_COLUMNS) * step
        ring = peek(params, SCRATCH) + thread * peek(params, THREAD_STEP)
        zero_row, v, m = (
            ring + peek(params, ZERO_ROW),
            ring + peek(params, V),
            ring + peek(params, M),
        )
        rows_out, sums = ring + peek(params, DEPTHWISE), ring + peek(params, SUMS)
        frames, inputs = ring + peek(params, TABLES), ring + peek(params, TABLES) + ALPHA_TIME * 16
        v_point, m_point = peek(params, V_POINT), peek(params, M_POINT)
        pad_h, pad_w = peek(params, PAD_H), peek(params, PAD_W)
        residual = peek(params, RESIDUAL)

        strips = peek(params, STRIPS)
        each = -(-oh // strips)
        tiles = -(-ot // M_TIME)
        first, last = item % strips * each, min(item % strips * each + each, oh)
        tile = item // strips % tiles * M_TIME
        image = item // (strips * tiles)

        clear(DTYPE, ring, M_TIME * slots * row)
        clear(DTYPE, zero_row, row)
        done = max(first - pad_h, 0)  # rows of the temporal stage in the ring
        for top in range(first, last, most):
            rows = min(most, last - top)
            needed = -(-rows // M_HIGH) * M_HIGH + TAPS_HIGH - 1
            needed = min(top - pad_h + needed, h)
            while done < needed:
                count = min(most, needed - done)
                for f in range(ALPHA_TIME):
                    at = tile - peek(params, PAD_T) + f
                    inside = 0 <= at < t
                    source = peek(params, X) + (((image * t + at) * h + done) * w * c) * ITEM
                    poke(frames, 2 * f, source if inside else zero_row)
                    poke(frames, 2 * f + 1, 1 if inside else 0)
                frames_in(DTYPE, TIME, frames, count * w * c, v, v_point)
                for p in range(peek(params, PANELS_T)):
                    for f in range(ALPHA_TIME):
                        u = (f * peek(params, PANELS_T) + p) * c * WIDTH_T
                        gemm_rows(
                            DTYPE, ROWS_T, VECTORS_T, "", count * w, v + f * v_point * ITEM, c,
                            peek(params, UT) + u * ITEM, c, m + f * m_point * ITEM,
                            WIDTH_T, WIDTH_T, 0, 0, 0,
                        )  # fmt: skip
                    for r in range(count):
                        at = (done + r) % slots * row + pad_w * step + p * WIDTH_T
                        frames_out(
                            DTYPE, TIME, VECTORS_T, m + r * w * WIDTH_T * ITEM, m_point, w,
                            ring + at * ITEM, slots * row, step,
                            peek(params, BIAS_T) + p * WIDTH_T * ITEM, peek(params, ACT_T),
                        )  # fmt: skip
                done += count
            for f in range(min(M_TIME, ot - tile)):
                for r in range(0, rows, M_HIGH):
                    for i in range(ALPHA_HIGH):
                        at = top + r - pad_h + i
                        source = ring + ((f * slots + at % slots) * row) * ITEM
                        poke(inputs, i, source if 0 <= at < h else zero_row)
                    depthwise_rows(
                        DTYPE, SPACE, inputs, channels, step, peek(params, UD),
                        peek(params, BIAS_D), peek(params, ACT_D),
                        rows_out + r * ow * channels * ITEM, ow * channels, channels, rows - r, ow,
                    )  # fmt: skip
                pixel = ((image * ot + tile + f) * oh + top) * ow
                for p in range(peek(params, PANELS_P)):
                    gemm_rows(
                        DTYPE, ROWS_P, VECTORS_P, "", rows * ow, rows_out, channels,
                        peek(params, UP) + p * middle * WIDTH_P * ITEM, middle, sums,
                        WIDTH_P, WIDTH_P, 0, 0, 0,
                    )  # fmt: skip
                    at = (pixel * k + p * WIDTH_P) * ITEM
                    finish_rows(
                        DTYPE, VECTORS_P, sums, rows * ow, peek(params, Y) + at, k,
                        min(k - p * WIDTH_P, WIDTH_P), peek(params, BIAS_P) + p * WIDTH_P * ITEM,
                        residual + at * (residual != 0), peek(params, ACT_P),
                    )  # fmt: skip

    return kernel
