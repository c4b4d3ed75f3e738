"""Straight-line programs: how to multiply by a small constant matrix with few operations.

A transform stage of Winograd convolution is a matrix known in advance, so its product with a vector is written out once as a list
of additions, subtractions and multiplications by constants. The list is the one source for every backend's transform code, and its
length is what a hardware designer wants to know.

The search is greedy elimination of two-term subexpressions shared by several rows up to a common factor, as done for constant
matrices in filter design (Hosangadi, Fallah and Kastner, "Optimizing polynomial expressions by algebraic factorization and
common subexpression elimination", 2006), run on the matrix and on its transpose (Bordewijk, "Inter-reciprocity applied to
electrical networks", 1957: a linear program run backwards computes the transpose at the same number of multiplications).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

ONE = Fraction(1)
Row = dict[int, Fraction]  # variable -> coefficient; the linear form of one value


class Step(NamedTuple):
    """One operation: `op` in add, sub, mul, neg on value indices; `constant` belongs to mul alone."""

    op: str
    operands: tuple[int, ...]
    constant: Fraction | None = None


def is_shift(c: Fraction) -> bool:
    """Whether |c| is a power of two other than 1."""
    n, d = abs(c.numerator), c.denominator
    return n > 0 and n != d and n & (n - 1) == 0 and d & (d - 1) == 0


@dataclass(frozen=True)
class Program:
    """Matrix times vector as a straight line of steps, each value assigned once.

    Values are numbered: 0 .. inputs-1 are the inputs, then one per step. `results[i]` is the value of output row i; None is the
    zero row, which no transform has.
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
        """Multiplications by a power of two (a shift in fixed point, an exponent change in floating point)."""
        return sum(s.constant is not None and is_shift(s.constant) for s in self.steps)

    @cached_property
    def multiplications(self) -> int:
        """Multiplications by any other constant. A change of sign is not counted."""
        return sum(s.constant is not None and not is_shift(s.constant) for s in self.steps)

    def apply(self, values: Sequence[Any], constant: Callable[[Fraction], Any] = lambda c: c) -> list[Any]:
        """Run on anything with + - * and unary -: numbers, arrays, counting scalars, code emitters.

        values: one per input. Multiplications are written `value * constant(c)`; for NumPy arrays pass `constant=float`.
        A zero row gives `values[0] * constant(0)`.
        """
        if len(values) != self.inputs:
            raise ValueError(f"program: expects {self.inputs} values, got {len(values)}")
        v = list(values)
        for op, operands, c in self.steps:
            a = v[operands[0]]
            if op == "add":
                v.append(a + v[operands[1]])
            elif op == "sub":
                v.append(a - v[operands[1]])
            elif op == "mul":
                v.append(a * constant(c))
            else:
                v.append(-a)
        return [v[0] * constant(Fraction(0)) if i is None else v[i] for i in self.results]

    def source(
        self, inputs: Sequence[str], outputs: Sequence[str], constant: Callable[[Fraction], str], temp: str = "t"
    ) -> list[str]:
        """One assignment per line, in infix that Python, C and Triton read alike.

        inputs, outputs: expressions read and names written (no output may be an input). A product used once is written inside the
        sum that uses it, so that a compiler which contracts only within an expression still makes a fused multiply-add.
        """
        if len(inputs) != self.inputs or len(outputs) != len(self.results):
            raise ValueError(
                f"program: expects {self.inputs} inputs and {len(self.results)} outputs, got {len(inputs)} and {len(outputs)}"
            )
        uses = Counter(i for s in self.steps for i in s.operands)
        first_output: dict[int, str] = {}
        for index, name in zip(self.results, outputs, strict=True):
            if index is not None and index >= self.inputs:
                first_output.setdefault(index, name)
        text = list(inputs)
        lines: list[str] = []
        for index, step in enumerate(self.steps, self.inputs):
            a = text[step.operands[0]]
            if step.op == "mul":
                expression = f"{a} * {constant(step.constant)}"  # type: ignore[arg-type]
                if uses[index] == 1 and index not in first_output:
                    text.append(expression)
                    continue
            elif step.op == "neg":
                expression = f"-({a})" if " " in a else f"-{a}"
            else:
                expression = f"{a} {'+' if step.op == 'add' else '-'} {text[step.operands[1]]}"
            name = first_output.get(index, f"{temp}{index - self.inputs}")
            lines.append(f"{name} = {expression}")
            text.append(name)
        for index, name in zip(self.results, outputs, strict=True):
            if index is None:
                lines.append(f"{name} = {inputs[0]} * {constant(Fraction(0))}")
            elif first_output.get(index) != name:
                lines.append(f"{name} = {text[index]}")
        return lines


