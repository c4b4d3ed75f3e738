"""Long sums of products in runs: rounding errors do not grow with the whole length of the sum."""

from __future__ import annotations

from typing import Any

from .emit import Code, Int, Vec

# Terms of a run. The error of n terms one after the other grows as sqrt(n / 2), in runs as
# sqrt(RUN / 2); adding a run to the others takes about a hundredth of its time.
RUN = 256


def run_lengths(depth: int) -> tuple[int, int]:
    """Taps and channels of a run: whole taps, or a part of one."""
    return max(RUN // depth, 1), min(depth, RUN)


class Runs:
    """What finished runs come to, in memory; the sums of the current one are in registers.

    memory: addresses of vectors, one for every sum, that are written if there are `several` runs
    """

    def __init__(self, code: Code, memory: list[tuple[Int, Int | int]], several: Any) -> None:
        self.code, self.memory, self.several = code, memory, several
        with code.when(several):
            for at in memory:
                code.store(code.zero(), *at)

    def start(self, is_first: Any, sums: list[Vec]) -> list[Vec]:
        """The sums to start a run with: those given to the first one, otherwise zeros.

        Of the run before, the sums are put away.
        """
        code = self.code
        with code.when(code.builder.not_(is_first)):
            for z, at in zip(sums, self.memory, strict=True):
                code.store(code.load(*at) + z, *at)
        return [z.where(is_first, 0) for z in sums]

    def total(self, sums: list[Vec]) -> list[Vec]:
        """The sums of the last run, and those of the runs before."""
        code = self.code

        def add(_: Int, sums: list[Vec]) -> list[Vec]:
            return [z + code.load(*at) for z, at in zip(sums, self.memory, strict=True)]

        return code.loop(code.select(self.several, 1, 0), add, sums)
