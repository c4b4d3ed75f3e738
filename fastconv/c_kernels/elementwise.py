"""What stands between the convolutions of a network (csrc/elementwise.h), on channels-last arrays,
and the columns that a stream keeps there (csrc/play.h).

Each function makes the C structure of one step, for the instruction set of now; `lib.fc_run_*` run
it on addresses. No family and no plan: there is one way to do it.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ..epilogue import ACTIVATIONS
from ..geometry import Geometry
from . import launch
from .launch import ffi, lib

__all__ = ["REDUCTIONS", "blend", "lib", "means", "means_size", "pool", "ring", "turn", "window"]

REDUCTIONS = ("mean", "sum", "max")  # in the order of csrc/elementwise.h


def _common(**fields: Any) -> dict[str, Any]:
    return {"isa": launch.instruction_sets()[launch.isa()], **fields}


def blend(
    shape: tuple[int, ...], activation: str = "none", *, per_image: bool = False, y_step: int = 0
) -> Any:
    """y = activation(x * scale + shift + residual) of x with this shape (N, C, *size).

    per_image  scale is (N, C), else (C,)
    y_step     floats from one pixel of y to the next; 0 for C
    """
    fields = _common(
        activation=ACTIVATIONS.index(activation),
        per_image=per_image,
        images=shape[0],
        points=prod(shape[2:]),
        channels=shape[1],
        y_step=y_step or shape[1],
    )
    return ffi.new("fc_blend *", fields)


def means(shape: tuple[int, ...]) -> Any:
    """(N, C) means of x (N, C, *size) over its points."""
    fields = _common(images=shape[0], points=prod(shape[2:]), channels=shape[1])
    return ffi.new("fc_means *", fields)


def means_size(params: Any) -> int:
    """Floats of workspace of `means`."""
    return int(lib.fc_means_size(params))


def pool(geometry: Geometry, *, mean: bool = False, counted: bool = False) -> Any:
    """Largest value or mean of windows; the geometry is that of a depthwise convolution.

    counted  zeros of the padding count in a mean
    """
    return ffi.new(
        "fc_pool *", _common(geometry=launch.c_geometry(geometry), mean=mean, counted=counted)
    )


def turn(images: int, rows: int, columns: int) -> Any:
    """Matrices (rows, columns) transposed: contiguous to channels last with C rows, or back."""
    return ffi.new("fc_turn *", _common(images=images, rows=rows, columns=columns))


def window(shape: tuple[int, ...], taps: int, reduce: str, dilation: int = 1) -> Any:
    """Columns x of this shape (N, C, *size), over the newest and `taps - 1` before it."""
    fields = _common(
        reduce=REDUCTIONS.index(reduce),
        streams=shape[0],
        floats=prod(shape[1:]),
        taps=taps,
        dilation=dilation,
        ring=dilation * (taps - 1),
    )
    return ffi.new("fc_window *", fields)


def ring(shape: tuple[int, ...], entries: int, *, streams_first: bool = False) -> Any:
    """A ring of columns of this shape (N, C, *size): (entries, N, ...), or (N, entries, ...)."""
    floats = prod(shape[1:])
    fields = {
        "streams": shape[0],
        "ring": entries,
        "floats": floats,
        "stream_stride": entries * floats if streams_first else floats,
        "entry_stride": floats if streams_first else shape[0] * floats,
    }
    return ffi.new("fc_ring *", fields)
