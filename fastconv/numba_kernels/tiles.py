"""Building blocks of Winograd convolution: one tile in, one tile out, a register of channels at a time.

Programs of `transforms` are run on registers, so that these are their one source.
"""

from __future__ import annotations

from fractions import Fraction

from ..transforms import Program, Transform, transform
from .gemm import activated
from .simd import Code, Int, Vec, block


def spec_of(transforms: tuple[Transform, ...]) -> str:
    """Sizes and points as a compile-time constant, e.g. '1,1; 2,3,0,1,-1; 4,3,0,2/3,-2/3,3/2,-3/2'."""
    return "; ".join(",".join(map(str, (t.m, t.r, *t.points))) for t in transforms)


def _transforms_of(spec: str) -> list[Transform]:
    found = []
    for part in spec.split("; "):
        m, r, *points = part.split(",")
        found.append(transform(int(m), int(r), [Fraction(p) for p in points]))
    return found


def _run(program: Program, values: list[Vec]) -> list[Vec]:
    return program.apply(values)


@block
def input_tile(
    code: Code, dtype: str, spec: str, x: Int, channels: Int,
    low0: Int, high0: Int, step0: Int, low1: Int, high1: Int, step1: Int,
    low2: Int, high2: Int, step2: Int, v: Int, point_step: Int,
) -> None:  # fmt: skip
    """V = BT d of one tile: x (A0, A1, A2, channels) by steps, zero outside low <= index < high.

    v: [point * point_step + channel], whole registers are written, zeros behind the last channel.
    Nothing outside the bounds is read.
    """
    t0, t1, t2 = _transforms_of(spec)
    a0, a1, a2 = t0.alpha, t1.alpha, t2.alpha
    direct = not t0.input_program.steps  # planes are points already
    planes = None if direct else code.scratch(a0 * a1 * a2)
    zeros = code.scratch(1)
    code.store(code.zero(), zeros)

    def vector(c: Int, _: list[Vec]) -> None:
        masks = [code.first(code.select(code.within(low2, j, high2), channels - c, 0)) for j in range(a2)]

        def plane(i0: Int, _: list[Vec]) -> None:
            rows = []
            inside = code.within(low0, i0, high0)
            for i1 in range(a1):
                real = code.both(inside, code.within(low1, i1, high1))
                start = code.select(real, x + (i0 * step0 + step1 * i1 + c) * code.item, zeros)
                step = code.select(real, step2, 0)
                values = [code.load(start, step * j, masks[j]) for j in range(a2)]
                rows.append(_run(t2.input_program, values))
            for j in range(a2):
                column = _run(t1.input_program, [row[j] for row in rows])
                for i1, value in enumerate(column):
                    point = i0 * (a1 * a2) + (i1 * a2 + j)
                    if planes is None:
                        code.store(value, v, point * point_step + c)
                    else:
                        code.store(value, planes, point * code.lanes)

        def line(i: Int, _: list[Vec]) -> None:
            values = [code.load(planes, (i + f * a1 * a2) * code.lanes) for f in range(a0)]
            for f, value in enumerate(_run(t0.input_program, values)):
                code.store(value, v, (i + f * a1 * a2) * point_step + c)

        code.loop(code.int(a0), plane)
        if planes is not None:
            code.loop(code.int(a1 * a2), line)

    code.loop(channels, vector, step=code.lanes)


@block
def output_tile(
    code: Code, dtype: str, spec: str, epilogue: str, vectors: int, m: Int, point_step: Int,
    y: Int, residual: Int, bias: Int, columns: Int,
    out0: Int, step0: Int, out1: Int, step1: Int, out2: Int, step2: Int,
) -> None:  # fmt: skip
    """y = activation(AT M + bias + residual) of one tile and one panel of output channels.

    m: [point * point_step + column];  y, residual: (out0, out1, out2, columns) by steps, of which at
    most the tile and the panel are touched;  epilogue: as in `gemm_tile`
    """
    t0, t1, t2 = _transforms_of(spec)
    a0, a1, a2 = t0.alpha, t1.alpha, t2.alpha
    m0, m1, m2 = t0.m, t1.m, t2.m
    words, lanes = epilogue.split(), code.lanes
    direct = not t0.output_program.steps  # points are planes already
    planes = None if direct else code.scratch(m0 * a1 * a2)
    spare = code.scratch(m0 * m1 * m2)
    whole = code.both(code.both(out0 >= m0, out1 >= m1), out2 >= m2)
    limits = [out0.minimum(m0), out1.minimum(m1), out2.minimum(m2)]
    steps = [step0, step1, step2]
    spare_steps = [m1 * m2 * lanes, m2 * lanes, lanes]

    def vector(c: Int, _: list[Vec]) -> None:
        def line(i: Int, _: list[Vec]) -> None:
            values = [code.load(m, (i + f * a1 * a2) * point_step + c) for f in range(a0)]
            for f, value in enumerate(_run(t0.output_program, values)):
                code.store(value, planes, (i + f * a1 * a2) * lanes)

        if planes is not None:
            code.loop(code.int(a1 * a2), line)
        full = code.both(whole, columns - c >= lanes)
        mask = code.first(columns - c)
        out = code.select(full, y + c * code.item, spare)
        out_steps = [code.select(full, s, t) for s, t in zip(steps, spare_steps, strict=True)]
        shift = code.load(bias, c) if "bias" in words else None
        added = None
        if "residual" in words:
            added = code.select(full, residual + c * code.item, spare)
            with code.when(code.builder.not_(full)):
                _copy(code, limits, residual + c * code.item, steps, spare, spare_steps, mask)

        def plane(f: Int, _: list[Vec]) -> None:
            rows = []
            for i1 in range(a1):
                points = [f * (a1 * a2) + (i1 * a2 + j) for j in range(a2)]
                if planes is None:
                    values = [code.load(m, p * point_step + c) for p in points]
                else:
                    values = [code.load(planes, p * lanes) for p in points]
                rows.append(_run(t2.output_program, values))
            columns_ = [_run(t1.output_program, [row[j] for row in rows]) for j in range(m2)]
            for i1 in range(m1):
                for j in range(m2):
                    where = f * out_steps[0] + out_steps[1] * i1 + out_steps[2] * j
                    value = columns_[j][i1]
                    if shift is not None:
                        value = value + shift
                    if added is not None:
                        value = value + code.load(added, where)
                    code.store(activated(value, words), out, where)

        code.loop(code.int(m0), plane)
        with code.when(code.builder.not_(full)):
            _copy(code, limits, spare, spare_steps, y + c * code.item, steps, mask)

    code.loop(columns.minimum(vectors * lanes), vector, step=lanes)


def _copy(code, limits, source, source_steps, target, target_steps, mask) -> None:
    """target = source for indices below the limits and lanes in the mask."""

    def nested(axis: int, source_offset: Int, target_offset: Int) -> None:
        if axis == 3:
            code.store(code.load(source, source_offset, mask), target, target_offset, mask)
            return

        def body(i: Int, _: list[Vec]) -> None:
            nested(axis + 1, source_offset + i * source_steps[axis], target_offset + i * target_steps[axis])

        code.loop(limits[axis], body)

    nested(0, code.int(0), code.int(0))
