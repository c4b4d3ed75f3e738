"""The fastest plans as they were measured, in one JSON file per machine.

The file is read once per process, when the first plan is asked for, and when this process writes
it. Writing reads what others wrote meanwhile, adds to it and replaces the file whole
(one rename), all under a lock where the system has `flock`: no result is lost, and of two for the
same convolution the later one stays. Without `flock`, of two processes that write in the same
moment one may lose its results; a torn file there is never.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import backends, costs
from .epilogue import Epilogue
from .errors import BackendError
from .geometry import Geometry, SeparableGeometry
from .plan import Plan, Request

SCHEMA = 1
PACKAGES = ("fastconv", "torch", "numba", "triton")  # results hold for these versions


@dataclass(frozen=True)
class Record:
    """What was measured for one request; plans by their `label`.

    winner    the plan to run
    ms        milliseconds of the plans that ran to the end, fastest first
    given_up  milliseconds of plans that were clearly slower, from few runs
    when      the date, for people
    noisy     the machine had other things to do meanwhile
    """

    winner: str
    ms: Mapping[str, float]
    given_up: Mapping[str, float] = field(default_factory=dict)
    when: str = ""
    noisy: bool = False


def label(plan: Plan) -> str:
    """What tells a plan from the others of its request, e.g. 'numba winograd 2x4x4 tiles=28'."""
    parts = [plan.backend, plan.family]
    if plan.transforms:
        parts.append(_by_x(plan.tile))
    parts += [f"{name}={value}" for name, value in plan.config]
    return " ".join(parts)


def find(request: Request) -> Record | None:
    """What was measured for exactly this request under the present circumstances, or None."""
    table = _current()
    return table.get(key(request)) if table else None


def records() -> dict[str, Record]:
    """All records of this machine and these versions, by their keys."""
    return dict(_current())


def generation() -> int:
    """Changes whenever results were added, or forgotten, by this process."""
    return _generation


def situation() -> tuple[int, int, str]:
    """What an answer of `find` depends on besides the request: changes where that may change."""
    return _generation, costs.threads(), _isa(load=False)


def key(request: Request) -> str:
    """The request and the circumstances of running it, in one line for people."""
    parts = [
        _geometry(request.geometry) + (", one frame of a stream" if request.continual else ""),
        request.dtype,
        _epilogue(request.epilogue),
        request.layout,
        f"tolerance {request.tolerance:g}",
    ]
    if request.device != "cpu":
        parts.append(_gpu() if request.device == "cuda" else request.device)
    if request.precision != "ieee":
        parts.append(request.precision)
    choice = (("algorithm", request.algorithm), ("backend", request.backend))
    parts += [f"{name} {value}" for name, value in choice if value != "auto"]
    if request.tile is not None:
        parts.append(f"tile {_by_x(request.tile)}")
    if request.max_workspace_bytes is not None:
        parts.append(f"workspace {request.max_workspace_bytes} bytes")
    if request.device == "cpu":
        parts.append(f"{_isa(load=True)}, {costs.threads()} threads")
    return ", ".join(parts)


@functools.cache
def _gpu() -> str:
    """The name of the GPU; of several the first, as machines with unlike ones are rare."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "no GPU"


def _geometry(geometry: Geometry | SeparableGeometry) -> str:
    if isinstance(geometry, SeparableGeometry):
        return "separable " + " | ".join(map(_geometry, geometry.stages))
    g = geometry
    parts = [f"conv{g.n}d {_by_x(g.x_shape)} * {_by_x(g.w_shape)}"]
    if any(s != 1 for s in g.stride):
        parts.append(f"stride {_by_x(g.stride)}")
    if any(map(any, g.padding)):
        parts.append("padding " + "x".join(f"{a}+{b}" for a, b in g.padding))
    if any(d != 1 for d in g.dilation):
        parts.append(f"dilation {_by_x(g.dilation)}")
    if g.groups != 1:
        parts.append(f"groups {g.groups}")
    return " ".join(parts)


def _epilogue(epilogue: Epilogue | tuple[Epilogue, ...]) -> str:
    if isinstance(epilogue, tuple):
        return " | ".join(map(_epilogue, epilogue))
    named = (("bias", epilogue.bias), ("residual", epilogue.residual))
    parts = [name for name, there in named if there]
    return "+".join([*parts, epilogue.activation])


def _by_x(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))


def _isa(load: bool) -> str:
    """The instruction set of the C kernels; with `load` the extension is loaded to ask it."""
    launch = sys.modules.get("fastconv.c_kernels.launch")
    if launch is None and load and backends.available()["c"] is None:
        with suppress(ImportError, BackendError):  # who runs a C kernel will hear of it
            from .c_kernels import launch
    isa = getattr(launch, "isa", None)
    return f"C {isa()}" if isa is not None else "no C"


@functools.cache
def environment() -> str:
    """Versions that a record holds for."""
    found = ((package, backends.version(package)) for package in PACKAGES)
    return ", ".join(f"{package} {version}" for package, version in found if version is not None)


