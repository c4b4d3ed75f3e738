"""Text of the product of a Winograd convolution, one block of tiles x output channels per program.

Its first axis, if there is one, is transformed on the fly: alpha rows of V become alpha operands,
alpha sums become m rows of M or y (minimal filtering of Lavin and Gray 2016, section 4, with the
element-wise product as matrix products over channels).
"""

from __future__ import annotations

from functools import lru_cache

from ..transforms import Transform
from .emit import indented, transformed

# Float32 as the sum of two TF32 numbers, of which the first is rounded; what the tensor cores cut
# off the second is 2^-23 of the value. NaN survives in the second even where the first wraps.
_SPLIT = (
    "{b}_hi = (({b}.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)",
    "{b}_lo = {b} - {b}_hi",
)


def rounded(name: str) -> str:
    """A float32 block rounded to TF32, which tensor cores would cut off; NaN stays NaN."""
    bits = f"(({name}.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)"
    return f"{name} = tl.where({name} == {name}, {bits}, {name})"


@lru_cache(maxsize=256)
def product_source(t: Transform, direct: bool, precision: str) -> str:
    """The kernel for F(m, r) on the first axis, F(1, 1) for none.

    direct     V is x, M is y, and the epilogue is done
    precision  'half' operands, float32 as 'tf32' or 'ieee', or 'split' in two TF32 numbers
    """
    alpha, rows = t.alpha, range(t.m)
    one_sum = t.m == 1
    sums = ["acc0"] if one_sum else [f"acc{i}" for i in range(alpha)]
    loop = _loads(alpha, precision)
    values = [f"a{i}" for i in range(alpha)]
    if not one_sum and alpha > 1:
        loop += [f"f{i} = a{i}.to(tl.float32)" for i in range(alpha)]
        values = [f"b{i}" for i in range(alpha)]
        loop += transformed(t.input_program, [f"f{i}" for i in range(alpha)], values, "t")
    # Tensor cores cut off what a float32 sum cannot hold, so that long sums drift: where all else
    # is exact, a step is summed by itself and added in float32.
    apart = precision == "split"
    for i, value in enumerate(values):
        total = sums[0 if one_sum else i]
        part = f"p{total}" if apart else total
        begins, ends = i == 0 or not one_sum, i + 1 == alpha or not one_sum
        loop += [f"{part} = tl.zeros((BP, BK), tl.float32)"] if apart and begins else []
        loop += _dots(value, part, i, precision)
        loop += [f"{total} += {part}"] if apart and ends else []
    loop += ["v += v_step", "u += DEPTH"]
    z = [f"z{i}" for i in rows]
    end = ["z0 = acc0"] if one_sum else transformed(t.output_program, sums, z, "e")
    for i in rows:
        end += [
            f"written = inside & (j * {t.m} + {i} < Fo)",
            f"at = (to + {i} * y_next){_ROWS} + (k * y_channel){_COLUMNS}",
        ]
        kept = f"written{_ROWS} & (k < K){_COLUMNS}"
        if direct:
            end += [
                f"store(y_ptr, residual_ptr, at, z{i} + shift, {kept}, ACTIVATION, HAS_RESIDUAL)"
            ]
        else:
            end += [f"tl.store(y_ptr + at, z{i}, mask={kept})"]
    return f"""def winograd_product(
    v_ptr, u_ptr, {"bias_ptr, residual_ptr, " if direct else ""}y_ptr,
    m_start, rows, J, A, B, F, SA, SB, pad_first, pad_a, pad_b, stride_a, stride_b,
    v_image, v_first, v_a, v_b, v_channel, Fo, y_image, y_first, y_a, y_b, y_channel,
    C, K, U_ROWS, U_DEPTH, v_point, m_point, u_part,
    {_EPILOGUE if direct else ""}
    BP: tl.constexpr, BK: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
{indented(_head(t, direct))}
{indented([f"{name} = tl.zeros((BP, BK), tl.float32)" for name in sums])}
    for c0 in range(0, U_DEPTH, DEPTH):
{indented(loop, 2)}
{indented(end)}
"""


