"""Exactness, accuracy and cost of the transforms F(m, r) and of their straight-line programs."""

from __future__ import annotations

import pickle
from fractions import Fraction
from itertools import combinations, product
from math import prod, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting import Tally, counting_array, plain_values
from fastconv.errors import GeometryError
from fastconv.programs import cost
from fastconv.transforms import (
    Program,
    Step,
    Transform,
    amplification,
    apply_along,
    default_points,
    describe,
    error_factor,
    program,
    transform,
)

HALF = Fraction(1, 2)
ALL = [(m, r) for m in range(1, 9) for r in range(1, 8)]
F43 = (0, Fraction(2, 3), -Fraction(2, 3), Fraction(3, 2), -Fraction(3, 2))
rationals = st.fractions(min_value=-5, max_value=5, max_denominator=6)


def matrix_of(p: Program) -> list[list[Fraction]]:
    """The matrix a program computes: its action on unit vectors, exactly."""
    units = [[Fraction(int(i == j)) for i in range(p.inputs)] for j in range(p.inputs)]
    columns = [p.apply(unit) for unit in units]
    return [list(row) for row in zip(*columns, strict=True)]


# Exactness


@pytest.mark.parametrize(("m", "r"), ALL)
def test_default_transform_and_programs_are_exact(m, r):
    t = transform(m, r)
    t.verify()
    assert (t.alpha, len(t.points)) == (m + r - 1, 0 if 1 in (m, r) else m + r - 2)
    for p, matrix in (
        (t.input_program, t.BT),
        (t.output_program, t.AT),
        (t.filter_program, t.G),
    ):
        assert matrix_of(p) == [list(row) for row in matrix]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_distinct_points_are_exact(data):
    m, r = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 4))
    n = m + r - 2
    points = data.draw(st.lists(rationals, min_size=n, max_size=n, unique=True))
    t = transform(m, r, points)
    t.verify()
    assert t.points == tuple(points)
    assert matrix_of(t.input_program) == [list(row) for row in t.BT]


@pytest.mark.parametrize("alpha", [15, 16, 19, 24])
def test_points_beyond_the_table(alpha):
    points = default_points(alpha - 3, 4)
    assert len(set(points)) == alpha - 1
    assert {-p for p in points} == set(points)
    if alpha < 17:
        transform(4, alpha - 3).verify()


def test_verify_names_the_wrong_coefficient():
    t = transform(2, 3)
    wrong = Transform(t.m, t.r, t.points, t.AT, t.G, ((Fraction(2), *t.BT[0][1:]), *t.BT[1:]))
    message = r"F\(2, 3\): coefficient of g\[0\] d\[0\] in y\[0\] is 2, must be 1"
    with pytest.raises(ArithmeticError, match=message):
        wrong.verify()


def test_one_output_or_one_tap_needs_no_arithmetic_on_operands():
    dot, scale = transform(1, 3), transform(3, 1)
    assert dot.AT == ((1, 1, 1),)
    assert scale.G == ((1,), (1,), (1,))
    for t in (dot, scale):
        assert t.amplification() == 1
        assert cost(t.input_program) == cost(t.filter_program) == (0, 0, 0)
        assert transform(t.m, t.r, ()) is t
    assert cost(dot.output_program) == (0, 2, 0)


# Known matrices


def test_f23_is_winograds():
    """Lavin and Gray, equation 7, but for the sign of the last row of BT and column of AT."""
    t = transform(2, 3)
    assert t.points == (0, 1, -1)
    assert t.BT == ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1))
    assert t.G == ((1, 0, 0), (HALF, HALF, HALF), (HALF, -HALF, HALF), (0, 0, 1))
    assert t.AT == ((1, 1, 1, 0), (0, 1, -1, 1))