@functools.cache
def machine() -> str:
    """The CPU by name, family and model where the system tells, and the number of CPUs."""
    info: dict[str, str] = {}
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        info = {name.strip(): value.strip() for name, _, value in pairs}
    name = info.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {info[key]}" for key in ("cpu family", "model", "stepping") if key in info]
    return ", ".join([name, *numbers, f"{os.cpu_count()} CPUs"])


def path() -> Path:
    """The file of this machine, in $FASTCONV_CACHE or the user's folder for caches.

    Raises BackendError where there is no such folder.
    """
    folder = os.environ.get("FASTCONV_CACHE")
    if not folder:
        base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
        if not Path(base).is_absolute():
            try:
                base = str(Path.home() / ".cache")
            except RuntimeError as error:
                raise BackendError(
                    "tune: this user has no home; name a folder in FASTCONV_CACHE"
                ) from error
        folder = str(Path(base) / "fastconv")
    slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    return Path(folder) / f"tuned-{slug}.json"


_memory = threading.Lock()
_table: dict[str, Record] | None = None
_generation = 0


def _current() -> dict[str, Record]:
    """The records of this machine and these versions; the first call reads the file."""
    global _table
    complaint = ""
    with _memory:
        if _table is None:
            everything, complaint = _load()
            _table = everything.get(environment(), {})
            if everything and environment() not in everything:
                complaint = f"its results are of other versions: {'; '.join(everything)}"
        table = _table
    if complaint:
        _warn(complaint)
    return table


def forget() -> None:
    """Read the file again when it is needed next."""
    global _table, _generation
    with _memory:
        _table, _generation = None, _generation + 1


def keep(request: Request, record: Record) -> None:
    """Add a record to the file, in place of an older one. Raises BackendError."""
    global _table, _generation
    with _locked() as target:
        everything, complaint = _load()
        table = everything.setdefault(environment(), {})
        table[key(request)] = record
        _replace(target, everything)
        with _memory:
            _table, _generation = table, _generation + 1
    if complaint:
        _warn(complaint + "; the file was written anew")


def clear() -> int:
    """Remove the file; how many records of any version it held. Raises BackendError."""
    with _locked() as target:
        everything, _ = _load()
        target.unlink(missing_ok=True)
    forget()
    return sum(map(len, everything.values()))


def check_writable() -> None:
    """Raise BackendError if nothing could be kept; better before an hour of measuring."""
    with _locked():
        pass


@contextmanager
def _locked() -> Iterator[Path]:
    """The path of the file, in a folder that exists, while no other process writes it."""
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("a") as lock:
            with suppress(ImportError):  # not a Unix: see the head of this module
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield target
    except OSError as error:
        raise BackendError(
            f"tune: cannot write {target}: {error.strerror or error}; "
            "name another folder in FASTCONV_CACHE"
        ) from error


def _replace(target: Path, everything: dict[str, dict[str, Record]]) -> None:
    document = {
        "schema": SCHEMA,
        "machine": machine(),
        "about": "written by `python -m fastconv tune`: milliseconds per plan and request",
        "results": {
            versions: {name: asdict(record) for name, record in sorted(table.items())}
            for versions, table in everything.items()
        },
    }
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _load() -> tuple[dict[str, dict[str, Record]], str]:
    """The file's records by versions and key, and what was wrong with it, '' for nothing."""
    try:
        text = path().read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, BackendError):
        return {}, ""
    except (OSError, UnicodeDecodeError) as error:
        return {}, f"it cannot be read: {error}"
    try:
        document = json.loads(text)
    except ValueError as error:
        return {}, f"it is not JSON: {error}"
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return {}, f"it is not a file of schema {SCHEMA}"
    if document.get("machine") != machine():
        return {}, f"it is of another machine: {document.get('machine')!r}"
    results = document.get("results")
    if not isinstance(results, dict) or not all(isinstance(t, dict) for t in results.values()):
        return {}, "it has no results"
    everything = {
        versions: {name: made for name, r in table.items() if (made := _record(r)) is not None}
        for versions, table in results.items()
    }
    lost = sum(map(len, results.values())) - sum(map(len, everything.values()))
    return everything, f"{lost} of its results make no sense" if lost else ""


def _record(value: Any) -> Record | None:
    """A record from JSON, None if it is none."""
    if not isinstance(value, dict):
        return None
    ms, given_up = value.get("ms"), value.get("given_up")
    if not isinstance(ms, dict) or not isinstance(given_up, dict):
        return None
    when, noisy = value.get("when"), value.get("noisy")
    if not isinstance(when, str) or not isinstance(noisy, bool):
        return None
    times = [*ms.values(), *given_up.values()]
    if value.get("winner") not in [*ms] or not all(map(_is_time, times)):
        return None
    ordered = dict(sorted(ms.items(), key=lambda item: item[1]))
    return Record(value["winner"], ordered, given_up, when, noisy)


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _warn(complaint: str) -> None:
    warnings.warn(
        f"fastconv ignores tuning results in {path()}: {complaint} "
        "(tune again, or `python -m fastconv tune --clear`)",
        stacklevel=2,
    )
