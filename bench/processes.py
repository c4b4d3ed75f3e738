"""One process for each library that we are timed against, one after the other.

The threads of a library outlive its calls: some spin, some wake, and what is timed beside them is
theirs too. So ours is timed anew in every process, by turns with the peers of that process alone,
and ratios are of times from one process.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .baselines import PEERS
from .cases import TABLE, Case
from .job import Job
from .results import OURS, Row
from .rows import bare

COMMAND = (sys.executable, "-m", "fastconv.bench.child")
ALONE = OURS  # the process of the cases that no peer is for


@dataclass(frozen=True)
class Part:
    """What one process does of a job; `process` is the name of its peers, as `Peer.process`."""

    process: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]


def parts(job: Job) -> list[Part]:
    """The processes of a job, in the order of the peers; none for peers that are not installed.

    First the cases of the table, with every peer; then single layers of networks, which are many:
    they are what a time limit leaves out. On a GPU one process has all, for their threads do not
    compute.
    """
    if job.settings.device != "cpu":
        return [Part("cases", job.cases, job.peers)]
    groups: dict[str, list[str]] = {}
    for name, peer in PEERS.items():
        if name in job.peers:
            groups.setdefault(peer.process or name, []).append(name)
    table = tuple(case for case in job.cases if case.source == TABLE)
    traced = tuple(case for case in job.cases if case.source != TABLE)
    found = []
    for some in (table, traced):
        for process, names in groups.items():
            tried = tuple(case for case in some if any(_tries(name, case, job) for name in names))
            if tried:
                found.append(Part(process, tried, tuple(names)))
    met = {case for part in found for case in part.cases}
    alone = tuple(case for case in job.cases if case not in met)
    return [Part(ALONE, alone, ()), *found] if alone else found


def refusals(job: Job, found: Sequence[Part]) -> list[Row]:
    """Rows of the peers whose process is not given a case, with the reason."""
    given = {(name, case) for part in found for name in part.peers for case in part.cases}
    rows = []
    for case in job.cases:
        for name in job.peers:
            refusal = PEERS[name].refusal(case.kind, job.settings.device)
            if refusal is not None and (name, case) not in given:
                rows.append(bare(case, name, *refusal))
    return rows


def _tries(name: str, case: Case, job: Job) -> bool:
    return PEERS[name].refusal(case.kind, job.settings.device) is None


def measured(job: Job, found: Sequence[Part]) -> Iterator[tuple[Part, Iterator[list[Row]]]]:
    """Every part with the rows of its cases, one case after the other."""
    for part in found:
        task = replace(job, cases=part.cases, peers=part.peers)
        yield part, rows(task) if job.settings.device == "cpu" else task.rows()


def rows(job: Job) -> Iterator[list[Row]]:
    """The rows of each case of a job, from a process of its own.

    A process that crashes on a case is followed by another for the cases after it, unless it was
    its first: then the next would crash as well, or it does not start at all.
    """
    left = job.cases
    while left:
        first = left[0]
        # In a session of its own, for Ctrl-C is meant for us.
        with subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                for answer in _answers(process, replace(job, cases=left)):
                    left = left[1:]
                    yield answer
                reason = _ending(process.wait()) if left else ""
            finally:
                process.kill()  # interrupted, or done: nothing of it is needed any more
        lost = left if left[:1] == (first,) else left[:1]
        for case in lost:
            yield job.bare(case, "failed", reason)
        left = left[len(lost) :]


def _answers(process: subprocess.Popen[bytes], job: Job) -> Iterator[list[Row]]:
    """What the process answers: a list of rows for every case, fewer lists if it crashes."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as stdin:
            stdin.write(pickle.dumps(job))
    except BrokenPipeError:
        return
    for _ in job.cases:
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            return
        yield json.loads(line)


def _ending(code: int) -> str:
    """How a process ended that should have gone on."""
    if code < 0:
        return f"its process was killed: {signal.strsignal(-code) or f'signal {-code}'}"
    return f"its process ended with exit code {code}"