def test_integer_points_give_integer_matrices():
    """F(4, 3) at 0, +-1, +-2: Lavin and Gray, section 4.3, up to the signs of two rows."""
    t = transform(4, 3, (0, 1, -1, 2, -2))
    assert t.AT == (
        (1, 1, 1, 1, 1, 0),
        (0, 1, -1, 2, -2, 0),
        (0, 1, 1, 4, 4, 0),
        (0, 1, -1, 8, -8, 1),
    )
    assert t.BT[0] == (4, 0, -5, 0, 1, 0)
    assert t.BT[3] == (0, -2, -1, 2, 1, 0)
    assert t.G[3] == (Fraction(1, 24), Fraction(1, 12), Fraction(1, 6))


def test_scaling_is_balanced():
    for m, r in ((3, 3), (4, 3), (6, 3), (4, 5), (7, 3)):
        t = transform(m, r)
        for vectors in (zip(*t.AT, strict=True), t.G, t.BT):
            norms = [sqrt(sum(c * c for c in v)) for v in vectors]
            assert max(*norms, *(1 / n for n in norms)) < 16, (m, r)


# Accuracy


def squared_amplification(m, r, points) -> float:
    """amplification^2 from its formula in plain NumPy; scaling cancels, so points are enough."""
    p = np.array([float(q) for q in points])
    powers = p ** np.arange(max(m, r))[:, None]  # (power, point)
    difference = p[:, None] - p
    np.fill_diagonal(difference, 1)
    taps = (powers[:r] ** 2).sum(0) / difference.prod(1) ** 2
    rows = [(np.poly(np.delete(p, i)) ** 2).sum() for i in range(len(p))]
    variance = powers[:m] ** 2 @ (taps * rows)
    variance[-1] += (np.poly(p) ** 2).sum()
    return variance.max() / r


