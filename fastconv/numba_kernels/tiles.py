"""Building blocks of Winograd convolution: one tile in, one tile out, a register of channels each.

The programs of `transforms` run on registers, so that they are the one source. Three axes: axis 0
is a loop over planes, axes 1 and 2 are transformed in registers, plane by plane; what axis 0 then
transforms rests in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product

from ..transforms import Program, Transform, transform
from .gemm import activated
from .simd import Code, Int, Vec, block


def spec_of(transforms: Sequence[Transform]) -> str:
    """Sizes and points as a compile-time constant, e.g. '1,1; 2,3,0,1,-1; 2,3,0,1,-1'."""
    return "; ".join(",".join(map(str, (t.m, t.r, *t.points))) for t in transforms)


def transforms_of(spec: str) -> list[Transform]:
    """The transforms that `spec_of` was given."""
    found = []
    for part in spec.split("; "):
        m, r, *points = part.split(",")
        found.append(transform(int(m), int(r), [Fraction(p) for p in points]))
    return found


def _nested(outer: Program, inner: Program, grid: list[list[Vec]]) -> list[list[Vec]]:
    """Both matrices applied to a grid of registers, inner along its rows, outer along columns."""
    rows = [inner.apply(row) for row in grid]
    columns = [outer.apply(list(column)) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


@block
def input_tile(
    code: Code, dtype: str, spec: str, ahead: int, x: Int, channels: Int,
    low0: Int, high0: Int, step0: Int, low1: Int, high1: Int, step1: Int,
    low2: Int, high2: Int, step2: Int, v: Int, point_step: Int,
) -> None:  # fmt: skip
    """V = BT d of one tile for all channels.

    x      (A0, A1, A2, channels) by steps, zero outside low <= index < high, where nothing is read
    v      [point * point_step + channel], whole registers, zeros behind the last channel
    ahead  the axis along which the next tile lies, whose data are asked for meanwhile
    """
    t0, t1, t2 = transforms_of(spec)
    a0, a1, a2 = t0.alpha, t1.alpha, t2.alpha
    # Without arithmetic along axis 0 the planes are points already.
    planes = code.scratch(a0 * a1 * a2) if t0.input_program.steps else None
    zeros = code.scratch(1)
    code.store(code.zero(), zeros)
    fresh = [
        range(t.alpha, t.alpha + t.m) if axis == ahead else range(t.alpha)
        for axis, t in enumerate((t0, t1, t2))
    ]

    # Addresses outside are slow even where masks or prefetching make them harmless: none is formed.
    anchor = code.select(low2 > 0, low2, 0)  # the first column inside
    some = code.both(anchor < a2, anchor < high2)
    inside = {i2: code.within(low2, i2, high2) for i2 in sorted({*range(a2), *fresh[2]})}
    column = {i2: code.select(real, i2, anchor) for i2, real in inside.items()}

    def vector(c: Int, _: list[Vec]) -> None:
        masks = [code.first(code.select(inside[i2], channels - c, 0)) for i2 in range(a2)]

        def row(i0: Int, i1: int) -> tuple[Int, Int]:
            """Address and step of a row; zeros if it is outside."""
            real = code.both(code.within(low0, i0, high0), code.within(low1, i1, high1))
            real = code.both(real, some)
            start = x + (i0 * step0 + step1 * i1 + c) * code.item
            return code.select(real, start, zeros), code.select(real, step2, 0)

        def plane(i0: Int, _: list[Vec]) -> None:
            for i1 in fresh[1]:
                start, step = row(i0 + fresh[0].start, i1)
                for i2 in fresh[2]:
                    code.prefetch(start, step * column[i2])
            grid = []
            for i1 in range(a1):
                start, step = row(i0, i1)
                grid.append([code.load(start, step * column[i2], masks[i2]) for i2 in range(a2)])
            grid = _nested(t1.input_program, t2.input_program, grid)
            for (i1, i2), value in _entries(grid):
                point = i0 * (a1 * a2) + (i1 * a2 + i2)
                if planes is None:
                    code.store(value, v, point * point_step + c)
                else:
                    code.store(value, planes, point * code.lanes)

        for point in range(a0 * a1 * a2):
            code.prefetch(v, point_step * point + c, write=True)
        code.loop(a0, plane)
        if planes is not None:
            _along_axis_0(
                code, t0.input_program, a1 * a2,
                lambda point: code.load(planes, point * code.lanes),
                lambda value, point: code.store(value, v, point * point_step + c),
            )  # fmt: skip

    code.loop(channels, vector, step=code.lanes)


def _entries(grid: list[list[Vec]]) -> list[tuple[tuple[int, int], Vec]]:
    return [((i, j), value) for i, row in enumerate(grid) for j, value in enumerate(row)]


def _along_axis_0(
    code: Code, program: Program, plane: int, load: Callable[[Int], Vec],
    store: Callable[[Vec, Int], None],
) -> None:  # fmt: skip
    """The program along axis 0 for each of `plane` positions; points are numbered by planes."""

    def line(i: Int, _: list[Vec]) -> None:
        values = [load(i + f * plane) for f in range(program.inputs)]
        for f, value in enumerate(program.apply(values)):
            store(value, i + f * plane)

    code.loop(plane, line)


@block
def output_tile(
    code: Code, dtype: str, spec: str, epilogue: str, vectors: int, m: Int, point_step: Int,
    y: Int, residual: Int, bias: Int, columns: Int,
    out0: Int, step0: Int, out1: Int, step1: Int, out2: Int, step2: Int,
) -> None:  # fmt: skip
    """y = activation(AT M + bias + residual) of one tile and one panel of output channels.

    m            [point * point_step + column]
    y, residual  (out0, out1, out2, columns) by steps; at most a tile and a panel of it is touched
    bias         readable for the whole panel;  epilogue: as in `gemm_tile`
    """
    t0, t1, t2 = transforms_of(spec)
    a1, a2, m0, m1, m2 = t1.alpha, t2.alpha, t0.m, t1.m, t2.m
    words, lanes = epilogue.split(), code.lanes
    planes = code.scratch(m0 * a1 * a2) if t0.output_program.steps else None
    # A tile or register that is not whole goes through here, and its valid part from and to memory.
    spare, spare_steps = code.scratch(m0 * m1 * m2), [m1 * m2 * lanes, m2 * lanes, lanes]
    steps = [step0, step1, step2]
    whole = code.both(code.both(out0 >= m0, out1 >= m1), out2 >= m2)
    limits = [out0.minimum(m0), out1.minimum(m1), out2.minimum(m2)]

    def vector(c: Int, _: list[Vec]) -> None:
        full, mask = code.both(whole, columns - c >= lanes), code.first(columns - c)
        partial = code.builder.not_(full)
        out = code.select(full, y + c * code.item, spare)
        out_steps = [code.select(full, s, t) for s, t in zip(steps, spare_steps, strict=True)]
        for i0, i1, i2 in product(range(m0), range(m1), range(m2)):
            where = out_steps[0] * i0 + out_steps[1] * i1 + out_steps[2] * i2
            code.prefetch(out, where, write=True)
        shift = code.load(bias, c) if "bias" in words else None
        added = None
        if "residual" in words:
            added = code.select(full, residual + c * code.item, spare)
            with code.when(partial):
                _copy(code, limits, residual + c * code.item, steps, spare, spare_steps, mask)
        if planes is not None:
            _along_axis_0(
                code, t0.output_program, a1 * a2,
                lambda point: code.load(m, point * point_step + c),
                lambda value, point: code.store(value, planes, point * lanes),
            )  # fmt: skip

        def plane(i0: Int, _: list[Vec]) -> None:
            source, step, start = (m, point_step, c) if planes is None else (planes, lanes, 0)
            first = i0 * (a1 * a2)
            grid = [
                [code.load(source, (first + (i1 * a2 + i2)) * step + start) for i2 in range(a2)]
                for i1 in range(a1)
            ]
            grid = _nested(t1.output_program, t2.output_program, grid)
            for (i1, i2), value in _entries(grid):
                where = i0 * out_steps[0] + out_steps[1] * i1 + out_steps[2] * i2
                if shift is not None:
                    value = value + shift
                if added is not None:
                    value = value + code.load(added, where)
                code.store(activated(value, words), out, where)

        code.loop(m0, plane)
        with code.when(partial):
            _copy(code, limits, spare, spare_steps, y + c * code.item, steps, mask)

    code.loop(columns.minimum(vectors * lanes), vector, step=lanes)


def _copy(
    code: Code, limits: Sequence[Int], source: Int, source_steps: Sequence[Int | int],
    target: Int, target_steps: Sequence[Int | int], mask: object,
) -> None:  # fmt: skip
    """target = source, three axes, for indices below the limits and lanes in the mask."""

    def nested(axis: int, at_source: Int, at_target: Int) -> None:
        if axis == 3:
            code.store(code.load(source, at_source, mask), target, at_target, mask)
            return

        def body(i: Int, _: list[Vec]) -> None:
            nested(axis + 1, at_source + i * source_steps[axis], at_target + i * target_steps[axis])

        code.loop(limits[axis], body)

    nested(0, code.int(0), code.int(0))
