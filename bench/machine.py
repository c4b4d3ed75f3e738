"""What a result depends on besides the code: CPU, threads, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastconv import __version__, backends

from .limits import limited

PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "torch",
    "openvino",
    "onnxruntime",
    "continual-inference",
    "triton",
)


def facts(device: str = "cpu") -> dict[str, Any]:
    """Everything about this machine and installation that a row should be read with."""
    found: dict[str, Any] = {
        "kind": kind(device),
        "cpu": cpu_name(),
        "instruction_sets": list(backends.instruction_sets()),
        "limited_to": limited(),
        "cpus": cpus(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": round(load(), 2),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "fastconv": __version__,
            **{p: v for p in PACKAGES if (v := backends.version(p)) is not None},
        },
    }
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
        found["versions"]["cuda"] = torch.version.cuda
        found["versions"]["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found


def kind(device: str = "cpu") -> str:
    """A file name for results of such machines, e.g. 'amd-epyc-26-2-2cpu' or 'nvidia-h200', with
    '-avx2' behind it where a run is limited to that.
    """
    if device != "cpu":
        import torch

        return _slug(torch.cuda.get_device_name())
    info = _cpuinfo()
    model = [info[key] for key in ("cpu family", "model") if key in info]
    names = (info.get("model name") or platform.machine(), *model, f"{cpus()}cpu", limited() or "")
    return _slug("-".join(names))


def cpu_name() -> str:
    """The CPU by the name it gives itself, with family and model where the name says little."""
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {info[key]}" for key in ("cpu family", "model") if key in info]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def cpus() -> int:
    """CPUs this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load() -> float:
    """Processes that wanted a CPU in the last minute, on average; 0 where nobody counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def commit() -> str | None:
    """The commit of this checkout, '+changes' if files differ from it; None outside a checkout.

    FASTCONV_COMMIT says it where only the files are: on a machine that they were copied to.
    """
    if told := os.environ.get("FASTCONV_COMMIT"):
        return told
    here = Path(__file__).resolve().parent
    head = _git(here, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo() -> dict[str, str]:
    """The first CPU's entries of /proc/cpuinfo; {} elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
