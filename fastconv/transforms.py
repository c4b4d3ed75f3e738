"""Exact Cook-Toom (Winograd) transforms F(m, r): m outputs of an r-tap correlation with m + r - 1 multiplications.

Points, matrices and proofs are rational numbers; floating point begins at `Transform.as_arrays`.
Sources: Toom (1963), Cook (1966); Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2016 (letters AT, G, BT).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from math import gcd, lcm, log2, prod, sqrt
from typing import Any

import numpy as np

from .errors import GeometryError
from .programs import Program, Step, apply_along, is_shift, program

__all__ = [
    "Program",
    "Step",
    "Transform",
    "amplification",
    "apply_along",
    "default_points",
    "describe",
    "program",
    "transform",
]

Matrix = tuple[tuple[Fraction, ...], ...]


@dataclass(frozen=True)
class Transform:
    """One axis of fast correlation, y = AT [(G g) * (BT d)], exact in rationals.

    points: the alpha - 1 finite interpolation points in row order; infinity is the last row. Empty for m = 1 or r = 1.
    AT: (m, alpha)   G: (alpha, r)   BT: (alpha, alpha)
    Equivalent to: y[i] = sum(d[i + k] * g[k] for k in range(r)), i < m
    """

    m: int
    r: int
    points: tuple[Fraction, ...]
    AT: Matrix = field(compare=False, repr=False)
    G: Matrix = field(compare=False, repr=False)
    BT: Matrix = field(compare=False, repr=False)

    @property
    def alpha(self) -> int:
        """Multiplications, and input samples, per m outputs."""
        return self.m + self.r - 1

    def verify(self) -> None:
        """Prove the identity: the coefficient of g[k] d[j] in y[i] is 1 where j = i + k and 0 elsewhere.

        Raises ArithmeticError naming the first wrong coefficient.
        """
        for i in range(self.m):
            for k in range(self.r):
                for j in range(self.alpha):
                    got = sum(self.AT[i][t] * self.G[t][k] * self.BT[t][j] for t in range(self.alpha))
                    if got != (j == i + k):
                        raise ArithmeticError(
                            f"F({self.m}, {self.r}): coefficient of g[{k}] d[{j}] in y[{i}] is {got}, must be {int(j == i + k)}"
                        )

    def amplification(self) -> float:
        """Operand-rounding factor of this axis against direct correlation; see the function `amplification`."""
        energy = [sum(c * c for c in g) * sum(c * c for c in b) for g, b in zip(self.G, self.BT, strict=True)]
        return sqrt(max(sum(a * a * e for a, e in zip(row, energy, strict=True)) for row in self.AT) / self.r)

    def as_arrays(self, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """AT (m, alpha), G (alpha, r), BT (alpha, alpha) rounded once to `dtype`; object keeps the rationals."""
        if np.dtype(dtype) == object:
            return tuple(np.array(matrix, dtype=object) for matrix in (self.AT, self.G, self.BT))  # type: ignore[return-value]
        return tuple(  # type: ignore[return-value]
            np.array([[float(c) for c in row] for row in matrix], dtype=dtype) for matrix in (self.AT, self.G, self.BT)
        )

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
    """Operand-rounding factor of nested transforms against direct convolution: the product over the axes.

    Data and filter independent with unit variance, every transformed operand U = G g and V = BT d rounded once with the same
    relative error: the root mean square error of the worst output of a tile, divided by that of a direct dot product whose
    operands are rounded the same way,

        max_j sqrt( sum_i AT[j, i]^2 |G_i|^2 |BT_i|^2 / r )      with row 2-norms |.|.

    It does not depend on how the rows are scaled, and is 1 for F(m, 1) and F(1, r). Axes nest by Kronecker products, of which
    norms and maxima are products.
    """
    return prod(t.amplification() for t in transforms)


# Interpolation points by (m, r); "+-p" is the pair p, -p.
DEFAULT_POINTS = {
    (2, 3): "0 +-1",
    (4, 3): "0 +-2/3 +-3/2",
    (6, 3): "0 +-1/2 +-1 +-2",
}

# Beyond the table: a prefix of this sequence.
EXTENSION = "0 +-1 +-1/2 +-2 +-1/4 +-4 +-3/4 +-4/3 +-1/3 +-3 +-2/3 +-3/2"


def _parse_points(text: str) -> tuple[Fraction, ...]:
    points: list[Fraction] = []
    for word in text.split():
        p = Fraction(word.removeprefix("+-"))
        points += [p, -p] if word.startswith("+-") else [p]
    return tuple(points)


def _check_size(m: Any, r: Any) -> None:
    for name, value in (("m", m), ("r", r)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise GeometryError(f"transform F({m}, {r}): {name} must be an integer of at least 1, got {value!r}")


def default_points(m: int, r: int) -> tuple[Fraction, ...]:
    """The finite interpolation points used for F(m, r) unless others are given; none for m = 1 or r = 1."""
    _check_size(m, r)
    if m == 1 or r == 1:
        return ()
    if (m, r) in DEFAULT_POINTS:
        return _parse_points(DEFAULT_POINTS[m, r])
    points = list(_parse_points(EXTENSION))
    k = 5
    while len(points) < m + r - 2:
        points += [Fraction(k), Fraction(-k), Fraction(1, k), Fraction(-1, k)]
        k += 1
    return tuple(points[: m + r - 2])


def transform(m: int, r: int, points: Iterable[Any] | None = None) -> Transform:
    """Exact F(m, r) on the given finite points (rationals, or anything Fraction accepts) or on the default ones.

    Raises GeometryError for sizes below 1 and for the wrong number of points or repeated ones.
    """
    _check_size(m, r)
    m, r = int(m), int(r)
    if points is None:
        return _transform(m, r, default_points(m, r))
    given = tuple(Fraction(p) for p in points)
    needed = 0 if m == 1 or r == 1 else m + r - 2
    if len(given) != needed or len(set(given)) != needed:
        count = f"{len(given)}" if len(given) != needed else f"{len(set(given))}"
        raise GeometryError(
            f"transform F({m}, {r}): needs {needed} distinct finite points, got {count}: {', '.join(map(str, given))}"
        )
    return _transform(m, r, given)


@lru_cache(maxsize=256)
def _transform(m: int, r: int, points: tuple[Fraction, ...]) -> Transform:
    if m == 1 or r == 1:
        alpha = m + r - 1
        identity = tuple(tuple(Fraction(int(i == j)) for j in range(alpha)) for i in range(alpha))
        ones = tuple((Fraction(1),) for _ in range(alpha))
        return Transform(m, r, points, (tuple(Fraction(1) for _ in range(alpha)),) if m == 1 else identity,
                         identity if m == 1 else ones, identity)  # fmt: skip
    columns, G, BT = [], [], []
    for p in points:
        others = [q for q in points if q != p]
        column, row = _scaled([p**j for j in range(m)]), _scaled([*_polynomial(others), Fraction(0)])
        # AT and BT took column[0] and row[-2]; G divides by them and by the Lagrange denominator.
        rest = 1 / (prod(p - q for q in others) * column[0] * (row[-2] / 1))
        sign = -1 if rest < 0 else 1
        columns.append(column)
        G.append(tuple(sign * rest * p**k for k in range(r)))
        BT.append(tuple(sign * c for c in row))
    columns.append([Fraction(int(j == m - 1)) for j in range(m)])
    G.append(tuple(Fraction(int(k == r - 1)) for k in range(r)))
    BT.append(_polynomial(points))
    return Transform(m, r, points, tuple(zip(*columns, strict=True)), tuple(G), tuple(BT))


def _polynomial(roots: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Coefficients of prod(x - root), lowest power first."""
    c = [Fraction(1)]
    for root in roots:
        c = [low - root * high for low, high in zip([Fraction(0), *c], [*c, Fraction(0)], strict=True)]
    return tuple(c)


