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
    lanes = code.lanes
    width = vectors * lanes
    # An absent operand is a load under an empty mask, from memory that exists.
    bias_columns = code.select(bias.is_(0), 0, columns)
    residual_columns = code.select(residual.is_(0), 0, columns)
    bias_from = code.select(bias.is_(0), sums, bias)
    residual_from = code.select(residual.is_(0), y, residual)
    shifts = [
        code.load(bias_from, j * lanes, code.first(bias_columns - j * lanes))
        for j in range(vectors)
    ]
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
