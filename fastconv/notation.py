"""A convolution as one word: how the command line writes a layer, and reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .errors import GeometryError
from .geometry import Geometry, SeparableGeometry

EXAMPLE = "conv3d:64-128:3x3x3@16x56x56:p1"
HELP = """\
LAYER is CONV:CHANNELS:KERNEL@SIZE, then in any order the options s stride, p padding (default 0),
d dilation, g groups, n batch (default 1); one number serves every axis:
  conv3d:64-128:3x3x3@16x56x56:p1              64 to 128 channels on 16 frames of 56 x 56
  conv3d:54-54:3x3x3@16x112x112:s1x2x2:p1:g54  depthwise, strided in space
  conv2d:16-32:3x3@56x56:psame                 padding by name: psame, pvalid
  conv1d:8-8:4@100:p1+2                        one zero in front, two behind
  separable:64-64-128:3x3x3@16x56x56           temporal, depthwise, pointwise (default psame)
"""

_LAYER = re.compile(r"(conv[123]d|separable):(\d+(?:-\d+)+):([\dx]+)@([\dx]+)((?::[spdgn][^:]+)*)")


def parse_layer(text: str) -> Geometry | SeparableGeometry:
    """The geometry that a LAYER (see HELP) stands for. Raises GeometryError."""
    match = _LAYER.fullmatch(text)
    if match is None:
        raise GeometryError(f"count: layer {text!r} is not written like {EXAMPLE} (see --help)")
    kind, channels, kernel, size, rest = match.groups()
    options = [option for option in rest.split(":") if option]
    given = {option[0]: _option(text, option) for option in options}
    if len(given) != len(options):
        raise GeometryError(f"count: layer {text!r} has an option twice")
    cs, ks, extent = _integers(text, channels, "-"), _integers(text, kernel), _integers(text, size)
    separable = kind == "separable"
    n, widths = (3, 3) if separable else (int(kind[4]), 2)
    if (len(ks), len(extent), len(cs)) != (n, n, widths):
        raise GeometryError(f"count: {kind} needs {widths} channels and {n} extents, got {text!r}")
    if separable and not given.keys().isdisjoint("dg"):
        raise GeometryError(f"count: separable takes no dilation and no groups, got {text!r}")
    (groups,), (batch,) = given.get("g", (1,)), given.get("n", (1,))
    stride, padding = given.get("s", 1), given.get("p", "same" if separable else 0)
    x_shape = (batch, cs[0], *extent)
    if separable:
        wt, wd = (cs[1], cs[0], ks[0], 1, 1), (cs[1], 1, 1, *ks[1:])
        return SeparableGeometry.of(x_shape, wt, wd, (cs[2], cs[1], 1, 1, 1), stride, padding)
    w_shape = (cs[1], cs[0] // max(groups, 1), *ks)
    if isinstance(padding, tuple) and len(padding) == 1:
        padding *= n  # one (before, after) serves every axis
    return Geometry.of(x_shape, w_shape, stride, padding, given.get("d", 1), groups)


def layer_text(geometry: Geometry) -> str:
    """The LAYER that `parse_layer` reads as this geometry."""

    def option(letter: str, values: Sequence[Any], default: Any) -> str:
        if all(value == default for value in values):
            return ""
        return f":{letter}{by_x(values[:1] if len(set(values)) == 1 else values)}"

    g = geometry
    padding = [
        str(before) if before == after else f"{before}+{after}" for before, after in g.padding
    ]
    parts = (
        f"conv{g.n}d:{g.in_channels}-{g.out_channels}:{by_x(g.kernel)}@{by_x(g.in_size)}",
        option("s", g.stride, 1),
        option("p", padding, "0"),
        option("d", g.dilation, 1),
        option("g", [g.groups], 1),
        option("n", [g.batch], 1),
    )
    return "".join(parts)


def by_x(values: Sequence[Any]) -> str:
    return "x".join(map(str, values))


def _integers(text: str, values: str, separator: str = "x") -> tuple[int, ...]:
    parts = values.split(separator)
    if not all(part.isdecimal() for part in parts):
        raise GeometryError(
            f"count: expected whole numbers joined by {separator!r}, got {values!r} in {text!r}"
        )
    return tuple(map(int, parts))


def _option(text: str, option: str) -> Any:
    letter, value = option[0], option[1:]
    if letter == "p" and value in ("same", "valid"):
        return value
    if letter == "p" and "+" in value:
        pairs = [_integers(text, part, "+") for part in value.split("x")]
        if max(map(len, pairs)) > 2:
            raise GeometryError(
                f"count: expected padding BEFORE+AFTER per axis, got {option!r} in {text!r}"
            )
        return tuple((pair[0], pair[-1]) for pair in pairs)
    numbers = _integers(text, value)
    if letter in "gn" and len(numbers) != 1:
        raise GeometryError(f"count: expected one whole number, got {option!r} in {text!r}")
    return numbers
