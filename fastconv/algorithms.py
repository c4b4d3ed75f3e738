"""Each algorithm's arithmetic of one convolution, and a convolution as one step of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from .counts import MAX_TAPS, TILES, Counts, Number, count, fast_counts, winograd_refusal
from .geometry import Geometry
from .transforms import Transform, transform

# Axes from the right: Winograd's algorithm over time alone, over space, over both.
WINOGRAD_1D, WINOGRAD_2D, WINOGRAD_3D = "winograd 1D", "winograd 2D", "winograd 3D"
HFA = "hfa"
COMPARED = (WINOGRAD_1D, WINOGRAD_2D, WINOGRAD_3D, HFA)


@dataclass(frozen=True)
class Choice:
    """An algorithm's cheapest tiles on one convolution; no transforms where it stays direct."""

    transforms: tuple[Transform, ...]
    counts: Counts


def compare(
    geometry: Geometry | None,
    direct: Counts,
    tiles: Sequence[int] = TILES,
    dtype: str = "float32",
    whole_tiles: bool = True,
) -> dict[str, Choice]:
    """The counts under each of COMPARED, direct where an algorithm does not serve the convolution.

    winograd 1D  F(m, r) over time, the only axis of a 1D convolution
    winograd 2D  over height and width
    winograd 3D  over all three
    hfa          the hybrid fast algorithm of arXiv 1905.13388: K x 1 x 1 over time, 1 x R x S over
                 space, any groups, stride 1; a fully separable block is made of these

    geometry  None for a linear layer, which stays direct
    direct    the counts of the direct algorithm
    """
    unchanged = Choice((), direct)
    found = dict.fromkeys(COMPARED, unchanged)
    if geometry is None:
        return found
    for name, axes in _winograd_axes(geometry).items():
        if winograd_refusal(geometry) is None:
            found[name] = _cheapest(geometry, axes, tuple(tiles), dtype, whole_tiles, direct)
    axes = hybrid_axes(geometry)
    if axes:
        found[HFA] = _cheapest(geometry, axes, tuple(tiles), dtype, whole_tiles, direct)
    return found


def hybrid_axes(geometry: Geometry) -> tuple[int, ...]:
    """The axes that the hybrid fast algorithm transforms: time, space, or none."""
    plain = set(geometry.stride) == {1} and set(geometry.dilation) == {1}
    if not plain or geometry.n != 3:
        return ()
    time, *space = geometry.kernel
    if set(space) == {1}:
        return (0,) if time > 1 else ()
    return (1, 2) if time == 1 else ()


def under(
    geometry: Geometry,
    ms: Sequence[int],
    dtype: str = "float32",
    whole_tiles: bool = True,
) -> Counts:
    """The counts under F(m, r) with this m on each axis, 1 where an axis is not transformed."""
    taps = [-(-k // s) for k, s in zip(geometry.kernel, geometry.stride, strict=True)]
    if all(m == 1 for m in ms):
        return count(geometry, dtype=dtype)
    return fast_counts(geometry, tuple(map(transform, ms, taps)), dtype, whole_tiles)


def step_of(geometry: Geometry) -> Geometry:
    """The same convolution on one step of a stream: the frames that one output frame is made of.

    A convolution that is not over time, or strided in it, is one step where it has an output.
    """
    if geometry.n != 3:
        return geometry
    frames = geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
    window = (frames, *geometry.in_size[1:])
    return replace(
        geometry,
        in_size=window,
        padding=((0, 0), *geometry.padding[1:]),
    )


def _winograd_axes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    if geometry.n == 1:
        return {WINOGRAD_1D: (0,)}
    if geometry.n == 2:
        return {WINOGRAD_2D: (0, 1)}
    return {WINOGRAD_1D: (0,), WINOGRAD_2D: (1, 2), WINOGRAD_3D: (0, 1, 2)}


def _cheapest(
    geometry: Geometry,
    axes: tuple[int, ...],
    tiles: tuple[int, ...],
    dtype: str,
    whole_tiles: bool,
    direct: Counts,
) -> Choice:
    """Fewest element-wise multiplications, as the papers compare; then fewest other operations."""
    transforms = _fewest(geometry, axes, tiles, whole_tiles)
    if not transforms:
        return Choice((), direct)
    return Choice(transforms, fast_counts(geometry, transforms, dtype, whole_tiles))


@lru_cache(maxsize=4096)
def _fewest(
    geometry: Geometry, axes: tuple[int, ...], tiles: tuple[int, ...], whole_tiles: bool
) -> tuple[Transform, ...]:
    taps = [-(-k // s) for k, s in zip(geometry.kernel, geometry.stride, strict=True)]
    allowed = [
        (1, *tiles) if axis in axes and 1 < r <= MAX_TAPS else (1,) for axis, r in enumerate(taps)
    ]
    best: tuple[Transform, ...] = ()
    least: tuple[Number, Number] = (geometry.macs, 0)
    for ms in product(*allowed):
        if all(m == 1 for m in ms):
            continue
        transforms = tuple(map(transform, ms, taps))
        c = fast_counts(geometry, transforms, "float32", whole_tiles)
        others = c.transform_multiplications + c.transform_additions + c.transform_shifts
        if (c.multiplications, others) < least:
            best, least = transforms, (c.multiplications, others)
    return best
