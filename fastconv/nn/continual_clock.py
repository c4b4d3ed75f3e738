"""When a value of a continual network exists: the arithmetic of strides, delays and start-up.

A network for clips has at every layer columns j = 0, 1, ... along time. A stream computes the same
columns one by one, each as soon as the last frame that it needs is there. All of that is known
before the first frame, as three numbers per value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from fastconv.errors import UnsupportedError

# wait: a column exists if all frames of its receptive field do; no padding in time at all.
# zeros: the temporal padding in front of the clip is kept; what it costs behind the clip is delay.
# replicate: as if the first frame had been there for ever; the first frame has an output already.
STARTS = ("wait", "zeros", "replicate")
On = bool | np.ndarray  # for all slots alike, or (slots,) bool


@dataclass(frozen=True)
class Clock:
    """Column j is computed with frame `lag + j * rate`, from frames `earliest + j * rate` on.

    begin  the first column that is computed; None if there is none before it (replicate)
    """

    rate: int = 1
    lag: int = 0
    earliest: int = 0
    begin: int | None = 0

    @property
    def receptive_field(self) -> int:
        """Frames that a column depends on."""
        return self.lag - self.earliest + 1

    @property
    def padding(self) -> int:
        """Frames before a column's own that it depends on."""
        return -self.earliest

    @property
    def warm_up(self) -> int:
        """Frames that pass before the first column."""
        return 0 if self.begin is None else max(self.lag + self.begin * self.rate, 0)

    def column(self, seen: int) -> int:
        """The column computed with frame number `seen`, or the last one before."""
        return (seen - self.lag) // self.rate

    def on(self, seen: int) -> bool:
        """Whether frame number `seen`, the first being 0, brings a column."""
        column, rest = divmod(seen - self.lag, self.rate)
        return rest == 0 and (self.begin is None or column >= self.begin)

    def on_each(self, seen: np.ndarray) -> np.ndarray:
        """`on` of every slot."""
        column, rest = np.divmod(seen - self.lag, self.rate)
        return (rest == 0) & (True if self.begin is None else column >= self.begin)

    def started(self, start: str, first: int = 0) -> Clock:
        """With `begin` as the start mode has it; first: the least column where padding is kept."""
        if start == "wait":
            return replace(self, begin=max(0, -(self.earliest // self.rate)))
        return replace(self, begin=None if start == "replicate" else max(0, first))

    def convolved(self, reach: int, stride: int, padding: int, start: str) -> Clock:
        """Of a window over the newest column and `reach` before it, padded in front."""
        last = reach - padding  # column j ends with input column j * stride + last
        begin = -((last - (self.begin or 0)) // stride)
        return Clock(
            self.rate * stride,
            self.lag + last * self.rate,
            self.earliest - padding * self.rate,
        ).started(start, begin)

    def retimed(self, offset: int, stride: int, start: str) -> Clock:
        """Column j is input column `offset + j * stride`; a negative offset pads with zeros."""
        begin = -((offset - (self.begin or 0)) // stride)
        return Clock(
            self.rate * stride, self.lag + offset * self.rate, self.earliest + offset * self.rate
        ).started(start, begin)


def joined(clocks: Sequence[Clock], start: str) -> Clock:
    """Of column j of several values together: the latest of them decides.

    Raises UnsupportedError if their rates differ.
    """
    rates = sorted({clock.rate for clock in clocks})
    if len(rates) > 1:
        raise UnsupportedError(
            f"joins branches with a column every {' and every '.join(map(str, rates))} frames"
        )
    together = Clock(rates[0], max(c.lag for c in clocks), min(c.earliest for c in clocks))
    # What a branch has not computed yet is its padding, zeros, where padding is kept.
    return together.started(start, min(c.begin or 0 for c in clocks))


def waiting(early: Clock, late: Clock) -> int:
    """Columns of an early value that have to be kept until a late one is there."""
    return -(-(late.lag - early.lag) // late.rate)


def period(clocks: Sequence[Clock]) -> int:
    """Frames after which the pattern of columns repeats."""
    common = 1
    for clock in clocks:
        common = common * clock.rate // gcd(common, clock.rate)
    return common
