"""Extents are PyTorch's on every valid random geometry; every invalid one has its exact message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import geometries
from fastconv.errors import GeometryError
from fastconv.geometry import Geometry, SeparableGeometry

torch = pytest.importorskip("torch")


@given(geometries(max_kernel=4, max_stride=3, max_dilation=3, max_size=12))
def test_extents_are_pytorchs(g):
    before = [p[0] for p in g.padding]
    extra = [(0, b - a) if b > a else (a - b, 0) for a, b in g.padding]
    symmetric = [min(p) for p in g.padding]
    x = torch.empty(g.x_shape, device="meta")
    # PyTorch pads symmetrically; the rest of an asymmetric padding is part of the input.
    x = torch.nn.functional.pad(x, [p for pair in reversed(extra) for p in pair])
    w = torch.empty(g.w_shape, device="meta")
    conv = getattr(torch.nn.functional, f"conv{g.n}d")
    y = conv(x, w, None, g.stride, symmetric, g.dilation, g.groups)
    assert tuple(y.shape) == g.y_shape
    assert len(before) == g.n


@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.sampled_from(["same", "valid"]),
)
def test_padding_by_name_is_pytorchs(size, kernel, name):
    try:
        want = torch.nn.functional.conv3d(
            torch.empty(1, 1, *size, device="meta"),
            torch.empty(1, 1, *kernel, device="meta"),
            padding=name,
        ).shape
    except RuntimeError:
        want = None
    try:
        got = Geometry.of((1, 1, *size), (1, 1, *kernel), padding=name).y_shape
    except GeometryError:
        got = None
    assert got == (None if want is None else tuple(want))


def test_lifted_adds_leading_axes():
    g = Geometry.of((2, 4, 9), (6, 2, 3), 2, 1, 1, 2).lifted()
    assert (g.in_size, g.kernel, g.stride, g.padding) == (
        (1, 1, 9),
        (1, 1, 3),
        (1, 1, 2),
        ((0, 0), (0, 0), (1, 1)),
    )
    assert g.y_shape == (2, 6, 1, 1, 5)


def test_unbatched_and_macs():
    g = Geometry.of((24, 8, 10, 12), (48, 24, 3, 3, 3), padding=1)
    assert g.y_shape == (1, 48, 8, 10, 12)
    assert g.macs == 48 * 8 * 10 * 12 * 24 * 27


X, W = (1, 24, 8, 8, 8), (24, 24, 3, 3, 3)
INVALID = [
    (
        (X, (24, 4, 3, 3, 3)),
        dict(groups=4),
        "conv3d: weight expects 4 input channels per group, "
        "input has 24 channels in 4 groups (6 per group)",
    ),
    (
        (X, (24, 23, 3, 3, 3)),
        {},
        "conv3d: weight expects 23 input channels per group, "
        "input has 24 channels in 1 group (24 per group)",
    ),
    (
        (X, (24, 4, 3, 3, 3)),
        dict(groups=5),
        "conv3d: 24 input channels do not divide into 5 groups",
    ),
    (
        (X, (25, 4, 3, 3, 3)),
        dict(groups=6),
        "conv3d: 25 output channels do not divide into 6 groups",
    ),
    (
        (X, (24, 24)),
        {},
        "conv: weight must have 3, 4 or 5 dimensions (1, 2 or 3 axes), got shape (24, 24)",
    ),
    (
        ((24, 8), W),
        {},
        "conv3d: input must have 5 dimensions (batch, channels, 3 axes) "
        "or 4 without a batch, got shape (24, 8)",
    ),
    ((X, W), dict(stride=0), "conv3d: stride must be an integer of at least 1, got 0"),
    ((X, W), dict(stride=1.0), "conv3d: stride must be an integer of at least 1, got 1.0"),
    ((X, W), dict(stride=(1, 2)), "conv3d: stride must be an int or 3 ints, got (1, 2)"),
    ((X, W), dict(dilation=-1), "conv3d: dilation must be an integer of at least 1, got -1"),
    ((X, W), dict(groups=True), "conv3d: groups must be an integer of at least 1, got True"),
    ((X, W), dict(padding=-1), "conv3d: padding must be an integer of at least 0, got -1"),
    (
        (X, W),
        dict(padding="full"),
        "conv3d: padding must be 'same', 'valid', an int or 3 ints, got 'full'",
    ),
    (
        (X, W),
        dict(padding="same", stride=2),
        "conv3d: padding 'same' needs stride 1 on every axis, got stride (2, 2, 2)",
    ),
    (
        (X, W),
        dict(padding=((1, 1), (1, 1))),
        "conv3d: padding pairs must be 3 times (before, after), got ((1, 1), (1, 1))",
    ),
    (
        (X, W),
        dict(dilation=(1, 1, 5)),
        "conv3d: axis 2 has 8 inputs and padding (0, 0), "
        "but kernel 3 with dilation 5 needs at least 11",
    ),
    (
        ((1, 0, 8), (4, 0, 3)),
        {},
        "conv1d: channels and kernel must be at least 1, got 0 input channels and weight (4, 0, 3)",
    ),
    (
        ((2**31, 2**20, 2**9, 1, 1), (1, 2**20, 1, 1, 1)),
        {},
        "conv3d: input (2147483648, 1048576, 512, 1, 1) or output (2147483648, 1, 512, 1, 1) "
        "exceeds 2^63 bytes of float64",
    ),
]


@pytest.mark.parametrize(("shapes", "options", "message"), INVALID)
def test_message_of_every_invalid_geometry(shapes, options, message):
    with pytest.raises(GeometryError) as error:
        Geometry.of(*shapes, **options)
    assert str(error.value) == message


WT, WD, WP = (8, 4, 3, 1, 1), (8, 1, 1, 3, 3), (16, 8, 1, 1, 1)


def test_separable_stages():
    g = SeparableGeometry.of((1, 4, 8, 10, 10), WT, WD, WP, stride=(2, 1, 2))
    assert [s.y_shape for s in g.stages] == [(1, 8, 4, 10, 10), (1, 8, 4, 10, 5), (1, 16, 4, 10, 5)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((8, 4, 3, 3, 1), WD, WP),
            "separable_block: temporal weight must have shape (M, C, KT, 1, 1), "
            "got (8, 4, 3, 3, 1)",
        ),
        (
            (WT, (8, 2, 1, 3, 3), WP),
            "separable_block: depthwise weight must have shape (M, 1, 1, KH, KW), "
            "got (8, 2, 1, 3, 3)",
        ),
        (
            (WT, WD, (16, 8)),
            "separable_block: pointwise weight must have shape (K, M, 1, 1, 1), got (16, 8)",
        ),
        (
            (WT, (4, 1, 1, 3, 3), WP),
            "separable_block: temporal stage makes 8 channels, "
            "but depthwise weight has 4 and pointwise weight expects 8",
        ),
        (
            ((8, 5, 3, 1, 1), WD, WP),
            "separable_block (temporal): weight expects 5 input channels per group, "
            "input has 4 channels in 1 group (4 per group)",
        ),
    ],
)
def test_message_of_every_invalid_block(shapes, message):
    with pytest.raises(GeometryError) as error:
        SeparableGeometry.of((1, 4, 8, 10, 10), *shapes)
    assert str(error.value) == message