def _scaled(row: Sequence[Fraction]) -> list[Fraction]:
    """The multiple of a row that is cheapest to apply, then integer, then closest to unit size."""
    candidates = [[c / abs(pivot) for c in row] for pivot in row if pivot]
    denominator = lcm(*(c.denominator for c in row))
    candidates.append([c * denominator / gcd(*(int(c * denominator) for c in row)) for c in row])
    return min(candidates, key=_scaling_cost)


def _scaling_cost(row: Sequence[Fraction]) -> tuple[int, int, int, float]:
    general = sum(abs(c) not in (0, 1) and not is_shift(c) for c in row)
    units = sum(abs(c) == 1 for c in row)
    fractional = sum(c.denominator != 1 for c in row)
    return general, -units, fractional, abs(log2(float(sum(c * c for c in row))))


def describe(t: Transform) -> str:
    """Points, matrices, operation counts and accuracy of a transform as text."""
    lines = [
        f"F({t.m}, {t.r}): {t.m} outputs of {t.r} taps with {t.alpha} multiplications instead of {t.m * t.r}, "
        f"a saving of {(t.m * t.r - t.alpha) / (t.m * t.r):.1%}",
        f"points: {', '.join([*map(str, t.points), 'infinity']) if t.points else 'none needed'}",
    ]
    programs = {"BT": t.input_program, "AT": t.output_program, "G": t.filter_program}
    for name, matrix in (("AT", t.AT), ("G", t.G), ("BT", t.BT)):
        widths = [max(len(str(c)) for c in column) for column in zip(*matrix, strict=True)]
        p = programs[name]
        lines.append(
            f"\n{name} ({len(matrix)} x {len(matrix[0])}): {p.additions} additions, {p.shifts} shifts, "
            f"{p.multiplications} multiplications"
        )
        lines += ["  " + "  ".join(f"{c!s:>{w}}" for c, w in zip(row, widths, strict=True)) for row in matrix]
    a = t.amplification()
    lines.append(f"\namplification: {a:.3g} in 1D, {a**2:.3g} in 2D, {a**3:.3g} in 3D")
    return "\n".join(lines)
