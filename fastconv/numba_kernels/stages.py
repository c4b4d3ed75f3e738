"""Building blocks of the fully separable block: rows of pixels between its three stages."""

from __future__ import annotations

from collections.abc import Callable

from ..epilogue import ACTIVATIONS
from .activations import activate
from .memory import int_at
from .simd import Code, Int, Vec, block
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