_ROWS, _COLUMNS = "[:, None]", "[None, :]"
_EPILOGUE = "HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,"


def _head(t: Transform, direct: bool) -> list[str]:
    lines = [
        "pid = tl.program_id(0)",
        "column_blocks = U_ROWS // BK",
        "row_blocks = (rows + BP - 1) // BP",
        "k = pid % column_blocks * BK + tl.arange(0, BK)",
        "pid = pid // column_blocks",
        "p = pid % row_blocks * BP + tl.arange(0, BP)",
        "point = (pid // row_blocks).to(tl.int64)",
        "inside = p < rows",
        "c = tl.arange(0, DEPTH)",
        # Padding of U is zero, so that neither its rows nor its depth need a mask.
        "u_at = c[:, None] + (k * U_DEPTH)[None, :]",
        f"u = u_ptr + point * {t.alpha} * U_ROWS * U_DEPTH",
        "y_next = y_first",
        "if WIDE:",
        "    p, c, k = p.to(tl.int64), c.to(tl.int64), k.to(tl.int64)",
        "    y_next = tl.cast(y_first, tl.int64)",
        "b = p % B",
        "a = p // B % A",
        "j = p // (B * A) % J",
        "n = p // (B * A * J)",
        f"to = n * y_image + j * {t.m} * y_first + a * y_a + b * y_b",
        "ia, ib = a * stride_a - pad_a, b * stride_b - pad_b",
        f"first = j * {t.m} - pad_first",
        "v_at = (n * v_image + first * v_first + ia * v_a + ib * v_b)[:, None]"
        " + (c * v_channel)[None, :]",
        "read = inside & (ia >= 0) & (ia < SA) & (ib >= 0) & (ib < SB)",
        "v = v_ptr + point * v_point",
        "v_step = tl.cast(v_channel, tl.int64) * DEPTH",
        "next_row = tl.cast(v_first, tl.int64)",
        "u_next = tl.cast(U_ROWS, tl.int64) * U_DEPTH",
    ]
    if direct:
        lines += [
            "shift = 0.0",
            "if HAS_BIAS:",
            "    shift = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]",
        ]
    else:
        lines += [
            "y_ptr = (y_ptr + m_start).to(tl.pointer_type(tl.float32), bitcast=True)",
            "y_ptr += point * m_point",
        ]
    return lines


def _loads(alpha: int, precision: str) -> list[str]:
    lines = []
    for i in range(alpha):
        mask = f"(read & (first + {i} >= 0) & (first + {i} < F))[:, None]"
        lines += [
            "if EVEN:",
            f"    a{i} = tl.load(v + {i} * next_row + v_at, mask={mask}, other=0.0)",
            "else:",
            f"    a{i} = tl.load(v + {i} * next_row + v_at, mask={mask} & (c0 + c < C)[None, :], "
            "other=0.0)",
            f"u{i} = tl.load(u + {i} * u_next + u_at)",
        ]
        if precision == "split":
            lines.append(f"w{i} = tl.load(u + u_part + {i} * u_next + u_at)")
    return lines


def _dots(value: str, total: str, i: int, precision: str) -> list[str]:
    """total += value @ U."""
    if precision == "half":
        return [f"{total} = tl.dot({value}.to(u{i}.dtype), u{i}, {total})"]
    if precision != "split":
        rounding = [rounded(value)] if precision == "tf32" and value[0] == "b" else []
        return [
            *rounding,
            f'{total} = tl.dot({value}, u{i}, {total}, input_precision="{precision}")',
        ]
    # The small products first.
    operands = ((f"{value}_lo", f"u{i}"), (f"{value}_hi", f"w{i}"), (f"{value}_hi", f"u{i}"))
    return [
        *(line.format(b=value) for line in _SPLIT),
        *(f'{total} = tl.dot({a}, {b}, {total}, input_precision="tf32")' for a, b in operands),
    ]
