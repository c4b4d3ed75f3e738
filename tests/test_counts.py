"""Analytic counts equal counted operations; networks and papers come out to the digit."""

from __future__ import annotations

import csv
from dataclasses import astuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import geometries
from counting import Tally, counting_array
from fastconv.backends import kernel
from fastconv.counts import (
    Counts,
    count,
    fewest_multiplications,
    network_counts,
    of_plan,
    taps_per_phase,
)
from fastconv.epilogue import Epilogue
from fastconv.errors import GeometryError, UnsupportedError
from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.plan import Plan
from fastconv.reference import direct, hfa, winograd
from fastconv.transforms import transform

small = {"max_size": 5, "max_channels": 2}  # every scalar operation is a Python call
few = settings(max_examples=15)
NONE = (Epilogue(),) * 3


def counted(tally: Tally, *shapes, seed=0) -> list[np.ndarray]:
    """One array of counting integers per shape."""
    return [
        counting_array(np.random.default_rng([seed, i, *shape]).integers(-4, 5, shape), tally)
        for i, shape in enumerate(shapes)
    ]


def operations(tally: Tally) -> tuple[int, int, int]:
    """Multiplications by constants, additions, shifts."""
    return tally.multiplications - tally.products, tally.additions, tally.shifts


def of_transforms(c: Counts) -> tuple[int, int, int]:
    return c.transform_multiplications, c.transform_additions, c.transform_shifts


def of_filter_transform(c: Counts) -> tuple[int, int, int]:
    return (
        c.filter_transform_multiplications,
        c.filter_transform_additions,
        c.filter_transform_shifts,
    )


def values(array: np.ndarray) -> list:
    return [v.value for v in array.ravel()]


def transforms_for(taps, tiles):
    return tuple(transform(m, r) for m, r in zip(tiles, taps, strict=True))


def tiles(n: int):
    return st.lists(st.integers(1, 4), min_size=n, max_size=n)


@few
@given(st.data(), st.sampled_from(("grouped", "depthwise")))
def test_direct_families_multiply_once_per_mac(data, family):
    g = data.draw(geometries(family=family, **small))
    tally, plan = Tally(), Plan(family, "reference", g)
    x, w = counted(tally, g.x_shape, g.w_shape)
    y = np.empty(g.y_shape, dtype=object)
    module = kernel(family, "reference")
    module.run(plan, x, module.prepack(w, plan), None, None, y, None)
    assert tally.products == of_plan(plan).multiplications == of_plan(plan).macs == g.macs
    assert (tally.multiplications, tally.shifts) == (tally.products, 0)


@few
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 4))
def test_a_continual_step_multiplies_once_per_mac_of_its_window(taps, dilation, groups, frames):
    ring = dilation * (taps - 1)
    window = Geometry.of(
        (1, 2, ring + 1, 3, 3),
        (2, 2 // groups, taps, 2, 3),
        padding=(0, 1, 1),
        dilation=(dilation, 1, 1),
        groups=groups,
    )
    tally, plan = Tally(), Plan("continual", "reference", window)
    w, state = counted(tally, window.w_shape, (1, 2, ring, 3, 3))
    steps, y = np.zeros(1, np.int64), np.empty((1, 2, *window.out_size[1:]), dtype=object)
    for t in range(frames):
        (x,) = counted(tally, (1, 2, 3, 3), seed=t)
        kernel("continual", "reference").run(plan, x, w, None, None, state, steps, y, None)
    assert tally.products == frames * of_plan(plan).multiplications
    assert of_plan(plan).macs == window.macs


@few
@given(st.data())
def test_winograd_counts_are_counted(data):
    g = data.draw(geometries(family="winograd", **small))
    ts = transforms_for(taps_per_phase(g), data.draw(tiles(g.n)))
    c, tally = count(g, "winograd", ts), Tally()
    x, w = counted(tally, g.x_shape, g.w_shape)

    u = winograd.filter_transform(w, ts, g)
    assert operations(tally) == of_filter_transform(c)
    assert 4 * u.size == c.weight_bytes
    tally.reset()
    v = winograd.input_transform(x, ts, g)
    into = tally.additions
    m = winograd.multiply(u, v, g.n)
    sums, tally.additions = tally.additions - into, into
    y = winograd.output_transform(m, ts, g)
    assert operations(tally) == of_transforms(c)
    assert tally.products == c.multiplications
    assert sums == c.multiplications - m.size
    assert values(y) == values(direct.correlate(x, w, g))


@st.composite
def separable_geometries(draw):
    """A small fully separable block: every stage has its own sizes, strides and paddings."""
    channels, middle, outs, kt, kh, kw = (draw(st.integers(1, high)) for high in (2, 3, 2, 3, 3, 3))
    padding = tuple(draw(st.tuples(st.integers(0, 1), st.integers(0, 2))) for _ in range(3))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(3))
    size = tuple(draw(st.integers(3, 5)) for _ in range(3))
    x_shape = (draw(st.integers(0, 2)), channels, *size)
    wt, wd, wp = (middle, channels, kt, 1, 1), (middle, 1, 1, kh, kw), (outs, middle, 1, 1, 1)
    return SeparableGeometry.of(x_shape, wt, wd, wp, stride, padding)


