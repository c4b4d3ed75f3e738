"""A scalar that counts its own arithmetic: analytic operation counts are tested by counting.

Fill an object array with `Counting(value, tally)` and run the reference on it. Additions and
subtractions are additions; multiplication by a plain constant is free for 0 and +-1, a shift for
+-2^k and a multiplication otherwise; a product of two counting scalars is a multiplication, and is
also counted apart. Negation, and adding a plain 0 (padding, the start of a sum), cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np


@dataclass
class Tally:
    """Operations done so far; `products` are those multiplications that are data times data."""

    additions: int = 0
    shifts: int = 0
    multiplications: int = 0
    products: int = 0

    def reset(self) -> None:
        self.additions = self.shifts = self.multiplications = self.products = 0


class Counting:
    """A number and the tally shared by all numbers of one computation."""

    __slots__ = ("tally", "value")
    __array_priority__ = 1000  # NumPy scalars on the left defer to __rmul__ and __radd__

    def __init__(self, value: Any, tally: Tally) -> None:
        self.value, self.tally = value, tally

    def _plus(self, other: Any, sign: int, swapped: bool) -> Counting:
        theirs = other.value if isinstance(other, Counting) else other
        if isinstance(other, Counting) or theirs != 0:
            self.tally.additions += 1
        mine = self.value
        return Counting(theirs + sign * mine if swapped else mine + sign * theirs, self.tally)

    def __add__(self, other: Any) -> Counting:
        return self._plus(other, 1, swapped=False)

    def __radd__(self, other: Any) -> Counting:
        return self._plus(other, 1, swapped=True)

    def __sub__(self, other: Any) -> Counting:
        return self._plus(other, -1, swapped=False)

    def __rsub__(self, other: Any) -> Counting:
        return self._plus(other, -1, swapped=True)

    def __mul__(self, other: Any) -> Counting:
        if isinstance(other, Counting):
            self.tally.products += 1
            self.tally.multiplications += 1
            return Counting(self.value * other.value, self.tally)
        size = abs(Fraction(other))
        if size not in (0, 1):
            n, d = size.numerator, size.denominator
            if n & (n - 1) == 0 and d & (d - 1) == 0:
                self.tally.shifts += 1
            else:
                self.tally.multiplications += 1
        return Counting(self.value * other, self.tally)

    __rmul__ = __mul__

    def __neg__(self) -> Counting:
        return Counting(-self.value, self.tally)

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        return f"Counting({self.value!r})"


def counting_array(values: Any, tally: Tally) -> np.ndarray:
    """Object array of counting scalars with the shape of `values`."""
    values = np.asarray(values)
    out = np.empty(values.shape, dtype=object)
    out.ravel()[:] = [Counting(v, tally) for v in values.ravel().tolist()]
    return out


def plain_values(array: Iterable[Any]) -> np.ndarray:
    """The values of an object array of counting scalars, as float64."""
    array = np.asarray(array, dtype=object)
    return np.array([float(v) for v in array.ravel()]).reshape(array.shape)
