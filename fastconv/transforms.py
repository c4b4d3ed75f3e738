"""Exact Cook-Toom (Winograd) transforms F(m, r): m outputs of r taps with m + r - 1 products.

Points, matrices and proofs are rational; floating point begins at `Transform.as_arrays`.
Sources: Winograd, "Arithmetic Complexity of Computations", 1980 (interpolation at points and at
infinity); Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016 (AT, G, BT).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from math import ceil, floor, log2, pi, prod, sqrt, tan
from typing import Any

import numpy as np

from .errors import GeometryError
from .programs import Program, Step, apply_along, cost, is_shift, program

__all__ = [
    "Program",
    "Step",
    "Transform",
    "amplification",
    "apply_along",
    "default_points",
    "describe",
    "error_factor",
    "program",
    "transform",
]

Vector = tuple[Fraction, ...]
Matrix = tuple[Vector, ...]

ONE = Fraction(1)


@dataclass(frozen=True)
class Transform:
    """One axis of fast correlation, y = AT [(G g) * (BT d)], exact in rationals.

    points: the alpha - 1 finite points in row order, infinity is the last row; () for m or r = 1
    AT: (m, alpha)   G: (alpha, r)   BT: (alpha, alpha)
    Equivalent to: y[i] = sum(d[i + k] * g[k] for k in range(r)) for i in range(m)
    """

    m: int
    r: int
    points: tuple[Fraction, ...]
    AT: Matrix = field(compare=False, repr=False)
    G: Matrix = field(compare=False, repr=False)
    BT: Matrix = field(compare=False, repr=False)

    @property
    def alpha(self) -> int:
        """Products, and input samples, per m outputs."""
        return self.m + self.r - 1

    def verify(self) -> None:
        """Prove the identity: g[k] d[j] has in y[i] the coefficient 1 where j = i + k, else 0.

        Raises ArithmeticError naming the first wrong coefficient.
        """
        for i in range(self.m):
            for k in range(self.r):
                through = [a * g[k] for a, g in zip(self.AT[i], self.G, strict=True)]
                for j in range(self.alpha):
                    got = sum(t * b[j] for t, b in zip(through, self.BT, strict=True))
                    if got != (j == i + k):
                        raise ArithmeticError(
                            f"F({self.m}, {self.r}): coefficient of g[{k}] d[{j}] in y[{i}] "
                            f"is {got}, must be {int(j == i + k)}"
                        )

    def amplification(self) -> float:
        """Operand-rounding factor of this axis; see the function `amplification`."""
        energy = [_norm2(g) * _norm2(b) for g, b in zip(self.G, self.BT, strict=True)]
        worst = max(sum(a * a * e for a, e in zip(row, energy, strict=True)) for row in self.AT)
        return sqrt(worst / self.r)

    def as_arrays(self, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """AT (m, alpha), G (alpha, r), BT (alpha, alpha) in `dtype`; object keeps the rationals."""
        number = Fraction if np.dtype(dtype) == object else float
        AT, G, BT = (
            np.array([[number(c) for c in row] for row in matrix], dtype)
            for matrix in (self.AT, self.G, self.BT)
        )
        return AT, G, BT

    @cached_property
    def input_program(self) -> Program:
        """BT: alpha samples -> alpha transformed samples."""
        return program(self.BT)

    @cached_property
    def output_program(self) -> Program:
        """AT: alpha products -> m outputs."""
        return program(self.AT)

    @cached_property
    def filter_program(self) -> Program:
        """G: r taps -> alpha transformed taps."""
        return program(self.G)


def amplification(transforms: Iterable[Transform]) -> float:
    """Operand-rounding factor of nested transforms against direct convolution.

    Data and filter are independent with unit variance; every transformed operand U = G g and
    V = BT d is rounded once, as the operands of a direct dot product are. The factor is the root
    mean square error of the worst output of a tile over that of the direct product, per axis

        max_j sqrt( sum_i AT[j, i]^2 |G_i|^2 |BT_i|^2 / r )      (2-norms of rows),

    and over the axes the product, because norms and maxima of Kronecker products are products. It
    does not depend on how rows are scaled; F(m, 1) and F(1, r) have 1.

    For users: with U and V stored in a short format and all else exact or in a longer one, expect
    this many times the error of a direct convolution of operands in that format. When everything
    is computed in one format, `error_factor` bounds the constant that comes on top.
    """
    return prod(t.amplification() for t in transforms)


def error_factor(transforms: Iterable[Transform], channels: int = 1) -> float:
    """Bound on the error, all in one precision, over that of a plain sum in the same precision.

    Both are root mean squares over random data; the plain sum adds n = channels * taps products
    one by one, the transforms run as their programs and the channels are added one by one.

    Derivation, in units of the variance of one rounding. A partial sum of a row of BT or G is no
    larger than the row's result, the data being independent, so V and U have at most as many
    units as the result has `roundings` (one axis after another adds them); the product has one
    more, and a sum of c products s(c) = (c + 1) / 2 - 1 / c, the mean size of its partial sums.
    All of it passes AT, which multiplies the variance by amplification^2. A partial sum of a row
    of AT is at most alpha times (in variance, by Cauchy and Schwarz) what amplification counts.
    The plain sum has 1 + s(n).
    """
    axes = list(transforms)
    n = channels * prod(t.r for t in axes)
    operands = sum(t.input_program.roundings + t.filter_program.roundings for t in axes)
    outputs = sum(t.alpha * t.output_program.roundings for t in axes)
    fast = operands + 1 + _mean_partial_sum(channels) + outputs
    return amplification(axes) * sqrt(fast / (1 + _mean_partial_sum(n)))


def _mean_partial_sum(n: int) -> float:
    return (n + 1) / 2 - 1 / n


# Points by alpha; "+-p" is the pair p, -p. Among 0, pairs of p / q with p, q <= 4, and one point
# without its partner, these have the least amplification for every m <= 8, r <= 7 of that alpha
# (F(5, 2): least but for 0.1 %). One exception: at alpha = 3 the pair +-2/3 would have 1.08 instead
# of 1.41, too little to pay for transforms with multiplications.
POINTS = {
    2: "0",
    3: "0 1",
    4: "0 +-1",
    5: "+-1/3 +-4/3",
    6: "0 +-2/3 +-3/2",
    7: "+-1/3 +-3/4 +-2",
    8: "0 +-1/2 +-1 +-2",
    9: "+-1/4 +-3/4 +-1 +-2",
    10: "0 +-1/2 +-3/4 +-4/3 +-2",
    11: "+-1/4 +-1/2 +-1 +-4/3 +-2",
    12: "0 +-1/3 +-3/4 +-1 +-4/3 +-3",
    13: "+-1/4 +-1/2 +-3/4 +-1 +-3/2 +-4",
    14: "0 +-1/4 +-2/3 +-3/4 +-4/3 +-3/2 +-4",
}


def default_points(m: int, r: int) -> tuple[Fraction, ...]:
    """The finite points F(m, r) uses unless others are given; none for m = 1 or r = 1.

    Beyond the table: simple rationals near tan(pi k / alpha), directions spread evenly over the
    projective line, of which infinity is one.
    """
    _check_size(m, r)
    if m == 1 or r == 1:
        return ()
    alpha = m + r - 1
    if alpha not in POINTS:
        return _spread_points(alpha)
    points: list[Fraction] = []
    for word in POINTS[alpha].split():
        p = Fraction(word.removeprefix("+-"))
        points += [p, -p] if word.startswith("+-") else [p]
    return tuple(points)


def _spread_points(alpha: int) -> tuple[Fraction, ...]:
    points = [Fraction(0)] if alpha % 2 == 0 else []
    slack = pi / alpha / 5  # of the spacing pi / alpha: neighbours cannot meet
    for k in range((alpha + 1) // 2 - 1, 0, -1):
        angle = pi / 2 - pi * k / alpha
        small = min(angle, pi / 2 - angle)  # p and 1 / p alike
        if abs(small - pi / 4) < slack / 2:
            p = Fraction(1)
        else:
            p = _simplest(Fraction(tan(small - slack)), Fraction(tan(small + slack)))
        p = p if small == angle else 1 / p
        points += [p, -p]
    return tuple(points)


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction of smallest denominator between two positive numbers."""
    if ceil(low) <= floor(high):
        return Fraction(ceil(low))
    whole = floor(low)
    return whole + 1 / _simplest(1 / (high - whole), 1 / (low - whole))


