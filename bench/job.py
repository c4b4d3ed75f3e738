"""What one process measures: cases against the peers that share it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from fastconv import backends

from .baselines import PEERS
from .cases import Case
from .contenders import Settings
from .ours import Choice
from .results import OURS, Row
from .roofline import Roofline
from .rows import bare, of_case

NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Job:
    """Plain data, so that another process can be given it.

    peers   their names
    until   no case is begun after this time, as `time.time` counts
    folder  for what processes share, see `problems.make`
    """

    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    choice: Choice
    settings: Settings
    roofs: Roofline
    until: float = NO_LIMIT
    folder: str | None = None

    def rows(self) -> Iterator[list[Row]]:
        """The rows of one case after the other, measured in this process."""
        set_up(self.settings)
        peers = [PEERS[name] for name in self.peers]
        for case in self.cases:
            if time.time() > self.until:
                yield self.bare(case, "skipped", "the run's time limit was reached")
            else:
                yield of_case(case, peers, self.choice, self.settings, self.roofs, self.folder)

    def bare(self, case: Case, status: str, reason: str) -> list[Row]:
        """Rows of ours and of all peers without measurements."""
        return [bare(case, who, status, reason) for who in (OURS, *self.peers)]


def set_up(settings: Settings) -> None:
    """Tell every library how many threads to use; some are told as they prepare. cuDNN may try."""
    threads = settings.threads
    if backends.available()["numba"] is None:
        import numba

        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if backends.available()["torch"] is None:
        import torch

        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = settings.device == "cuda"
