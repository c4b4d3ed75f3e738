"""Straight-line programs: how to multiply by a small constant matrix with few operations.

A transform stage of Winograd convolution is a matrix known in advance, so its product with a vector
is written out once as a list of additions, subtractions and multiplications by constants. The list
is the one source for every backend's transform code, and its length is what a hardware designer
wants to know.

The search is greedy elimination of two-term subexpressions shared up to a common factor (after
Hosangadi, Fallah and Kastner, "Optimizing polynomial expressions by algebraic factorization and
common subexpression elimination", 2006), on the matrix and, by turning every edge of the network
round, on its transpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import combinations
from math import gcd
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """One operation: add, sub, mul or neg of value indices; `constant` is the factor of mul."""

    op: str
    operands: tuple[int, ...]
    constant: Fraction = Fraction(1)


def is_shift(c: Fraction) -> bool:
    """Whether |c| is a power of two other than 1."""
    return abs(c) != 1 and _is_power(abs(c.numerator)) and _is_power(c.denominator)


def _is_power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@dataclass(frozen=True)
class Program:
    """Matrix times vector as a straight line of steps, each value assigned once.

    Values are numbered: 0 .. inputs - 1 are the inputs, then one per step. `results[i]` is the
    value of output row i; None is the zero row, which no transform has.
    """

    inputs: int
    steps: tuple[Step, ...]
    results: tuple[int | None, ...]

    @cached_property
    def additions(self) -> int:
        """Additions and subtractions."""
        return sum(s.op in ("add", "sub") for s in self.steps)

    @cached_property
    def shifts(self) -> int:
        """Multiplications by a power of two: a shift in fixed point, exact in floating point."""
        return sum(s.op == "mul" and is_shift(s.constant) for s in self.steps)

    @cached_property
    def multiplications(self) -> int:
        """Multiplications by any other constant. A change of sign is not counted."""
        return sum(s.op == "mul" and not is_shift(s.constant) for s in self.steps)

    @cached_property
    def roundings(self) -> int:
        """The most roundings one result depends on: 1 an addition, 2 a constant and its product."""
        cones: list[frozenset[int]] = [frozenset()] * self.inputs
        for index, step in enumerate(self.steps, self.inputs):
            cones.append(frozenset({index}).union(*(cones[i] for i in step.operands)))
        price = [0] * self.inputs
        price += [
            {"add": 1, "sub": 1, "neg": 0, "mul": 0 if is_shift(s.constant) else 2}[s.op]
            for s in self.steps
        ]
        return max(
            (sum(price[i] for i in cones[v]) for v in self.results if v is not None), default=0
        )

    def apply(
        self, values: Sequence[Any], constant: Callable[[Fraction], Any] = lambda c: c
    ) -> list[Any]:
        """Run on anything with + - * and unary -: numbers, arrays, counting scalars, code builders.

        values: one per input. Multiplications are written `value * constant(c)`; for NumPy arrays
        pass `constant=float`. A zero row gives `values[0] * constant(0)`.
        """
        if len(values) != self.inputs:
            raise ValueError(f"program: expects {self.inputs} values, got {len(values)}")
        v = list(values)
        for op, operands, c in self.steps:
            a = v[operands[0]]
            if op == "mul":
                v.append(a * constant(c))
            elif op == "neg":
                v.append(-a)
            else:
                b = v[operands[1]]
                v.append(a + b if op == "add" else a - b)
        return [v[0] * constant(Fraction(0)) if i is None else v[i] for i in self.results]

    def source(
        self,
        inputs: Sequence[str],
        outputs: Sequence[str],
        constant: Callable[[Fraction], str],
        temp: str = "t",
    ) -> list[str]:
        """One assignment per line, in infix that Python, C and Triton read alike.

        inputs: names, subscripts or parenthesised expressions; read any number of times.
        outputs: each written once and never read; none may be an input, because the last inputs
        are read after the first writes.
        A product used once stands inside the sum that uses it, so that a compiler which contracts
        only within an expression still makes a fused multiply-add.
        """
        if len(inputs) != self.inputs or len(outputs) != len(self.results):
            raise ValueError(
                f"program: expects {self.inputs} inputs and {len(self.results)} outputs, "
                f"got {len(inputs)} and {len(outputs)}"
            )
        reads = Counter(i for s in self.steps for i in s.operands)
        writes = {
            i: name
            for i, name in zip(self.results, outputs, strict=True)
            if i is not None and i >= self.inputs
        }
        text = list(inputs)
        lines: list[str] = []
        temporaries = 0
        for index, (op, operands, c) in enumerate(self.steps, self.inputs):
            a = text[operands[0]]
            if op == "mul":
                expression = f"{a} * {constant(c)}"
                if reads[index] == 1 and index not in writes:
                    text.append(expression)
                    continue
            elif op == "neg":
                expression = f"-({a})" if " " in a else f"-{a}"
            else:
                expression = f"{a} {'+' if op == 'add' else '-'} {text[operands[1]]}"
            if index in writes and not reads[index]:
                text.append(writes[index])
            else:
                text.append(f"{temp}{temporaries}")
                temporaries += 1
            lines.append(f"{text[-1]} = {expression}")
        for v, name in zip(self.results, outputs, strict=True):
            if v is None:
                lines.append(f"{name} = {inputs[0]} * {constant(Fraction(0))}")
            elif text[v] != name:
                lines.append(f"{name} = {text[v]}")
        return lines


def apply_along(program: Program, array: Any, axis: int) -> Any:
    """Multiply one axis of a NumPy array by the program's matrix; the other axes stay.

    array: (..., inputs at `axis`, ...), floats or objects
    returns a new array (..., outputs at `axis`, ...) of the same dtype
    Equivalent to: numpy.moveaxis(numpy.tensordot(matrix, array, (1, axis)), 0, axis)
    """
    array = np.asarray(array)
    constant: Callable[[Fraction], Any] = (
        (lambda c: c) if array.dtype == object else array.dtype.type
    )
    return np.stack(program.apply(list(np.moveaxis(array, axis, 0)), constant), axis=axis)


def cost(program: Program) -> tuple[int, int, int]:
    """Multiplications, additions, shifts: programs are compared in this order."""
    return program.multiplications, program.additions, program.shifts


def program(matrix: Iterable[Iterable[Any]]) -> Program:
    """Straight-line program of a matrix of rationals, with shared subexpressions.

    Equal matrices have equal programs. A row may be a multiple of another, or zero.
    """
    return _program(tuple(tuple(Fraction(c) for c in row) for row in matrix))


@lru_cache(maxsize=256)
def _program(matrix: tuple[tuple[Fraction, ...], ...]) -> Program:
    found = []
    for prices in SEARCHES:
        found.append(_Network.of(matrix).improve(prices).emit())
        network = _Network.of(tuple(zip(*matrix, strict=True)))
        network.share_pairs(prices)
        found.append(network.transposed().improve(prices).emit())
    return min(found, key=lambda p: (cost(p), len(p.steps)))


# The search spends its time comparing coefficients, where Fraction is slow: it works on
# (numerator, denominator) in lowest terms.
Coefficient = tuple[int, int]
Row = dict[int, Coefficient]  # value -> coefficient: the linear form of one value
Pair = tuple[
    int, int, Coefficient
]  # two values and the ratio of the second coefficient to the first
Use = tuple[
    int, int, int
]  # a value and the size of its coefficient; one use or many, the product is computed once
Prices = tuple[int, int, int]  # of a multiplication, an addition, a shift

ZERO: Coefficient = (0, 1)
ONE: Coefficient = (1, 1)
# What a saving is worth steers the greedy choice; the best of these by `cost` is kept.
SEARCHES: tuple[Prices, ...] = ((16, 4, 1), (8, 8, 1), (4, 16, 1))


def _ratio(a: Coefficient, b: Coefficient) -> Coefficient:
    n, d = a[0] * b[1], a[1] * b[0]
    g = gcd(n, d) if d > 0 else -gcd(n, d)
    return n // g, d // g


def _product(a: Coefficient, b: Coefficient) -> Coefficient:
    return _ratio(a, (b[1], b[0]))


def _sum(a: Coefficient, b: Coefficient) -> Coefficient:
    return _ratio((a[0] * b[1] + b[0] * a[1], a[1]), (b[1], 1))


def _minus(a: Coefficient) -> Coefficient:
    return -a[0], a[1]


def _use(value: int, c: Coefficient) -> Use:
    return value, abs(c[0]), c[1]


def _products_saved(change: Counter[Use], products: Counter[Use], prices: Prices) -> int:
    """What the products cost less after `change` is added to the counts of their uses."""
    saved = 0
    for use, delta in change.items():
        before = products.get(use, 0)
        if use[1] != use[2] and (before > 0) != (before + delta > 0):
            price = prices[2] if _is_power(use[1]) and _is_power(use[2]) else prices[0]
            saved += price if before else -price
    return saved


class _Network:
    """A linear network under improvement: `rows` has each value's form in inputs and other values.

    Inputs are numbered from 0, then come the outputs and the shared sums found on the way.
    """

    def __init__(self, inputs: int, rows: dict[int, Row], outputs: Sequence[int]) -> None:
        self.inputs, self.rows, self.outputs = inputs, rows, list(outputs)

    @classmethod
    def of(cls, matrix: Sequence[Sequence[Fraction]]) -> _Network:
        n = len(matrix[0])
        rows = {
            n + i: {j: c.as_integer_ratio() for j, c in enumerate(row) if c}
            for i, row in enumerate(matrix)
        }
        return cls(n, rows, range(n, n + len(matrix)))

    def transposed(self) -> _Network:
        """Every edge turned round: outputs, which nobody may read, become inputs."""
        number = {v: i for i, v in enumerate(self.outputs)}
        for v in [*range(self.inputs), *self.rows]:
            number.setdefault(v, len(number))
        rows: dict[int, Row] = {i: {} for i in range(len(self.outputs), len(number))}
        for target, row in self.rows.items():
            for source, c in row.items():
                rows[number[source]][number[target]] = c
        return _Network(len(self.outputs), rows, [number[i] for i in range(self.inputs)])

    def improve(self, prices: Prices) -> _Network:
        """Share pairs, then reuse whole sums, until neither saves anything; settle the signs."""
        self.share_pairs(prices)
        while self._reuse_sum(prices):
            self.share_pairs(prices)
        self._settle_signs()
        return self

    def share_pairs(self, prices: Prices) -> None:
        """Make the pair of terms that saves most a value of its own, until none saves anything."""
        while True:
            places: dict[Pair, list[int]] = {}
            for target, row in self.rows.items():
                for (a, ca), (b, cb) in combinations(sorted(row.items()), 2):
                    places.setdefault((a, b, _ratio(cb, ca)), []).append(target)
            products = self._products()
            best: tuple[int, Pair, Coefficient] | None = None
            for pair, targets in places.items():
                if len(targets) == 1 and pair[2] not in (ONE, _minus(ONE)):
                    continue
                for scale in dict.fromkeys(
                    (ONE, _ratio(ONE, pair[2]), self.rows[targets[0]][pair[0]])
                ):
                    saving = self._pair_saving(pair, targets, scale, products, prices)
                    if saving > 0 and (best is None or saving > best[0]):
                        best = (saving, pair, scale)
            if best is None:
                return
            _, pair, scale = best
            a, b, ratio = pair
            new = 1 + max(self.rows)
            for target in places[pair]:
                row = self.rows[target]
                row[new] = _ratio(row.pop(a), scale)
                del row[b]
            self.rows[new] = {a: scale, b: _product(scale, ratio)}

    def _pair_saving(
        self,
        pair: Pair,
        targets: list[int],
        scale: Coefficient,
        products: Counter[Use],
        prices: Prices,
    ) -> int:
        a, b, ratio = pair
        new = -1
        change: Counter[Use] = Counter((_use(a, scale), _use(b, _product(scale, ratio))))
        for target in targets:
            row = self.rows[target]
            change[_use(a, row[a])] -= 1
            change[_use(b, row[b])] -= 1
            change[_use(new, _ratio(row[a], scale))] += 1
        return prices[1] * (len(targets) - 1) + _products_saved(change, products, prices)

    def _reuse_sum(self, prices: Prices) -> bool:
        """Write one row as a multiple of another and a rest where that saves most, if any."""
        products = self._products()
        best: tuple[int, int, Row] | None = None
        for source, form in self.rows.items():
            if len(form) < 2:
                continue
            parts = self._parts(source)
            for target, row in self.rows.items():
                if target in parts or source in row or not form.keys() <= row.keys():
                    continue
                for k in dict.fromkeys(_ratio(row[v], c) for v, c in form.items()):
                    taken = {v: _product(k, c) for v, c in form.items()}
                    rest = {v: _sum(row[v], _minus(c)) for v, c in taken.items()}
                    # Parts of both signs would add what is subtracted again, and round more.
                    if any(c[0] * row[v][0] < 0 for part in (taken, rest) for v, c in part.items()):
                        continue
                    new = {v: c for v, c in {**row, **rest, source: k}.items() if c != ZERO}
                    change = Counter(_use(v, c) for v, c in new.items())
                    change.subtract(_use(v, c) for v, c in row.items())
                    saving = prices[1] * (len(row) - len(new)) + _products_saved(
                        change, products, prices
                    )
                    if saving > 0 and (best is None or saving > best[0]):
                        best = (saving, target, new)
        if best is None:
            return False
        self.rows[best[1]] = best[2]
        return True

    def _parts(self, value: int) -> set[int]:
        """The value and everything it is made of: what cannot be made of it."""
        parts, stack = {value}, [value]
        while stack:
            for v in self.rows.get(stack.pop(), ()):
                if v not in parts:
                    parts.add(v)
                    stack.append(v)
        return parts

    def _products(self) -> Counter[Use]:
        return Counter(_use(v, c) for row in self.rows.values() for v, c in row.items())

    def _settle_signs(self) -> None:
        """Turn shared sums over while that leaves fewer rows without a positive term."""

        def turn(value: int) -> None:
            self.rows[value] = {v: _minus(c) for v, c in self.rows[value].items()}
            for row in self.rows.values():
                if value in row:
                    row[value] = _minus(row[value])

        def negative_rows() -> int:
            return sum(all(c[0] < 0 for c in row.values()) for row in self.rows.values())

        shared = [v for v in self.rows if v not in self.outputs]
        fewest, turned = negative_rows(), True
        while turned:
            turned = False
            for v in shared:
                turn(v)
                count = negative_rows()
                if count < fewest:
                    fewest, turned = count, True
                else:
                    turn(v)

    def emit(self) -> Program:
        """The steps in order of need."""
        steps: list[Step] = []
        value = {i: i for i in range(self.inputs)}
        multiples: dict[tuple[int, Fraction], int] = {}

        def push(op: str, *operands: int, constant: Fraction = Fraction(1)) -> int:
            steps.append(Step(op, operands, constant))
            return self.inputs + len(steps) - 1

        def multiple(v: int, c: Fraction) -> int:
            if c == 1:
                return visit(v)
            if (v, c) not in multiples:
                if c == -1 or (v, -c) in multiples:
                    multiples[v, c] = push("neg", multiple(v, -c))
                else:
                    multiples[v, c] = push("mul", visit(v), constant=c)
            return multiples[v, c]

        def visit(v: int) -> int:
            if v not in value:
                # A plain positive term first, so that signs vanish into add and sub; if none is
                # positive, a product takes the sign.
                terms = [(u, Fraction(*c)) for u, c in self.rows[v].items()]
                negative = all(c < 0 for _, c in terms)
                terms.sort(key=lambda t: (t[1] < 0, (abs(t[1]) == 1) == negative, t[0]))
                total = multiple(*terms[0])
                for u, c in terms[1:]:
                    # The sign of the product that exists already; else the positive one.
                    same = (u, c) in multiples or (c > 0 and (u, -c) not in multiples)
                    total = push("add" if same else "sub", total, multiple(u, c if same else -c))
                value[v] = total
            return value[v]

        results = tuple(visit(v) if v < self.inputs or self.rows[v] else None for v in self.outputs)
        return Program(self.inputs, tuple(steps), results)
