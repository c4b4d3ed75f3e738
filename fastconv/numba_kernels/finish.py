"""The end of a direct kernel: sums from scratch, through bias, residual and activation, to y."""

from __future__ import annotations

from ..epilogue import ACTIVATIONS, Epilogue
from .activations import activate
from .simd import Code, Int, Vec, block


def activation_number(epilogue: Epilogue) -> int:
    """What `finish_rows` calls an activation at run time."""
    return ACTIVATIONS.index(epilogue.activation)


@block
def finish_rows(
    code: Code,
    dtype: str,
    vectors: int,
    sums: Int,
    rows: Int,
    y: Int,
    y_stride: Int,
    columns: Int,
    bias: Int,
    residual: Int,
    activation: Int,
) -> None:
    """y (rows, columns) = activation(sums (rows, vectors * lanes) + bias + residual).

    bias, residual: addresses, 0 for none; residual has y's row stride
    columns: valid ones; nothing else of y, bias and residual is touched
    activation: `activation_number`; all of them are in the kernel, so that none needs its own
    """
    write_rows(code, vectors, sums, rows, y, y_stride, columns, bias, residual, activation)


def bias_vectors(code: Code, vectors: int, bias: Int, columns: Int, memory: Int) -> list[Vec]:
    """The bias of a panel, zero behind `columns` and where its address is 0."""
    # An absent operand is a load under an empty mask, from memory that exists.
    count = code.select(bias.is_(0), 0, columns)
    start = code.select(bias.is_(0), memory, bias)
    masks = [code.first(count - j * code.lanes) for j in range(vectors)]
    return [code.load(start, j * code.lanes, mask) for j, mask in enumerate(masks)]


def write_rows(
    code: Code, vectors: int, sums: Int, rows: Int, y: Int, y_stride: Int, columns: Int,
    bias: Int, residual: Int, activation: Int,
) -> None:  # fmt: skip
    """`finish_rows` inside another building block."""
    lanes = code.lanes
    width = vectors * lanes
    shifts = bias_vectors(code, vectors, bias, columns, sums)
    residual_columns = code.select(residual.is_(0), 0, columns)
    residual_from = code.select(residual.is_(0), y, residual)
    masks = [code.first(columns - j * lanes) for j in range(vectors)]
    added = [code.first(residual_columns - j * lanes) for j in range(vectors)]

    for number, name in enumerate(ACTIVATIONS):

        def row(i: Int, _: list[Vec], name: str = name) -> None:
            for j in range(vectors):
                at = i * y_stride + j * lanes
                z = code.load(sums, i * width + j * lanes) + shifts[j]
                z = z + code.load(residual_from, at, added[j])
                code.store(activate(z, name) if name != "none" else z, y, at, masks[j])

        with code.when(activation.is_(number)):
            code.loop(rows, row)