@few
@given(st.data())
def test_hfa_counts_are_counted(data):
    g = data.draw(separable_geometries())
    taps = (taps_per_phase(g.temporal)[0], *taps_per_phase(g.depthwise)[1:])
    ts = transforms_for(taps, data.draw(tiles(3)))
    plan = Plan("hfa", "reference", g, epilogue=NONE, transforms=ts)
    c, tally = of_plan(plan), Tally()
    x, *ws = counted(tally, g.x_shape, *(stage.w_shape for stage in g.stages))

    packed = hfa.prepack(tuple(ws), plan)
    assert operations(tally) == of_filter_transform(c)
    assert 4 * sum(part.size for part in packed) == c.weight_bytes
    tally.reset()
    y = np.empty(g.y_shape, dtype=object)
    hfa.run(plan, x, packed, (None,) * 3, None, y, None)
    assert tally.products == c.multiplications
    tally.additions -= hfa_sums(g, ts)
    assert operations(tally) == of_transforms(c)
    want = x
    for stage, w in zip(g.stages, ws, strict=True):
        want = direct.correlate(want, w, stage)
    assert values(y) == values(want)


def hfa_sums(g: SeparableGeometry, transforms) -> int:
    """Additions of products: in each sum one less than there are products."""
    sums = 0
    for stage, ts in zip(g.stages, [*hfa.stage_transforms(transforms), None], strict=True):
        if ts is None:
            sums += stage.macs - int(np.prod(stage.y_shape))
            continue
        results = stage.batch * stage.out_channels
        for t, p in zip(ts, winograd.tiles(stage, ts), strict=True):
            results *= t.alpha * p
        terms = len(winograd.phases(stage)) * (stage.in_channels // stage.groups)
        sums += results * (terms - 1)
    return sums


@pytest.mark.parametrize("taps", range(1, 8))
@pytest.mark.parametrize("m", range(1, 7))
def test_saving_in_one_axis(m, taps):
    g = Geometry.of((1, 3, 3 * m + taps - 1), (2, 3, taps))
    c = count(g, "winograd", [transform(m, taps)])
    assert c.saving == Fraction(m * taps - m - taps + 1, m * taps)


@given(st.data())
def test_ideal_tiles_are_whole_tiles_where_these_fit_and_fewer_where_not(data):
    g = data.draw(geometries(family="winograd"))
    ts = transforms_for(taps_per_phase(g), data.draw(tiles(g.n)))
    whole, ideal = (count(g, "winograd", ts, whole_tiles=w) for w in (True, False))
    if all(o % t.m == 0 for o, t in zip(g.out_size, ts, strict=True)):
        assert whole == ideal
        assert all(isinstance(v, int) for v in astuple(ideal))
    else:
        assert all(i <= w for i, w in zip(astuple(ideal), astuple(whole), strict=True))


# C3D at 3 x 64 x 112 x 112: output channels and input extents of its convolutions.
C3D = (
    (64, 64, 112), (128, 64, 56), (256, 32, 28), (256, 32, 28),
    (512, 16, 14), (512, 16, 14), (512, 8, 7), (512, 8, 7),
)  # fmt: skip


def c3d_layers():
    channels = 3
    for outs, frames, size in C3D:
        yield Geometry.of((1, channels, frames, size, size), (outs, channels, 3, 3, 3), padding=1)
        channels = outs


@pytest.mark.parametrize(("whole_tiles", "want"), [(False, 19_248_316_416), (True, 20_734_672_896)])
def test_c3d_under_winograd_in_three_axes(whole_tiles, want):
    f43 = [transform(4, 3)] * 3
    total = sum(count(g, "winograd", f43, whole_tiles=whole_tiles) for g in c3d_layers())
    assert (total.macs, total.multiplications) == (153_986_531_328, want)


@pytest.mark.parametrize(
    ("ms", "want"),
    # The latter is 14,695,981,738 and two thirds.
    [((4, 4, 4), 15_406_741_504), ((6, 4, 4), Fraction(44_087_945_216, 3))],
)
def test_c3d_as_fully_separable_blocks(ms, want):
    """As many middle channels as input channels, the first convolution as a block of 64."""
    apart, fused = Counts(), Counts()
    for g in c3d_layers():
        channels, middle = g.in_channels, max(g.in_channels, 64)
        wt, wd, wp = (middle, channels, 3), (middle, 1, 1, 3, 3), (g.out_channels, middle, 1, 1, 1)
        block = SeparableGeometry.of(g.x_shape, (*wt, 1, 1), wd, wp)
        apart += count(block)
        fused += count(block, "hfa", [transform(m, 3) for m in ms], whole_tiles=False)
    assert (apart.macs, apart.multiplications) == (22_321_094_656, 22_321_094_656)
    assert (fused.macs, fused.multiplications) == (22_321_094_656, want)


def test_bytes_and_intensity():
    g = Geometry.of((2, 3, 8), (5, 3, 3), padding=1)
    plain = count(g)
    assert plain.weight_bytes == 4 * 5 * 3 * 3
    assert plain.activation_bytes == 4 * (2 * 3 * 8 + 2 * 5 * 8)
    assert plain.arithmetic_intensity == 2 * (2 * 5 * 8 * 9) / (4 * (45 + 128))
    assert count(g, dtype="bfloat16").weight_bytes == 90
    fast = count(g, "winograd", [transform(4, 3)], "float64", residual=True)
    assert (fast.weight_bytes, fast.activation_bytes) == (8 * 5 * 3 * 6, 8 * (48 + 80 + 80))
    assert fast.arithmetic_intensity == 2 * (2 * 5 * 3 * 2 * 6) / (8 * (90 + 208))


def test_a_fused_block_does_not_move_what_is_between_its_stages():
    g = SeparableGeometry.of((1, 2, 4, 4, 4), (3, 2, 3, 1, 1), (3, 1, 1, 3, 3), (5, 3, 1, 1, 1))
    ends, between = 64 * (2 + 5), 64 * (3 + 3 + 3 + 3)
    assert count(g).activation_bytes == 4 * (ends + between)
    assert count(g, "hfa", [transform(2, 3)] * 3).activation_bytes == 4 * ends
    last = (Epilogue(), Epilogue(), Epilogue(residual=True))
    plan = Plan("hfa", "reference", g, epilogue=last, transforms=(transform(2, 3),) * 3)
    assert of_plan(plan).activation_bytes == 4 * (ends + 64 * 5)


def test_counts_add_up():
    a = count(Geometry.of((1, 1, 5), (1, 1, 3)), "winograd", [transform(2, 3)], whole_tiles=False)
    assert a.multiplications == 6
    assert isinstance(a.multiplications, int)
    b = count(Geometry.of((1, 1, 5), (1, 1, 2)), "winograd", [transform(3, 2)], whole_tiles=False)
    assert b.multiplications == Fraction(16, 3)
    assert sum([a, b, b, b]) == a + b + b + b
    assert (a + b + b + b).multiplications == 22
    assert Counts().saving == 0
    assert Counts().arithmetic_intensity == 0
    with pytest.raises(TypeError):
        a + 1


G3 = Geometry.of((1, 4, 8, 8, 8), (4, 4, 3, 3, 3), stride=(1, 2, 2))
BLOCK = SeparableGeometry.of((1, 2, 4, 4, 4), (3, 2, 3, 1, 1), (3, 1, 1, 3, 3), (5, 3, 1, 1, 1))
F23 = transform(2, 3)
INVALID = [
    (
        (G3, "winograd", [F23] * 3),
        "count: winograd needs transforms F(m, r) with r = (3, 2, 2), got r = (3, 3, 3)",
    ),
    (
        (BLOCK, "hfa", [F23]),
        "count: hfa needs transforms F(m, r) with r = (3, 3, 3), got r = (3,)",
    ),
    ((G3, "direct", [F23]), "count: algorithm 'direct' takes no transforms, got 1"),
]
UNSUPPORTED = [
    (
        (G3, "fft"),
        "count: unknown algorithm 'fft'. "
        "Known: direct, grouped, depthwise, continual, winograd, hfa",
    ),
    (
        (G3, "direct", (), "int8"),
        "count: dtype 'int8' is not one of float16, bfloat16, float32, float64",
    ),
    (
        (BLOCK, "winograd", [F23] * 3),
        "count: 'hfa' is for a SeparableGeometry, 'winograd' for a Geometry",
    ),
    (
        (Geometry.of((1, 4, 9), (4, 2, 3), groups=2), "winograd", [F23]),
        "count: winograd is for one group, not 2",
    ),
    (
        (Geometry.of((1, 4, 9), (4, 4, 3), dilation=2), "winograd", [F23]),
        "count: winograd is for dilation 1, not (2,)",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [(a, GeometryError, m) for a, m in INVALID]
    + [(a, UnsupportedError, m) for a, m in UNSUPPORTED],
)
def test_what_is_not_counted(arguments, error, message):
    with pytest.raises(error) as caught:
        count(*arguments)
    assert str(caught.value) == message


def test_the_tiles_chosen_take_the_fewest_multiplications():
    g = Geometry.of((1, 64, 16, 28, 28), (64, 64, 3, 3, 3), padding=1)
    chosen = fewest_multiplications(g, (2, 4))
    assert [t.m for t in chosen] == [4, 4, 4]
    one_channel = Geometry.of((1, 1, 16, 28, 28), (1, 1, 3, 3, 3), padding=1)
    chosen = fewest_multiplications(one_channel, (2, 4))
    assert [t.m for t in chosen] == [2, 2, 2], "the transforms of F(4, 3) multiply, too"
    assert fewest_multiplications(g, ()) == ()
    assert fewest_multiplications(Geometry.of((1, 64, 99), (64, 64, 8))) == ()
    assert fewest_multiplications(Geometry.of((1, 64, 9), (64, 1, 3), groups=64)) == ()
    assert fewest_multiplications(Geometry.of((1, 64, 9), (64, 64, 1))) == ()


ORACLE = Path(__file__).parent / "data" / "oracle.csv"
SIZES = {
    "x3d_xs": (4, 160, 160),
    "x3d_s": (13, 160, 160),
    "x3d_m": (16, 224, 224),
    "x3d_l": (16, 312, 312),
}


def oracle(model: str, quantity: str, variant: str = "") -> int:
    with ORACLE.open() as file:
        (row,) = (
            r for r in csv.DictReader(file)
            if (r["model"], r["quantity"], r["variant"]) == (model, quantity, variant)
        )  # fmt: skip
    return int(row["measured_from_original_code"])


def on_meta(build, shape):
    torch = pytest.importorskip("torch")
    from fastconv.nn.trace import trace

    with torch.device("meta"):
        model = build()
        return model, trace(model, torch.empty(1, *shape))


@pytest.mark.parametrize("name", SIZES)
def test_x3d_is_counted_as_its_oracle(name):
    zoo = pytest.importorskip("fastconv.zoo")
    model, layers = on_meta(lambda: zoo.build(name), (3, *SIZES[name]))
    parameters = sum(p.numel() for p in model.parameters())
    *rows, total = network_counts(layers, parameters=parameters)
    printed = name.upper().replace("_", "-")
    assert total.parameters == sum(row.parameters for row in rows) == oracle(printed, "params")
    assert total.counts.macs == oracle(printed, "macs")
    assert total.counts == sum(row.counts for row in rows)
    assert [row.name for row in rows] == [*(layer.name for layer in layers), "(other)"]
    dense = {row.name for row in rows if row.algorithm.startswith("winograd")}
    assert dense == {"stem.space"}, "every other convolution of X3D is pointwise or depthwise"


def test_c3d_is_counted_as_its_oracle():
    zoo = pytest.importorskip("fastconv.zoo")
    _, layers = on_meta(lambda: zoo.build("c3d").trunk, (3, 64, 112, 112))
    weights = sum(np.prod(layer.w_shape) for layer in layers)
    assert weights == oracle("C3D", "params", "conv weights")
    total = network_counts(layers, tiles=())[-1]
    assert total.counts.macs == total.counts.multiplications == oracle("C3D", "macs", "baseline")
    f43 = (transform(4, 3),) * 3
    plans = {
        layer.name: Plan("winograd", "reference", layer.geometry, transforms=f43)
        for layer in layers
    }
    *rows, total = network_counts(layers, plans=plans)
    assert {row.algorithm for row in rows} == {"winograd F(4x4x4, 3x3x3)"}
    assert total.counts.multiplications == 20_734_672_896


def test_every_call_counts_and_every_parameter_once():
    torch = pytest.importorskip("torch")

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = torch.nn.Conv2d(4, 4, 3, padding=1)
            self.up = torch.nn.ConvTranspose2d(4, 2, 2, 2)
            self.last = torch.nn.Linear(16, 5)

        def forward(self, x):
            return self.last(self.up(self.twice(self.twice(x))))

    _, layers = on_meta(Odd, (4, 8, 8))
    first, second, up, last, total = network_counts(layers, tiles=())
    assert (first.parameters, second.parameters, up.parameters, last.parameters) == (148, 0, 34, 85)
    assert total.parameters == 148 + 34 + 85
    assert first.counts == second.counts
    macs = (64 * 4 * 4 * 9, 64 * 4 * 2 * 4, 2 * 16 * 16 * 5)
    assert (first.counts.macs, up.counts.macs, last.counts.macs) == macs
    assert last.counts.activation_bytes == 4 * (2 * 16 * 16 + 2 * 16 * 5)
    assert last.counts.weight_bytes == 4 * 16 * 5
    assert total.counts.macs == 2 * macs[0] + macs[1] + macs[2]
