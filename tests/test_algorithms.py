"""What each algorithm multiplies, for single convolutions and for the papers' networks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import geometries
from fastconv.algorithms import COMPARED, compare, hybrid_axes, step_of, under
from fastconv.counts import count
from fastconv.geometry import Geometry
from fastconv.transforms import transform

G3 = Geometry.of((1, 8, 8, 12, 12), (16, 8, 3, 3, 3), padding=1)


def chosen(geometry, **options):
    return compare(geometry, count(geometry), **options)


def tiles(geometry, **options):
    found = chosen(geometry, **options)
    return {name: tuple(t.m for t in found[name].transforms) for name in COMPARED}


def test_each_algorithm_transforms_its_axes():
    assert tiles(G3) == {
        "winograd 1D": (4, 1, 1),
        "winograd 2D": (1, 4, 4),
        "winograd 3D": (4, 4, 4),
        "hfa": (),
    }
    for name, choice in chosen(G3).items():
        if choice.transforms:
            want = count(G3, "winograd", choice.transforms)
            assert choice.counts == want, name
    assert chosen(G3)["hfa"].counts == count(G3)


@pytest.mark.parametrize(
    ("w_shape", "options", "axes"),
    [
        ((8, 8, 3, 1, 1), {}, (0,)),
        ((8, 1, 1, 3, 3), {"groups": 8}, (1, 2)),
        ((8, 8, 1, 3, 3), {}, (1, 2)),
        ((8, 8, 1, 1, 1), {}, ()),
        ((8, 8, 3, 3, 3), {}, ()),
        ((8, 8, 3, 1, 1), {"stride": (2, 1, 1)}, ()),
        ((8, 8, 3, 1, 1), {"dilation": (2, 1, 1)}, ()),
    ],
)
def test_the_hybrid_algorithm_serves_the_parts_of_a_separable_block(w_shape, options, axes):
    geometry = Geometry.of((1, 8, 8, 12, 12), w_shape, **options)
    assert hybrid_axes(geometry) == axes
    transforms = chosen(geometry, tiles=(4,))["hfa"].transforms
    assert [axis for axis, t in enumerate(transforms) if t.m > 1] == list(axes)


def test_depthwise_convolutions_are_for_the_hybrid_algorithm_alone():
    geometry = Geometry.of((1, 8, 8, 12, 12), (8, 1, 1, 3, 3), groups=8)
    found = tiles(geometry, tiles=(2,))
    assert found == {"winograd 1D": (), "winograd 2D": (), "winograd 3D": (), "hfa": (1, 2, 2)}
    counts = chosen(geometry, tiles=(2,))["hfa"].counts
    assert counts.multiplications == geometry.macs * 16 // 36
    assert counts.activation_bytes == count(geometry).activation_bytes


def test_fewer_axes_have_fewer_algorithms():
    line, plane = Geometry.of((1, 4, 9), (4, 4, 3)), Geometry.of((1, 4, 9, 9), (4, 4, 3, 3))
    assert tiles(line, tiles=(2,))["winograd 1D"] == (2,)
    assert tiles(plane, tiles=(2,))["winograd 2D"] == (2, 2)
    assert tiles(plane, tiles=(2,))["winograd 1D"] == ()
    assert {c.counts for c in compare(None, count(line)).values()} == {count(line)}


def test_tiles_given_are_counted():
    want = count(G3, "winograd", [transform(m, 3) for m in (2, 4, 1)])
    assert under(G3, (2, 4, 1)) == want
    assert under(G3, (1, 1, 1)) == count(G3)


@given(geometries(max_stride=2, max_dilation=2))
def test_no_algorithm_multiplies_more_than_the_direct_one(geometry):
    for choice in chosen(geometry).values():
        assert choice.counts.multiplications <= geometry.macs
        assert choice.counts.macs == geometry.macs


@given(geometries(max_stride=3, max_dilation=3), st.integers(0, 2))
def test_a_step_makes_one_frame(geometry, batch):
    step = step_of(geometry)
    if geometry.n < 3:
        assert step == geometry
        return
    assert step.out_size == (1, *geometry.out_size[1:])
    assert step.macs * geometry.out_size[0] == geometry.macs
    assert (step.kernel, step.stride, step.groups) == (
        geometry.kernel,
        geometry.stride,
        geometry.groups,
    )


CLIP = (64, 112, 112)
NETWORK_TOTALS = [
    # C3D by Winograd's algorithm, F(4x4x4, 3x3x3); as fully separable blocks by the hybrid one; the
    # slow pathway of SlowFast so.
    ("c3d", {"clip": CLIP}, "trunk", "winograd 3D", 19_248_316_416),
    ("fsb_c3d", {"clip": CLIP, "middles": "input"}, "trunk", "hfa", 15_406_741_504),
    ("fsb_c3d", {"clip": CLIP, "middles": "output"}, "trunk", "hfa", 20_479_936_512),
    ("slow_fsb", {}, "", "hfa", 3_978_876_928),
]


@pytest.mark.parametrize(("network", "options", "part", "algorithm", "want"), NETWORK_TOTALS)
def test_the_papers_networks_with_ideal_tiles_of_4(network, options, part, algorithm, want):
    pytest.importorskip("torch")
    from fastconv.published import Reading, given
    from fastconv.targets import of_reading

    layers = of_reading(Reading(network, (3, *CLIP), part, given(**options))).layers()
    total = 0
    for layer in layers:
        if layer.geometry is None:
            total += layer.macs
            continue
        options = {"tiles": (4,), "whole_tiles": False}
        total += chosen(layer.geometry, **options)[algorithm].counts.multiplications
    assert total == want
