"""The activations of an Epilogue on vectors, with an exponential of our own.

No calls and no overflow; NaN stays NaN.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from llvmlite import ir

from .emit import Vec, fma


class _Format(NamedTuple):
    """What the exponential needs to know of an element type."""

    bits: int
    mantissa: int  # explicit bits
    bias: int
    floor: float  # exp rounds to zero below
    degree: int  # of the Taylor polynomial on [-ln 2 / 2, ln 2 / 2]
    high_bits: int  # significant bits of the high part of ln 2: n * high is exact


# The first term left out: 0.347**8 / 8! = 5e-9 and 0.347**14 / 14! = 4e-18; half an ulp of 1 is
# 6e-8 and 1.1e-16.
_FORMATS = {
    "float": _Format(32, 23, 127, -104.0, 7, 15),
    "double": _Format(64, 52, 1023, -746.0, 13, 41),
}


def activate(z: Vec, name: str) -> Vec:
    """activation(z), elementwise: none, relu, silu, hardswish, sigmoid as in `Epilogue`."""
    if name == "relu":
        return z.constant(0).where(z < 0, z)  # a NaN is not below zero, so it stays
    if name == "hardswish":
        ramp = z + 3
        ramp = z.constant(0).where(ramp < 0, ramp)
        ramp = z.constant(6).where(ramp > 6, ramp)
        return z * ramp / 6
    if name == "sigmoid":
        return _sigmoid(z)
    if name == "silu":
        return z * _sigmoid(z)
    return z


def _sigmoid(z: Vec) -> Vec:
    """1 / (1 + exp(-z)) with negative arguments of exp only: (1 or e) / (1 + e), e = exp(-|z|)."""
    negative = z < 0
    e = exp_of_negative(z.where(negative, -z))
    return e.where(negative, 1) / (e + 1)


def exp_of_negative(x: Vec) -> Vec:
    """exp(x) for x <= 0 (-Inf and NaN included), within 2 ulp.

    x = n ln 2 + r and exp(x) = 2^n exp(r), with ln 2 in two parts (Cody and Waite 1980) and a
    Taylor polynomial for exp(r).
    """
    form = _FORMATS[str(x.type.element)]
    b, integers = x.builder, ir.VectorType(ir.IntType(form.bits), x.type.count)

    def splat(value: int):
        return ir.Constant(integers, [value] * x.type.count)

    x = x.constant(form.floor).where(x < form.floor, x)
    # Adding 1.5 * 2^mantissa leaves n, rounded to nearest, in the lowest bits: no conversion to
    # an integer, whose result NaN would make undefined.
    shift = 1.5 * 2.0**form.mantissa
    shifted = fma(x, x.constant(1 / math.log(2)), x.constant(shift))
    n = shifted - shift
    high, low = _ln2(form.high_bits)
    r = fma(n, x.constant(-low), fma(n, x.constant(-high), x))
    power = x.constant(Fraction(1, math.factorial(form.degree)))
    for k in range(form.degree - 1, -1, -1):
        power = fma(power, r, x.constant(Fraction(1, math.factorial(k))))
    # 2^n as two factors: results below the normal range come out right, rounded once.
    n_bits = b.sub(b.bitcast(shifted.value, integers), b.bitcast(x.constant(shift).value, integers))
    half = b.ashr(n_bits, splat(1))
    for part in (half, b.sub(n_bits, half)):
        exponent = b.shl(b.add(part, splat(form.bias)), splat(form.mantissa))
        power = power * x.like(b.bitcast(exponent, x.type))
    return power


# ln 2 = 2 artanh(1/3) = 2 (1/3 + 1/(3 * 3^3) + 1/(5 * 3^5) + ...), to 200 bits.
_LN2 = sum(Fraction(2, (2 * k + 1) * 3 ** (2 * k + 1)) for k in range(64))


def _ln2(high_bits: int) -> tuple[Fraction, Fraction]:
    """ln 2 as a part of a few significant bits, and the rest."""
    high = Fraction(round(_LN2 * 2**high_bits), 2**high_bits)
    return high, _LN2 - high