def candidates(n: int):
    """0 or not, pairs of p / q with p, q <= 4, and at most one unpaired point: n points."""
    sizes = sorted({Fraction(p, q) for p, q in product(range(1, 5), repeat=2)})
    for pairs in combinations(sizes, n // 2):
        yield [*(s * p for p in pairs for s in (1, -1)), *([Fraction(0)] * (n % 2))]
    if n % 2 == 0:
        for pairs in combinations(sizes, n // 2 - 1):
            rest = [u for u in sizes if u not in pairs]
            yield from ([Fraction(0), *(s * p for p in pairs for s in (1, -1)), u] for u in rest)


@pytest.mark.parametrize(
    ("m", "r"),
    [(2, 3), (3, 2), (3, 3), (4, 3), (2, 5), (5, 2), (5, 3), (4, 4), (6, 3), (2, 7), (4, 5)],
)
def test_default_points_have_the_least_amplification(m, r):
    least = min(squared_amplification(m, r, points) for points in candidates(m + r - 2))
    assert transform(m, r).amplification() ** 2 <= least * (1.002 if (m, r) == (5, 2) else 1 + 1e-9)


def test_named_points_and_their_advantage():
    assert transform(2, 3).points == (0, 1, -1)
    assert transform(4, 3).points == F43
    assert transform(6, 3).points == (0, HALF, -HALF, 1, -1, 2, -2)
    usual = transform(4, 3, (0, 1, -1, 2, -2))
    assert (usual.amplification() / transform(4, 3).amplification()) ** 3 == pytest.approx(
        9, rel=0.05
    )


def test_amplification_ignores_scaling_and_multiplies_over_axes():
    t = transform(4, 3)
    k = [Fraction(i + 2, 3) for i in range(t.alpha)]
    scaled = Transform(
        t.m,
        t.r,
        t.points,
        tuple(tuple(c * f for c, f in zip(row, k, strict=True)) for row in t.AT),
        tuple(tuple(c / f / f for c in row) for row, f in zip(t.G, k, strict=True)),
        tuple(tuple(c * f for c in row) for row, f in zip(t.BT, k, strict=True)),
    )
    scaled.verify()
    assert scaled.amplification() == pytest.approx(t.amplification(), rel=1e-12)
    assert amplification([]) == 1
    one = [s.amplification() for s in (t, transform(2, 3), transform(1, 5))]
    assert amplification((t, transform(2, 3), transform(1, 5))) == pytest.approx(prod(one))


def nested(matrices, x: np.ndarray) -> np.ndarray:
    """One matrix per trailing axis of x (trials, channels, *axes)."""
    for axis, matrix in enumerate(matrices, 2):
        x = np.moveaxis(np.tensordot(x, matrix, (axis, 1)), -1, axis)
    return x


def direct(d: np.ndarray, g: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Sum of products one by one in the precision of its arguments; (trials, *size)."""
    y = np.zeros((len(d), *size), d.dtype)
    for c in range(d.shape[1]):
        for tap in np.ndindex(*g.shape[2:]):
            window = tuple(slice(t, t + m) for t, m in zip(tap, size, strict=True))
            y += d[(slice(None), c, *window)] * g[(slice(None), c, *tap)].reshape(
                -1, *[1] * len(size)
            )
    return y


def random_tiles(axes, channels, trials):
    """d (trials, channels, *alphas), g (trials, channels, *taps): independent, unit variance."""
    rng = np.random.default_rng(3)
    d = rng.standard_normal((trials, channels, *(t.alpha for t in axes)))
    return d, rng.standard_normal((trials, channels, *(t.r for t in axes)))


def worst_rms(error: np.ndarray) -> float:
    """Root mean square over the trials at the worst place of the tile."""
    return float(np.sqrt((error**2).mean(0)).max())


AXES = [
    (transform(2, 3),),
    (transform(4, 3),),
    (transform(4, 3, (0, 1, -1, 2, -2)),),
    (transform(6, 3),),
    (transform(3, 4), transform(2, 5)),
    (transform(4, 3), transform(4, 3)),
    (transform(2, 3), transform(4, 3), transform(4, 3)),
    (transform(2, 2), transform(1, 3), transform(3, 3)),
]


def name(axes) -> str:
    return "-".join(f"F({t.m},{t.r})" for t in axes)


@pytest.mark.parametrize("axes", AXES, ids=name)
def test_measured_operand_rounding_is_the_amplification(axes):
    """Both algorithms in float64, but for operands rounded to 11 binary digits.

    The factor is a ratio of expectations. Relative errors of rounding are not quite alike for all
    rows (one entry +-1 keeps the normal distribution, products of sums spread it), and the sample
    is finite; both are within a tenth.
    """

    def rounded(a):
        fraction, exponent = np.frexp(a)
        return np.ldexp(np.rint(fraction * 2**11), exponent - 11)

    d, g = random_tiles(axes, 1, 4000)
    size = tuple(t.m for t in axes)
    want = direct(d, g, size)
    AT, G, BT = zip(*(t.as_arrays(float) for t in axes), strict=True)
    products = rounded(nested(G, g)) * rounded(nested(BT, d))
    error = worst_rms(nested(AT, products)[:, 0] - want)
    plain = sqrt(((direct(rounded(d), rounded(g), size) - want) ** 2).mean())
    assert error / plain == pytest.approx(amplification(axes), rel=0.1)


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("axes", AXES, ids=name)
def test_float32_error_within_error_factor(axes, channels):
    d, g = random_tiles(axes, channels, 400)
    d32, g32 = d.astype(np.float32), g.astype(np.float32)
    size = tuple(t.m for t in axes)
    want = direct(d32.astype(float), g32.astype(float), size)
    plain = sqrt(((direct(d32, g32, size) - want) ** 2).mean())
    U, V = g32, d32
    for axis, t in enumerate(axes, 2):
        U, V = apply_along(t.filter_program, U, axis), apply_along(t.input_program, V, axis)
    M = np.zeros_like(V[:, 0])
    for c in range(channels):
        M += U[:, c] * V[:, c]
    for axis, t in enumerate(axes, 1):
        M = apply_along(t.output_program, M, axis)
    assert M.dtype == np.float32
    assert worst_rms(M - want) <= error_factor(axes, channels) * plain


# Programs

# Multiplications, additions, shifts of BT, AT and G: nothing may raise them.
COSTS = {
    (2, 3): ((0, 4, 0), (0, 4, 0), (0, 3, 2)),
    (3, 3): ((7, 10, 1), (4, 8, 0), (6, 6, 0)),
    (4, 3): ((6, 12, 0), (6, 10, 0), (5, 6, 1)),
    (6, 3): ((4, 22, 6), (0, 20, 8), (5, 9, 2)),
}


@pytest.mark.parametrize(("m", "r"), COSTS)
def test_program_costs(m, r):
    t = transform(m, r)
    for p, bound in zip(
        (t.input_program, t.output_program, t.filter_program), COSTS[m, r], strict=True
    ):
        assert cost(p) <= bound


def test_textbook_f43_input_takes_twelve_additions_and_no_multiplication():
    assert cost(transform(4, 3, (0, 1, -1, 2, -2)).input_program) == (0, 12, 5)


@pytest.mark.parametrize(("m", "r"), [(1, 3), (2, 3), (4, 3), (3, 4), (6, 3), (5, 5)])
def test_counts_are_those_of_a_counting_scalar(m, r):
    t = transform(m, r)
    for p in (t.input_program, t.output_program, t.filter_program):
        tally = Tally()
        x = np.arange(1.0, p.inputs + 1)
        got = plain_values(apply_along(p, counting_array(x, tally), 0))
        assert (tally.multiplications, tally.additions, tally.shifts) == cost(p)
        np.testing.assert_allclose(got, apply_along(p, x, 0), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_program_of_any_matrix(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    entries = st.sampled_from(
        [Fraction(c) for c in ("0", "1", "-1", "2", "-1/2", "3", "-5/3", "3/5")]
    )
    line = st.lists(entries, min_size=columns, max_size=columns)
    matrix = data.draw(st.lists(line, min_size=rows, max_size=rows))
    p = program(matrix)
    assert matrix_of(p) == matrix
    assert p.additions <= sum(max(0, sum(c != 0 for c in row) - 1) for row in matrix)
    assert p.multiplications + p.shifts <= sum(abs(c) not in (0, 1) for row in matrix for c in row)
    # Nothing is added to be subtracted again: without signs it computes the absolute matrix.
    signless = [Step("add" if op == "sub" else op, v, abs(c)) for op, v, c in p.steps]
    signless = [s if s.op != "neg" else Step("mul", s.operands, Fraction(1)) for s in signless]
    absolute = matrix_of(Program(p.inputs, tuple(signless), p.results))
    assert absolute == [[abs(c) for c in row] for row in matrix]


def test_zero_row_is_written_out():
    p = program([[1, 1], [0, 0]])
    assert p.results[1] is None
    assert p.apply([3.0, 4.0], float) == [7.0, 0.0]
    assert p.source("ab", "xy", str) == ["x = a + b", "y = a * 0"]


@pytest.mark.parametrize(("m", "r"), [(1, 3), (3, 1), (2, 3), (4, 3), (6, 3), (4, 5)])
def test_source_runs_as_python(m, r):
    t = transform(m, r)
    for p in (t.input_program, t.output_program, t.filter_program):
        x = [Fraction(i * i + 1, 3) for i in range(p.inputs)]
        lines = p.source(
            [f"x[{i}]" for i in range(p.inputs)],
            [f"y[{i}]" for i in range(len(p.results))],
            lambda c: f"Fraction({c.numerator}, {c.denominator})",
        )
        y: dict[int, Fraction] = {}
        exec("\n".join(lines), {"x": x, "y": y, "Fraction": Fraction})
        assert [y[i] for i in range(len(p.results))] == p.apply(x)
        assert sum(line.startswith("y[") for line in lines) == len(p.results)
        assert not any("y[" in line.split("=", 1)[1] for line in lines)


def test_source_keeps_products_inside_sums():
    p = Program(2, (Step("mul", (1,), Fraction(3)), Step("add", (0, 2))), (3,))
    assert p.source(["a", "b"], ["y"], lambda c: f"{float(c)}f") == ["y = a + b * 3.0f"]


def test_roundings_count_what_one_result_depends_on():
    assert transform(2, 3).input_program.roundings == 1
    assert program([[1, 3], [1, 0]]).roundings == 3
    assert program([[1, 4]]).roundings == 1


def test_program_is_deterministic_and_checks_lengths():
    t = transform(4, 3)
    assert program([list(row) for row in t.BT]) == t.input_program
    with pytest.raises(ValueError, match="^program: expects 6 values, got 2$"):
        t.input_program.apply([1, 2])
    message = "^program: expects 6 inputs and 4 outputs, got 6 and 3$"
    with pytest.raises(ValueError, match=message):
        t.output_program.source("abcdef", "xyz", str)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, object])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_apply_along_moves_nothing_else(dtype, axis):
    shape = [2, 3, 5]
    shape[axis] = 6
    x = np.arange(prod(shape)).reshape(shape)
    x = x.astype(dtype) if dtype is not object else np.vectorize(Fraction, otypes=[object])(x)
    t = transform(4, 3, (0, 1, -1, 2, -2))
    AT = t.as_arrays(dtype)[0]
    y = apply_along(t.output_program, x, axis)
    want = np.moveaxis(np.tensordot(AT, x, (1, axis)), 0, axis)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, want)


# The objects


def test_transform_is_a_small_value():
    t = transform(4, 3)
    assert t is transform(np.int64(4), 3) is transform(4, 3, ["0", "2/3", "-2/3", 1.5, -1.5])
    assert t != transform(4, 3, (0, 1, -1, 2, -2))
    assert len({t, transform(4, 3, F43)}) == 1
    copy = pickle.loads(pickle.dumps(t))
    assert copy == t
    assert hash(copy) == hash(t)
    assert copy.input_program == t.input_program
    assert "AT" not in repr(t)


def test_as_arrays():
    t = transform(4, 3)
    for dtype in (np.float32, np.float64, object):
        shapes = [(a.shape, a.dtype) for a in t.as_arrays(dtype)]
        assert shapes == [((4, 6), dtype), ((6, 3), dtype), ((6, 6), dtype)]
    assert t.as_arrays(object)[2][0, 2] == Fraction(-97, 36)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "transform F(0, 3): m must be an integer of at least 1, got 0"),
        ((2, -1), "transform F(2, -1): r must be an integer of at least 1, got -1"),
        ((2.0, 3), "transform F(2.0, 3): m must be an integer of at least 1, got 2.0"),
        ((True, 3), "transform F(True, 3): m must be an integer of at least 1, got True"),
        (
            (4, 3, (0, 1, -1, 2)),
            "transform F(4, 3): needs 5 distinct finite points, got 4: 0, 1, -1, 2",
        ),
        (
            (2, 3, (0, 1, "2/2")),
            "transform F(2, 3): needs 3 distinct finite points, got 3 of which 2 distinct: 0, 1, 1",
        ),
        ((2, 3, ()), "transform F(2, 3): needs 3 distinct finite points, got 0: none"),
        ((4, 1, (0, 1)), "transform F(4, 1): needs 0 distinct finite points, got 2: 0, 1"),
        (
            (2, 3, (0, 1, float("inf"))),
            "transform F(2, 3): points must be finite rational numbers, got [0, 1, inf]",
        ),
        (
            (2, 3, (0, 1, "x")),
            "transform F(2, 3): points must be finite rational numbers, got [0, 1, 'x']",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(GeometryError) as caught:
        transform(*arguments)
    assert str(caught.value) == message


def test_describe():
    text = describe(transform(2, 3))
    assert text.splitlines()[:3] == [
        "F(2, 3): 4 multiplications (alpha) for 2 outputs of 3 taps "
        "instead of 6, a saving of 33.3%",
        "points: 0, 1, -1, infinity",
        "amplification of rounding errors: 1.29 in 1D, 1.67 in 2D, 2.15 in 3D",
    ]
    assert "BT, input transform, 4 x 4: 4 additions, 0 shifts, 0 multiplications" in text
    assert "  1/2  -1/2  1/2" in text
    assert "points: none needed" in describe(transform(1, 3))
