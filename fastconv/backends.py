"""What can run here, why the rest cannot, and the one way to a kernel module: its import path."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from fastconv.errors import BackendError

FAMILIES = ("winograd", "depthwise", "grouped", "hfa", "continual")
BACKENDS = ("reference", "numba", "c", "triton", "torch")

_FOLDERS = {
    "reference": "reference",
    "numba": "numba_kernels",
    "c": "c_kernels",
    "triton": "triton_kernels",
    "torch": "torch_kernels",
}
_CPU_FLAGS = {  # the names Linux prints, and the names people use
    "sse4_2": "sse4.2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "sve": "sve",
}


def available() -> dict[str, str | None]:
    """For every backend None if it can run here, or the reason against and how to get it."""
    return {name: why_not(name) for name in BACKENDS}


def why_not(backend: str) -> str | None:
    """None if a backend can run here, or the reason against and how to get it."""
    return _REASONS[backend]()


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for Triton's interpreter: its kernels then run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def devices(backend: str) -> tuple[str, ...]:
    """The types of device whose arrays a backend takes."""
    if backend == "torch":
        return ("cpu", "cuda")
    return ("cuda",) if backend == "triton" and not interpreted() else ("cpu",)


@functools.cache
def kernel(family: str, backend: str) -> ModuleType:
    """The module that holds a family's kernels on a backend: `fastconv.<folder>.<family>`.

    Raises BackendError for an unknown family or backend, and for a backend not available here.
    """
    if family not in FAMILIES:
        raise BackendError(f"unknown algorithm family {family!r}. Known: {', '.join(FAMILIES)}")
    check(backend)
    try:
        return importlib.import_module(f"fastconv.{_FOLDERS[backend]}.{family}")
    except ImportError as error:  # installed, but it does not load: wrong version, missing library
        raise BackendError(f"backend {backend!r} does not load: {error}") from error


@functools.cache
def gradients(family: str, backend: str) -> ModuleType | None:
    """The module with a family's gradient kernels, `fastconv.<folder>.<family>_gradients`.

    None where a backend has none, or cannot run; the reference defines those of all families.
    """
    name = "gradients" if backend == "reference" else f"{family}_gradients"
    path = f"fastconv.{_FOLDERS[backend]}.{name}"
    if why_not(backend) is not None or not installed(path):
        return None
    return importlib.import_module(path)


def check(backend: str) -> None:
    """Raise BackendError, with the reason and the alternatives, if a backend cannot run here."""
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}. Known: {', '.join(BACKENDS)}")
    reason = why_not(backend)
    if reason is not None:
        usable = ", ".join(name for name, against in available().items() if against is None)
        raise BackendError(f"backend {backend!r} is not available: {reason}. Available: {usable}")


def version(package: str) -> str | None:
    """The installed version of a package, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The host CPU's vector instruction sets, weakest first; () if they cannot be told.

    Linux says it in /proc/cpuinfo ("flags" on x86, "Features" on ARM); elsewhere llvmlite, which
    comes with Numba, knows.
    """
    flags: set[str] = set()
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags.update(value.split())
                break
    elif installed("llvmlite"):
        from llvmlite import binding

        flags = {name for name, present in binding.get_host_cpu_features().items() if present}
        flags = {_CPU_FLAGS.get(name, name) for name in flags}
    return tuple(dict.fromkeys(name for flag, name in _CPU_FLAGS.items() if {flag, name} & flags))


def installed(package: str) -> bool:
    """Whether a top-level package can be found; finding does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _missing(package: str, title: str) -> str | None:
    if installed(package):
        return None
    return f"{title} is not installed: pip install 'fastconv[{package}]'"


def _c_backend() -> str | None:
    if not installed("cffi"):
        return "cffi is not installed: pip install 'fastconv[c]'"
    if not installed("fastconv.c_kernels._csrc"):
        return (
            "its extension was not built when fastconv was installed: "
            "install a C compiler (gcc or clang) and cffi, then install fastconv again"
        )
    return None


def _triton() -> str | None:
    missing = _missing("torch", "PyTorch") or _missing("triton", "Triton")
    if missing is not None or interpreted():
        return missing
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


_REASONS: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "numba": lambda: _missing("numba", "numba"),
    "c": _c_backend,
    "triton": _triton,
    "torch": lambda: _missing("torch", "PyTorch"),
}
