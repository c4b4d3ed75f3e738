"""Families x backends: each kernel module exists or is a listed absence, and all have one shape."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import pytest

from fastconv.backends import BACKENDS, FAMILIES, available, kernel

FOLDERS = {
    "reference": "reference",
    "numba": "numba_kernels",
    "c": "c_kernels",
    "triton": "triton_kernels",
    "torch": "torch_kernels",
}
ABSENT: set[tuple[str, str]] = set()
PRESENT = [(f, b) for f in FAMILIES for b in BACKENDS if (f, b) not in ABSENT]
FUNCTIONS = ("supports", "prepack", "workspace_size", "run")


def exists(family: str, backend: str) -> bool:
    folder = f"fastconv.{FOLDERS[backend]}"
    return (
        importlib.util.find_spec(folder) is not None
        and importlib.util.find_spec(f"{folder}.{family}") is not None
    )


def parameters(function) -> list[tuple]:
    """Names, kinds and defaults; annotations may name the backend's own array type."""
    signature = inspect.signature(function)
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


@pytest.mark.parametrize(("family", "backend"), sorted(ABSENT))
def test_an_absence_is_listed_only_while_it_lasts(family, backend):
    assert not exists(family, backend)


@pytest.mark.parametrize(("family", "backend"), PRESENT)
def test_every_kernel_module_has_the_shape_of_the_reference(family, backend):
    assert exists(family, backend)
    if backend == "triton" and importlib.util.find_spec("triton"):  # its modules load anywhere
        module = importlib.import_module(f"fastconv.triton_kernels.{family}")
    elif available()[backend] is not None:
        pytest.skip(available()[backend])
    else:
        module = kernel(family, backend)
    reference = kernel(family, "reference")
    for name in FUNCTIONS:
        assert parameters(getattr(module, name)) == parameters(getattr(reference, name)), name
    assert isinstance(module.CONFIGS, tuple)
    assert module.CONFIGS
    assert all(isinstance(config, dict) for config in module.CONFIGS)
