"""Rows on disk: one JSON file, complete after every case."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastconv.errors import UnsupportedError

FORMAT = 2
OURS = "ours"
# Which of our rows of one case stands for all: a mistake is never hidden by another process.
RANKS = ("wrong", "ok", "failed", "unsupported", "unavailable", "skipped")
Row = dict[str, Any]


@dataclass
class Document:
    """What one run found.

    machine, settings, roofline: what the rows should be read with
    rows: one per case and contender, 'ours' first; `status` is 'ok', 'wrong' (then there are no
        times), 'unsupported', 'unavailable', 'failed' or 'skipped', and `reason` says why.
        On a GPU times are of a call in a replayed graph; `call_ms` is of one from Python.
        A peer's `ours_ms` is our time in the peer's own process, its `ratio` is its time over that.
        The row of ours is the one beside the best peer, the one with the lowest ratio
    """

    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    roofline: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    def add(self, rows: list[Row]) -> None:
        """Take in what a process found and, if there is a file, write it whole.

        So an interrupt later loses nothing. Of a case that several processes timed, one row of
        ours stays.
        """
        self.rows += rows
        self.rows = [row for case in self.cases() for row in merged(case)]
        if self.path is not None:
            self.write(self.path)

    def write(self, path: Path) -> None:
        """Through a neighbour, so that the file is never half written."""
        document = {
            "format": FORMAT,
            "machine": self.machine,
            "settings": self.settings,
            "roofline": self.roofline,
            "rows": [],
        }
        head = json.dumps(_finite(document), indent=1).rsplit("[]", 1)[0]
        rows = ",\n".join("  " + json.dumps(_finite(row)) for row in self.rows)
        neighbour = path.with_name(path.name + ".part")
        neighbour.write_text(f"{head}[\n{rows}\n ]\n}}\n", encoding="utf-8")
        neighbour.replace(path)

    def cases(self) -> list[list[Row]]:
        """The rows case by case, in order."""
        grouped: dict[tuple[str | int, ...], list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(key(row)[:-1], []).append(row)
        return list(grouped.values())


def key(row: Row) -> tuple[str, str, str, int, str]:
    """What the same row has in another document."""
    return row["kind"], row["target"], row["dtype"], row.get("batch", 1), row["who"]


def read(path: str | Path) -> Document:
    """A document from its file. Raises UnsupportedError if it is not one."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UnsupportedError(f"bench: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UnsupportedError(f"bench: {path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UnsupportedError(f"bench: {path} is not a file of results in format {FORMAT}")
    return Document(data["machine"], data["settings"], data["roofline"], data["rows"])


def target(text: str, kind: str) -> Path:
    """The file to write for `--json`: itself, or for a folder the machine's file in it.

    Raises UnsupportedError, before anything has run, if it cannot be written.
    """
    path = Path(text)
    if path.is_dir() or text.endswith(("/", os.sep)):
        path = path / f"{kind}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(path.name + ".part")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UnsupportedError(f"bench: cannot write {path}: {error.strerror}") from error
    if path.is_dir():
        raise UnsupportedError(f"bench: cannot write {path}: it is a folder")
    return path


def rate(rows: list[Row]) -> None:
    """Add the ratios to the rows of one case from one process.

    Every peer's time over ours; and for ours the lowest of them, among peers that compute in ours'
    precision.
    """
    own = next((row for row in rows if row["who"] == OURS and row["status"] == "ok"), None)
    if own is None:
        return
    peers = [row for row in rows if row["who"] != OURS and row["status"] == "ok"]
    for row in peers:
        row.update(ours_ms=own["median_ms"], ratio=row["median_ms"] / own["median_ms"])
    equal = [row for row in peers if row["precision"] == own["precision"]]
    best = min(equal, key=lambda row: float(row["ratio"]), default=None)
    if best is not None:
        own.update(ratio=best["ratio"], best_peer=best["who"], best_peer_ms=best["median_ms"])


def merged(rows: list[Row]) -> list[Row]:
    """The rows of one case from several processes: one of ours, then the peers."""
    own = [row for row in rows if row["who"] == OURS]
    best = [min(own, key=_rank)] if own else []
    return best + [row for row in rows if row["who"] != OURS]


def _rank(own: Row) -> tuple[int, float]:
    return RANKS.index(own["status"]), own.get("ratio") or math.inf


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
