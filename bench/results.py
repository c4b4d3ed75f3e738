"""Rows on disk: one JSON file, complete after every case."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastconv.errors import UnsupportedError

FORMAT = 1
OURS = "ours"
Row = dict[str, Any]


@dataclass
class Document:
    """What one run found.

    machine, settings, roofline: what the rows should be read with
    rows: one per case and contender, 'ours' first; `status` is 'ok', 'wrong' (then there are no
        times), 'unsupported', 'unavailable', 'failed' or 'skipped', and `reason` says why
    """

    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    roofline: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    def add(self, rows: list[Row]) -> None:
        """Append rows and, if there is a file, write it whole: an interrupt later loses nothing."""
        self.rows += rows
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
        grouped: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(key(row)[:-1], []).append(row)
        return list(grouped.values())


def key(row: Row) -> tuple[str, str, str, str]:
    """What the same row has in another document."""
    return row["kind"], row["target"], row["dtype"], row["who"]


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


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest peer of a case that was right and computed in ours' precision."""
    precision = next((row["precision"] for row in rows if row["who"] == OURS), "float32")
    peers = [row for row in rows if row["who"] != OURS and row["status"] == "ok"]
    equal = [row for row in peers if row["precision"] == precision]
    return min(equal, key=lambda row: float(row["median_ms"]), default=None)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
