"""Text of the Winograd kernels: transforms as straight lines, nested over the axes."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import prod

from ..transforms import Transform
from .emit import constant, indented, transformed
from .winograd_product import rounded

_ROWS = """
    pid = tl.program_id(0)
    channel_blocks = (CHANNELS + CB - 1) // CB
    channel = pid % channel_blocks * CB + tl.arange(0, CB)
    pid = pid // channel_blocks
"""
_DECODED = """
    inside = p < rows
    if WIDE:
        p, channel = p.to(tl.int64), channel.to(tl.int64)
    d2 = p % D2
    d1 = p // D2 % D1 + first_row
    d0 = p // (D2 * D1) % D0
    n = p // (D2 * D1 * D0) + first_image
"""


@lru_cache(maxsize=256)
def input_source(
    transforms: tuple[Transform, ...],
    strides: tuple[int, ...],
    phases: tuple[int, ...],
    fused: bool,
    last: bool,
    tf32: bool,
    outer: int,
) -> str:
    """V = BT x over the second and third axis, at one point `outer` of the first.

    transforms, strides, phases  per axis in the order of the loops
    fused   the first axis is left to the product: its rows are pixels, not tiles
    last    channels lie in the lanes, else tiles
    tf32    V is rounded for a product that takes it as it is
    """
    lead, channels = _sides(last)
    body: list[str] = []
    for i in range(3):
        phase = f" + phase // {prod(phases[i + 1 :])} % {phases[i]}" if phases[i] > 1 else ""
        elements = 1 if fused and i == 0 else transforms[i].alpha
        for e in range(elements):
            if fused and i == 0:
                body.append(f"i{i} = d{i}")
            else:
                m, s = transforms[i].m, strides[i]
                body.append(f"i{i} = (d{i} * {m} + {e}) * {s}{phase} - pad{i}")
            body.append(f"k{i}_{e} = (i{i} >= 0) & (i{i} < size{i})")
            body.append(f"o{i}_{e} = i{i} * x{i}")
    row = [Fraction(1)] if fused else list(transforms[0].BT[outer])
    taken = [(e, c) for e, c in enumerate(row) if c]
    h, w = transforms[1], transforms[2]
    for e1 in range(h.alpha):
        for e2 in range(w.alpha):
            terms = []
            for e0, c in taken:
                name = f"x{e0}_{e1}_{e2}"
                at = f"(base + o0_{e0} + o1_{e1} + o2_{e2}){lead}"
                mask = f"(inside & k0_{e0} & k1_{e1} & k2_{e2}){lead} & known"
                body.append(
                    f"{name} = tl.load(x_ptr + ({at} + step), mask={mask}, other=0.0)"
                    ".to(tl.float32)"
                )
                terms.append(name if c == 1 else f"{name} * {constant(c)}")
            body.append(f"a_{e1}_{e2} = {' + '.join(terms)}")
        names = [f"a_{e1}_{e2}" for e2 in range(w.alpha)]
        body += transformed(
            w.input_program, names, [f"b_{e1}_{i}" for i in range(w.alpha)], f"s{e1}_"
        )
    for i in range(w.alpha):
        names = [f"b_{e1}_{i}" for e1 in range(h.alpha)]
        values = [f"v_{j}_{i}" for j in range(h.alpha)]
        body += transformed(h.input_program, names, values, f"r{i}_")
        for j, value in enumerate(values):
            point = (outer * h.alpha + j) * w.alpha + i
            body += [rounded(value)] if tf32 else []
            body.append(
                f"tl.store(v_ptr + {point} * v_step + at, "
                f"{value}.to(v_ptr.dtype.element_ty), mask=kept)"
            )
    return f"""def winograd_input(
    x_ptr, v_ptr, rows, D0, D1, D2, first_image, first_row,
    size0, size1, size2, pad0, pad1, pad2, CHANNELS, C, x_image, x0, x1, x2, x_channel,
    v_point, v_row,
    R: tl.constexpr, CB: tl.constexpr, WIDE: tl.constexpr,
):{_ROWS}
    phase = pid % {prod(phases)}
    pid = pid // {prod(phases)}
    p = pid * R + tl.arange(0, R){_DECODED}
    base = n * x_image
    step = (channel * x_channel){channels}
    known = (channel < C){channels}
    kept = inside{lead} & (channel < CHANNELS){channels}
    at = (p * v_row){lead} + (phase * CHANNELS + channel){channels}
    v_step = tl.cast(v_point, tl.int64)
{indented(body)}
"""


@lru_cache(maxsize=256)
def output_source(transforms: tuple[Transform, ...], fused: bool, last: bool, outer: int) -> str:
    """y = AT M over the second and third axis, for output `outer` of a tile of the first.

    As `input_source`; with the epilogue.
    """
    lead, channels = _sides(last)
    h, w = transforms[1], transforms[2]
    row = [Fraction(1)] if fused else list(transforms[0].AT[outer])
    taken = [(e, c) for e, c in enumerate(row) if c]
    body: list[str] = []
    for e1 in range(h.alpha):
        for e2 in range(w.alpha):
            terms = []
            for e0, c in taken:
                point = (e0 * h.alpha + e1) * w.alpha + e2
                name = f"x{e0}_{e1}_{e2}"
                body.append(
                    f"{name} = tl.load(m_ptr + {point} * m_step + at, mask=kept, other=0.0)"
                )
                terms.append(name if c == 1 else f"{name} * {constant(c)}")
            body.append(f"a_{e1}_{e2} = {' + '.join(terms)}")
        names = [f"a_{e1}_{e2}" for e2 in range(w.alpha)]
        body += transformed(w.output_program, names, [f"b_{e1}_{i}" for i in range(w.m)], f"s{e1}_")
    for i in range(w.m):
        names = [f"b_{e1}_{i}" for e1 in range(h.alpha)]
        body += transformed(h.output_program, names, [f"z_{j}_{i}" for j in range(h.m)], f"r{i}_")
    # Neighbours along the last axis lie side by side in a contiguous y: joined, they are stored
    # by neighbouring lanes.
    joined = not last and w.m in (2, 4)
    if joined:
        body += [f"q = pid * (R * {w.m}) + tl.arange(0, R * {w.m})", f"p = q // {w.m}"]
        body += _DECODED.strip().split("\n    ")
    body.append(f"o0 = d0 * {1 if fused else transforms[0].m} + {outer}")
    for j in range(h.m):
        z = [f"z_{j}_{i}" for i in range(w.m)]
        if joined:
            pairs = [
                f"tl.join({a}, {b})" for a, b in zip(z[: w.m // 2], z[w.m // 2 :], strict=True)
            ]
            whole = pairs[0] if w.m == 2 else f"tl.join({pairs[0]}, {pairs[1]})"
            z = [f"tl.reshape({whole}, (CB, R * {w.m}))"]
        for i, value in enumerate(z):
            body += [
                f"o1, o2 = d1 * {h.m} + {j}, d2 * {w.m} + {f'q % {w.m}' if joined else i}",
                "written = inside & (o0 < out0) & (o1 < out1) & (o2 < out2)",
                f"to = (n * y_image + o0 * y0 + o1 * y1 + o2 * y2){lead} + step",
                f"store(y_ptr, residual_ptr, to, {value} + shift, written{lead} & known, "
                "ACTIVATION, HAS_RESIDUAL)",
            ]
    return f"""def winograd_output(
    m_ptr, bias_ptr, residual_ptr, y_ptr, m_start, rows, D0, D1, D2, first_image, first_row,
    out0, out1, out2, CHANNELS, K, y_image, y0, y1, y2, y_channel, m_point, m_row,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    R: tl.constexpr, CB: tl.constexpr, WIDE: tl.constexpr,
):{_ROWS}
    p = pid * R + tl.arange(0, R){_DECODED}
    m_ptr = (m_ptr + m_start).to(tl.pointer_type(tl.float32), bitcast=True)
    step = (channel * y_channel){channels}
    known = (channel < K){channels}
    kept = inside{lead} & (channel < CHANNELS){channels}
    at = (p * m_row){lead} + channel{channels}
    m_step = tl.cast(m_point, tl.int64)
    shift = 0.0
    if HAS_BIAS:
        shift = tl.load(bias_ptr + channel, mask=channel < K, other=0.0).to(tl.float32){channels}
{indented(body)}
"""


def _sides(last: bool) -> tuple[str, str]:
    """Subscripts that make rows and channels the sides of a block, lanes along its last."""
    return ("[:, None]", "[None, :]") if last else ("[None, :]", "[:, None]")