def apply_along(program: Program, array: Any, axis: int) -> Any:
    """Multiply one axis of a NumPy array (object arrays too) by the program's matrix; the other axes stay.

    array: (..., inputs at `axis`, ...) -> new array (..., outputs at `axis`, ...) of the same dtype.
    Equivalent to: numpy.moveaxis(numpy.tensordot(matrix, array, (1, axis)), 0, axis)
    """
    array = np.asarray(array)
    constant = (lambda c: c) if array.dtype == object else array.dtype.type
    return np.stack(program.apply(list(np.moveaxis(array, axis, 0)), constant), axis=axis)


class _Network:
    """A linear network under improvement: `rows` maps a value to its form in inputs and other values."""

    def __init__(self, inputs: int, rows: dict[int, Row], outputs: Sequence[int]) -> None:
        self.inputs, self.rows, self.outputs = inputs, rows, list(outputs)

    @classmethod
    def of(cls, matrix: Sequence[Sequence[Fraction]]) -> _Network:
        n = len(matrix[0])
        rows = {n + i: {j: c for j, c in enumerate(row) if c} for i, row in enumerate(matrix)}
        return cls(n, rows, range(n, n + len(matrix)))

    def transposed(self) -> _Network:
        """Every edge turned round: inputs become outputs and outputs inputs."""
        number = {v: i for i, v in enumerate(self.outputs)}
        for v in [*self.rows, *range(self.inputs)]:
            number.setdefault(v, len(number))
        rows: dict[int, Row] = {number[v]: {} for v in [*range(self.inputs), *self.rows] if number[v] >= len(self.outputs)}
        for target, row in self.rows.items():
            for source, c in row.items():
                rows[number[source]][number[target]] = c
        return _Network(len(self.outputs), rows, [number[i] for i in range(self.inputs)])

    def products(self) -> Counter[tuple[int, Fraction]]:
        """How often each product |c| * value is used; one use or many, it is computed once."""
        return Counter((v, abs(c)) for row in self.rows.values() for v, c in row.items())

    def eliminate(self, weights: tuple[int, int, int]) -> None:
        """Extract the pair of terms that saves most (multiplications, additions, shifts by weight) until none saves anything."""
        while True:
            places: dict[tuple[int, int, Fraction], list[int]] = {}
            for target, row in self.rows.items():
                for (a, ca), (b, cb) in combinations(sorted(row.items()), 2):
                    places.setdefault((a, b, cb / ca), []).append(target)
            products = self.products()
            best: tuple[int, tuple[int, int, Fraction], Fraction] | None = None
            for pair, targets in places.items():
                if len(targets) == 1 and abs(pair[2]) != 1:
                    continue
                for scale in {ONE, ONE / pair[2], self.rows[targets[0]][pair[0]]}:
                    saving = self._saving(pair, targets, scale, products, weights)
                    if saving > 0 and (best is None or saving > best[0]):
                        best = (saving, pair, scale)
            if best is None:
                return
            _, pair, scale = best
            self._extract(pair, places[pair], scale)

    def _saving(
        self, pair: tuple[int, int, Fraction], targets: list[int], scale: Fraction,
        products: Counter[tuple[int, Fraction]], weights: tuple[int, int, int],
    ) -> int:  # fmt: skip
        a, b, ratio = pair
        change: Counter[tuple[int, Fraction]] = Counter()
        for target in targets:
            c = self.rows[target][a]
            change[a, abs(c)] -= 1
            change[b, abs(c * ratio)] -= 1
            change[-1, abs(c / scale)] += 1
        change[a, abs(scale)] += 1
        change[b, abs(scale * ratio)] += 1
        saving = weights[1] * (len(targets) - 1)
        for key, delta in change.items():
            if key[1] != 1:
                before = products.get(key, 0)
                price = weights[2] if is_shift(key[1]) else weights[0]
                saving += price * ((before > 0) - (before + delta > 0))
        return saving

    def _extract(self, pair: tuple[int, int, Fraction], targets: list[int], scale: Fraction) -> None:
        a, b, ratio = pair
        new = 1 + max(*self.rows, self.inputs)
        for target in targets:
            row = self.rows[target]
            row[new] = row.pop(a) / scale
            del row[b]
        self.rows[new] = {a: scale, b: scale * ratio}

    def emit(self) -> Program:
        steps: list[Step] = []
        value = {i: i for i in range(self.inputs)}
        scaled: dict[tuple[int, Fraction], int] = {}

        def push(step: Step) -> int:
            steps.append(step)
            return self.inputs + len(steps) - 1

        def term(v: int, c: Fraction) -> int:
            if c == 1:
                return visit(v)
            if (v, c) not in scaled:
                i = visit(v)
                scaled[v, c] = push(Step("neg", (i,)) if c == -1 else Step("mul", (i,), c))
            return scaled[v, c]

        def visit(v: int) -> int:
            if v not in value:
                # A plain positive term first, then the others: signs vanish into add and sub.
                terms = sorted(self.rows[v].items(), key=lambda t: (t[1] < 0, abs(t[1]) != 1, t[0]))
                if len(terms) == 1:
                    value[v] = term(*terms[0])
                    return value[v]
                if terms[0][1] < 0:
                    terms.sort(key=lambda t: (abs(t[1]) == 1, t[0]))
                total = term(*terms[0])
                for u, c in terms[1:]:
                    if c < 0 and (u, c) in scaled:
                        total = push(Step("add", (total, scaled[u, c])))
                    elif c > 0 and (u, -c) in scaled:
                        total = push(Step("sub", (total, scaled[u, -c])))
                    else:
                        total = push(Step("add" if c > 0 else "sub", (total, term(u, abs(c)))))
                value[v] = total
            return value[v]

        results = tuple(visit(v) if self.rows.get(v) or v < self.inputs else None for v in self.outputs)
        return Program(self.inputs, tuple(steps), results)


def cost(program: Program) -> tuple[int, int, int]:
    """Multiplications, additions, shifts: programs are compared in this order."""
    return program.multiplications, program.additions, program.shifts


WEIGHTS = ((8, 8, 1), (16, 4, 1), (4, 16, 1))


def program(matrix: Iterable[Iterable[Any]]) -> Program:
    """Straight-line program of a matrix of rationals, with shared subexpressions; the same matrix gives the same program."""
    return _program(tuple(tuple(Fraction(c) for c in row) for row in matrix))


@lru_cache(maxsize=256)
def _program(matrix: tuple[tuple[Fraction, ...], ...]) -> Program:
    found: list[Program] = []
    for weights in WEIGHTS:
        network = _Network.of(matrix)
        network.eliminate(weights)
        found.append(network.emit())
        network = _Network.of(tuple(zip(*matrix, strict=True)))
        network.eliminate(weights)
        network = network.transposed()
        network.eliminate(weights)
        found.append(network.emit())
    return min(found, key=cost)
