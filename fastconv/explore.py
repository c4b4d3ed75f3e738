"""`python -m fastconv explore`: the tiles of a network, error bound against multiplications.

The space is that of the hybrid fast algorithm (arXiv 1905.13388): F(m1, K) over time and
F(m2 x m2, R x R) over space, one pair for the whole network, as one array of multipliers has it.
Beside it stands the exact Pareto front of layers that each have a pair of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import log2, prod

from .counts import MAX_TAPS, Counts, Number, count, fast_counts, taps_per_phase
from .geometry import Geometry
from .transforms import Transform, amplification, error_factor, transform

Pair = tuple[int, int]
DIRECT: Pair = (1, 1)


@dataclass(frozen=True)
class Option:
    """One convolution under one pair of tiles; no transforms where it stays direct.

    error  bound on the rms error of its outputs over that of plain sums in the same precision
    """

    transforms: tuple[Transform, ...]
    counts: Counts
    error: float


@dataclass(frozen=True)
class Design:
    """A network under tiles: what it multiplies, and the largest error bound of its layers.

    tiles   (m1, m2) of every layer, or None where each has its own
    layers  the option of each convolution, in order
    rest    the counts of linear layers and convolutions that no algorithm here serves
    """

    tiles: Pair | None
    layers: tuple[Option, ...]
    rest: Counts

    @property
    def counts(self) -> Counts:
        return sum((option.counts for option in self.layers), self.rest)

    @property
    def multiplications(self) -> Number:
        return self.counts.multiplications

    @property
    def error(self) -> float:
        return max((option.error for option in self.layers), default=1.0)

    @property
    def bits(self) -> float:
        """Bits by which stored transformed operands must be longer for the same error."""
        worst = max((amplification(option.transforms) for option in self.layers), default=1.0)
        return log2(worst)


@dataclass(frozen=True)
class Space:
    """All that was explored.

    uniform   one design per pair of tiles, by falling multiplications; (1, 1) is direct
    frontier  designs of least multiplications at their error bound, by falling multiplications,
              each layer with a pair of its own
    """

    geometries: tuple[Geometry, ...]
    uniform: tuple[Design, ...]
    frontier: tuple[Design, ...]

    def within(self, limit: float) -> tuple[Design, Design]:
        """The uniform design and the mixed one of fewest multiplications at this error bound."""
        return _fewest(self.uniform, limit), _fewest(self.frontier, limit)

    def pareto(self) -> tuple[Design, ...]:
        """The uniform designs that none has fewer multiplications than at no larger error bound."""
        best: list[Design] = []
        for design in sorted(self.uniform, key=lambda d: (d.error, d.multiplications)):
            if not best or design.multiplications < best[-1].multiplications:
                best.append(design)
        return tuple(best)


def explore(
    geometries: Sequence[Geometry], rest: Counts, tiles: Sequence[int], whole_tiles: bool = True
) -> Space:
    """Every pair of tiles for a network's convolutions.

    rest   the counts of everything else in it
    tiles  the m allowed on an axis; 1 always is
    """
    ms = tuple(sorted({1, *tiles}))
    pairs: list[Pair] = list(product(ms, ms))
    distinct = dict.fromkeys(geometries)
    table = {(g, pair): _option(g, pair, whole_tiles) for g in distinct for pair in pairs}
    uniform = [Design(pair, tuple(table[g, pair] for g in geometries), rest) for pair in pairs]
    uniform.sort(key=lambda design: (-design.multiplications, design.error))
    limits = sorted({1.0, *(option.error for option in table.values())})
    found: list[Design] = []
    for limit in limits:
        choice = {g: _best((table[g, pair] for pair in pairs), limit) for g in distinct}
        design = Design(None, tuple(choice[g] for g in geometries), rest)
        if not found or design.multiplications < found[-1].multiplications:
            found.append(design)
    return Space(tuple(geometries), tuple(uniform), tuple(found))


def _best(options: Iterable[Option], limit: float) -> Option:
    allowed = [option for option in options if option.error <= limit]
    return min(allowed, key=lambda option: (option.counts.multiplications, option.error))


def _fewest(designs: Sequence[Design], limit: float) -> Design:
    allowed = [design for design in designs if design.error <= limit]
    return min(allowed, key=lambda design: (design.multiplications, design.error))


@lru_cache(maxsize=8192)
def _option(geometry: Geometry, pair: Pair, whole_tiles: bool) -> Option:
    """A pair of tiles, or the direct algorithm where that multiplies no more."""
    direct = count(geometry)
    taps, ms = taps_per_phase(geometry), _per_axis(geometry.n, pair)
    transforms = tuple(
        transform(m if 1 < r <= MAX_TAPS else 1, r) for m, r in zip(ms, taps, strict=True)
    )
    if set(geometry.dilation) != {1} or all(t.m == 1 for t in transforms):
        return Option((), direct, 1.0)
    counts = fast_counts(geometry, transforms, "float32", whole_tiles)
    if counts.multiplications >= direct.multiplications:
        return Option((), direct, 1.0)
    # The phases of strided axes are summed as channels are.
    phases = prod(map(min, geometry.stride, geometry.kernel))
    channels = phases * geometry.in_channels // geometry.groups
    return Option(transforms, counts, max(1.0, error_factor(transforms, channels)))


def _per_axis(n: int, pair: Pair) -> tuple[int, ...]:
    """m1 on time, m2 on space; one axis is time, two are space."""
    time, space = pair
    return {1: (time,), 2: (space, space), 3: (time, space, space)}[n]