def transform(m: int, r: int, points: Iterable[Any] | None = None) -> Transform:
    """Exact F(m, r) on the given finite points (anything Fraction accepts) or the default ones.

    Raises GeometryError for sizes below 1, and for points that are not rational, too few, too many
    or repeated.
    """
    _check_size(m, r)
    if points is None:
        return _transform(int(m), int(r), default_points(m, r))
    given = tuple(points)
    try:
        exact = tuple(Fraction(p) for p in given)
    except (TypeError, ValueError, ArithmeticError):
        raise GeometryError(
            f"transform F({m}, {r}): points must be finite rational numbers, got {list(given)}"
        ) from None
    needed = 0 if m == 1 or r == 1 else m + r - 2
    if len(exact) != needed or len(set(exact)) != needed:
        repeats = f" of which {len(set(exact))} distinct" if len(set(exact)) < len(exact) else ""
        names = ", ".join(map(str, exact)) or "none"
        raise GeometryError(
            f"transform F({m}, {r}): needs {needed} distinct finite points, "
            f"got {len(exact)}{repeats}: {names}"
        )
    return _transform(int(m), int(r), exact)


def _check_size(m: Any, r: Any) -> None:
    for name, value in (("m", m), ("r", r)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise GeometryError(
                f"transform F({m}, {r}): {name} must be an integer of at least 1, got {value!r}"
            )


@lru_cache(maxsize=256)
def _transform(m: int, r: int, points: tuple[Fraction, ...]) -> Transform:
    alpha = m + r - 1
    if m == 1 or r == 1:
        identity = tuple(_unit(i, alpha) for i in range(alpha))
        ones = (Fraction(1),) * alpha
        AT, G = ((ones,), identity) if m == 1 else (identity, tuple((c,) for c in ones))
        return Transform(m, r, points, AT, G, identity)
    # Column of AT, row of G and row of BT at each point. A polynomial has at infinity the value of
    # its leading coefficient.
    powers = [*(tuple(p**j for j in range(m)) for p in points), _unit(m - 1, m)]
    taps = [*(tuple(p**k for k in range(r)) for p in points), _unit(r - 1, r)]
    others = [[q for q in points if q != p] for p in points]
    rows = [*((*_polynomial(qs), Fraction(0)) for qs in others), _polynomial(points)]
    weights = [prod((p - q for q in qs), start=ONE) for p, qs in zip(points, others, strict=True)]
    rows = [_times(ONE if w > 0 else -ONE, b) for w, b in zip([*weights, ONE], rows, strict=True)]
    scaled = _scaled(powers, taps, rows, [*map(abs, weights), ONE])
    columns, G, BT = zip(*scaled, strict=True)
    return Transform(m, r, points, tuple(zip(*columns, strict=True)), G, BT)


def _scaled(
    powers: list[Vector], taps: list[Vector], rows: list[Vector], weights: list[Fraction]
) -> list[tuple[Vector, Vector, Vector]]:
    """Columns of AT and rows of G and BT, the same point by point but for factors that cancel.

    The rows of G are divided by the weights and by the factors of the other two. Where AT and BT
    are integer they stay as they come: the textbook's. Else BT takes of two scalings the one with
    the cheaper program: as it comes, or with an entry +-1 in every row, few entries that cost an
    operation, and norms near 1. Columns of AT are scaled in the latter way, to norms near those
    of the rows of G.
    """
    if all(c.denominator == 1 for v in (*powers, *rows) for c in v):
        a = b = [ONE] * len(rows)
    else:
        b = [_scale(row, 1.0, 3) for row in rows]
        scaled_rows = [_times(f, row) for f, row in zip(b, rows, strict=True)]
        # Beyond the table of points the search for programs takes too long to be done twice.
        if len(rows) in POINTS and cost(program(rows)) <= cost(program(scaled_rows)):
            b = [ONE] * len(rows)
        norms = [sqrt(_norm2(g)) / (w * f) for g, w, f in zip(taps, weights, b, strict=True)]
        means = [sqrt(sqrt(_norm2(p)) * g) for p, g in zip(powers, norms, strict=True)]
        a = [_scale(p, mean, 1) for p, mean in zip(powers, means, strict=True)]
    return [
        (_times(f, p), _times(1 / (f * h * w), g), _times(h, row))
        for f, h, w, p, g, row in zip(a, b, weights, powers, taps, rows, strict=True)
    ]


def _scale(vector: Vector, norm: float, digits: int) -> Fraction:
    """The factor that makes an entry +-1 and leaves the fewest general ones, then powers of two.

    Then it brings the 2-norm nearest to `norm`, where constants that floating point does not hold
    exactly count as so many binary digits of difference.
    """
    own = sqrt(_norm2(vector)) / norm

    def burden(factor: Fraction) -> tuple[int, int, float]:
        entries = [abs(factor * c) for c in vector if c and abs(factor * c) != 1]
        general = sum(not is_shift(c) for c in entries)
        inexact = any(c.denominator & (c.denominator - 1) for c in entries)
        return general, len(entries), round(abs(log2(factor * own)) + digits * inexact, 9)

    return min((1 / abs(c) for c in vector if c), key=burden)


def _unit(i: int, n: int) -> tuple[Fraction, ...]:
    return tuple(Fraction(int(i == j)) for j in range(n))


def _polynomial(roots: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Coefficients of prod(x - root), lowest power first."""
    c = [Fraction(1)]
    for root in roots:
        shifted, same = [Fraction(0), *c], [*c, Fraction(0)]
        c = [high - root * low for high, low in zip(shifted, same, strict=True)]
    return tuple(c)


def _times(factor: Fraction, vector: Vector) -> Vector:
    return tuple(factor * c for c in vector)


def _norm2(row: Iterable[Fraction]) -> Fraction:
    return sum((c * c for c in row), start=Fraction(0))


def describe(t: Transform) -> str:
    """Points, matrices, operation counts and accuracy of a transform as text."""
    a = t.amplification()
    saving = (t.m * t.r - t.alpha) / (t.m * t.r)
    lines = [
        f"F({t.m}, {t.r}): {t.alpha} multiplications (alpha) for {t.m} outputs of {t.r} taps "
        f"instead of {t.m * t.r}, a saving of {saving:.1%}",
        f"points: {', '.join([*map(str, t.points), 'infinity']) if t.points else 'none needed'}",
        f"amplification of rounding errors: {a:.3g} in 1D, {a**2:.3g} in 2D, {a**3:.3g} in 3D",
    ]
    stages = (
        ("BT", "input", t.BT, t.input_program),
        ("G", "filter", t.G, t.filter_program),
        ("AT", "output", t.AT, t.output_program),
    )
    for name, stage, matrix, p in stages:
        widths = [max(len(str(c)) for c in column) for column in zip(*matrix, strict=True)]
        lines += [
            "",
            f"{name}, {stage} transform, {len(matrix)} x {len(matrix[0])}: "
            f"{p.additions} additions, {p.shifts} shifts, {p.multiplications} multiplications",
        ]
        for row in matrix:
            cells = (f"{c!s:>{width}}" for c, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells))
    return "\n".join(lines)
