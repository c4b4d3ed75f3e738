"""What is available and why not, the import path to a kernel, and the words of each refusal."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from fastconv import backends
from fastconv.errors import BackendError

HAVE_NUMBA_AND_TORCH = all(importlib.util.find_spec(name) for name in ("numba", "torch", "triton"))


@pytest.fixture
def without(monkeypatch):
    """`without("numba")`: as on a machine where it is not installed."""

    def hide(package: str) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        backends.kernel.cache_clear()

    yield hide
    backends.kernel.cache_clear()


def test_every_backend_has_an_answer():
    assert tuple(backends.available()) == backends.BACKENDS
    assert backends.available()["reference"] is None


def test_a_kernel_is_its_import_path():
    assert backends.kernel("winograd", "reference").__name__ == "fastconv.reference.winograd"


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("numba", "numba is not installed: pip install 'fastconv[numba]'"),
        ("torch", "PyTorch is not installed: pip install 'fastconv[torch]'"),
    ],
)
def test_a_missing_package_says_how_to_get_it(without, package, reason):
    without(package)
    assert backends.available()[package] == reason
    with pytest.raises(BackendError) as refusal:
        backends.kernel("grouped", package)
    assert str(refusal.value).startswith(
        f"backend '{package}' is not available: {reason}. Available: "
    )
    assert f", {package}" not in str(refusal.value)


@pytest.mark.skipif(not HAVE_NUMBA_AND_TORCH, reason="the message lists what is installed")
def test_a_backend_whose_device_is_absent(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError) as refusal:
        backends.check("triton")
    usable = ", ".join(name for name, reason in backends.available().items() if reason is None)
    assert str(refusal.value) == (
        f"backend 'triton' is not available: no CUDA device. Available: {usable}"
    )
    assert "triton" not in usable


def test_unknown_names():
    with pytest.raises(BackendError) as refusal:
        backends.kernel("winograd", "cuda")
    assert str(refusal.value) == "unknown backend 'cuda'. Known: reference, numba, c, triton, torch"
    with pytest.raises(BackendError) as refusal:
        backends.kernel("fft", "reference")
    assert str(refusal.value) == (
        "unknown algorithm family 'fft'. Known: winograd, depthwise, grouped, hfa, continual"
    )


def test_a_backend_that_is_there_but_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastconv.reference.grouped", None)
    backends.kernel.cache_clear()
    with pytest.raises(BackendError, match="^backend 'reference' does not load: "):
        backends.kernel("grouped", "reference")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor: 0\nflags\t\t: fpu avx2 fma avx512f sse4_2\n",
            ("sse4.2", "avx2", "fma", "avx512f"),
        ),
        ("processor: 0\nFeatures\t: fp asimd sve\n", ("neon", "sve")),
        ("processor: 0\n", ()),
    ],
)
def test_instruction_sets_of_linux(tmp_path, text, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert backends.instruction_sets(cpuinfo) == expected


@pytest.mark.skipif(
    importlib.util.find_spec("llvmlite") is None, reason="llvmlite is not installed"
)
def test_instruction_sets_by_llvm_agree_with_linux(tmp_path):
    if not (told := backends.instruction_sets()):
        pytest.skip("no /proc/cpuinfo")
    by_llvm = backends.instruction_sets(tmp_path / "absent")
    assert {"avx2", "fma", "avx512f", "neon"} & set(by_llvm) == {
        "avx2",
        "fma",
        "avx512f",
        "neon",
    } & set(told)


def test_versions_come_without_imports():
    assert backends.version("numpy") is not None
    assert backends.version("fastconv-no-such-package") is None
