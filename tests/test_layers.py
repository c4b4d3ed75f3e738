"""Imports go down only, and optional packages stay in the modules that are about them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom. A module imports from lower layers and, inside one folder, from its neighbours.
LAYERS = (
    ("errors", "timing"),
    ("programs",),  # below transforms: straight-line programs know nothing of convolution
    ("geometry", "transforms", "epilogue", "layouts"),
    ("plan",),
    ("counts", "reference", "numba_kernels", "c_kernels", "torch_kernels", "triton_kernels"),
    ("costs_cuda",),
    ("backends", "costs", "algorithms", "explore"),
    ("winners",),  # what autotune measured: read by the planner, whom autotune asks for candidates
    ("planner",),
    ("explanation", "ops"),
    ("continual",),
    ("torch_memory",),
    ("torch_ops_packed",),
    ("torch_ops_register", "torch_ops_runner"),
    ("torch_ops_gradients",),
    ("torch_autograd",),
    ("torch_ops_conv",),
    ("torch_ops_block", "torch_ops_prepacked"),
    ("torch_ops_vmap",),
    ("torch_ops",),
    ("torch_sharding",),
    ("torch_continual",),
    ("trial",),
    ("autotune",),
    ("nn",),
    ("video", "published", "notation"),
    ("demo", "targets", "count_forms", "stream"),
    ("stream_command",),
    ("count_table", "table_values"),
    ("tune_table", "tables", "explore_report"),
    ("bench",),
    ("cli",),
    ("__main__",),
)
KERNELS = {"numba_kernels", "c_kernels", "torch_kernels", "triton_kernels", "reference"}
FOLDERS = {*KERNELS, "nn", "bench"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# The exceptions, each with its reason; none may run while the module is loaded.
UPWARD = {
    ("fastconv.ops", "fastconv.torch_ops"): "one door for both: the first tensor brings PyTorch in",
    ("fastconv.torch_ops", "fastconv.torch_sharding"): "the first DTensor brings its rules in",
    ("fastconv.continual", "fastconv.torch_ops"): "as ops",
    ("fastconv.continual", "fastconv.torch_continual"): "as ops",
}

# What a module may import when it is itself imported; everywhere else, NumPy alone.
THIRD_PARTY = {
    "numba_kernels": {"numpy", "numba", "llvmlite"},
    "torch_kernels": {"numpy", "torch"},
    "triton_kernels": {"numpy", "torch", "triton"},
    **{
        name: {"numpy", "torch"}
        for rank in LAYERS
        for name in rank
        if name.startswith("torch_") and name != "torch_kernels"
    },
    "nn": {"numpy", "torch"},
    "zoo": {"torch"},
    "bench.fma": {"numpy", "numba"},  # a kernel: the peak is measured with the same vector code
}


@dataclass(frozen=True)
class Import:
    """One import statement's target; `at_load` if it runs when the module is loaded."""

    target: str
    at_load: bool


def modules() -> dict[str, Path]:
    """Every module of the package by its installed name; packages by the name of their folder."""
    found = {}
    for folder, package in (
        (ROOT / "fastconv", "fastconv"),
        (ROOT / "reference", "fastconv.reference"),
        (ROOT / "triton_kernels", "fastconv.triton_kernels"),
        (ROOT / "bench", "fastconv.bench"),
    ):
        for path in sorted(set(folder.rglob("*.py")) - set(folder.rglob("test_*.py"))):
            parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """The imports of a module, made absolute; those under TYPE_CHECKING do not happen."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, at_load)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, at_load)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                yield Import(submodule if submodule in known else origin, at_load)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_load and not inside)

    yield from visit(ast.parse(source), True)


def refusal(importer: str, target: str) -> str | None:
    """None, or why one module of the package may not import another."""
    upper, lower = (
        name.removeprefix("fastconv").lstrip(".").split(".")[0] for name in (importer, target)
    )
    if "zoo" in (upper, lower):
        return (
            None if upper == lower else "the networks of zoo and the library do not know each other"
        )
    for name in (upper, lower):
        if name and name not in RANK:
            return f"{name} is not in the table of layers"
    if not lower:  # the package itself: its public names come from every layer
        return (
            None if RANK[upper] >= RANK["demo"] else "only the command line uses the public names"
        )
    if upper == lower and upper in FOLDERS:
        return None
    if RANK[lower] >= RANK[upper]:
        return f"{lower} is not below {upper}"
    return None


FOUND = modules()
IMPORTS = {
    name: list(imports(path.read_text(), name, path.stem == "__init__", set(FOUND)))
    for name, path in FOUND.items()
}


def test_every_module_has_a_layer():
    tops = {name.split(".")[1] for name in FOUND if "." in name}
    assert tops <= {*RANK, "zoo"}


# fastconv/__init__ is above them all: it only names where each public name lives.
@pytest.mark.parametrize("module", sorted(set(FOUND) - {"fastconv"}))
def test_imports_go_down(module):
    own = [i for i in IMPORTS[module] if i.target.split(".")[0] == "fastconv"]
    targets = {i.target for i in own if i.at_load or (module, i.target) not in UPWARD}
    refused = {target: refusal(module, target) for target in targets}
    # Library and zoo meet in the command line alone, which offers the networks, and what it runs.
    if RANK.get(module.split(".")[1], -1) >= RANK["demo"]:
        refused = {t: reason for t, reason in refused.items() if not t.startswith("fastconv.zoo")}
    assert {t: reason for t, reason in refused.items() if reason} == {}


@pytest.mark.parametrize("module", sorted(FOUND))
def test_optional_packages_wait_for_their_first_use(module):
    inner = module.removeprefix("fastconv.")
    top = inner if inner in THIRD_PARTY else inner.split(".")[0]
    allowed = THIRD_PARTY.get(top, {"numpy"}) | sys.stdlib_module_names | {"fastconv"}
    loaded = {i.target.split(".")[0] for i in IMPORTS[module] if i.at_load}
    assert loaded <= allowed
    if top not in THIRD_PARTY:
        parts = {
            i.target.split(".")[1] for i in IMPORTS[module] if i.at_load and "fastconv." in i.target
        }
        assert not parts & set(THIRD_PARTY), "loads a module that needs an optional package"


@pytest.mark.parametrize(
    ("importer", "source", "targets"),
    [
        ("fastconv.plan", "from .geometry import Geometry", ["fastconv.geometry"]),
        ("fastconv.reference.hfa", "from . import direct", ["fastconv.reference.direct"]),
        ("fastconv.reference.hfa", "from ..plan import Plan", ["fastconv.plan"]),
        (
            "fastconv.cli",
            "from fastconv import backends, __version__",
            ["fastconv.backends", "fastconv"],
        ),
        ("fastconv.ops", "def f():\n    import torch", ["torch"]),
        ("fastconv.ops", "if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy", ["numpy"]),
    ],
)
def test_the_reader_of_imports_resolves(importer, source, targets):
    known = {"fastconv.backends", "fastconv.reference.direct"}
    assert [i.target for i in imports(source, importer, False, known)] == targets


@pytest.mark.parametrize(
    ("importer", "target", "reason"),
    [
        ("fastconv.geometry", "fastconv.planner", "planner is not below geometry"),
        ("fastconv.geometry", "fastconv.epilogue", "epilogue is not below geometry"),
        (
            "fastconv.numba_kernels.hfa",
            "fastconv.reference.hfa",
            "reference is not below numba_kernels",
        ),
        ("fastconv.zoo.x3d", "fastconv.nn", "do not know each other"),
        ("fastconv.nn.rewrite", "fastconv.zoo", "do not know each other"),
        ("fastconv.ops", "fastconv", "only the command line"),
        ("fastconv.planner", "fastconv.wishes", "wishes is not in the table"),
    ],
)
def test_an_import_upwards_is_refused(importer, target, reason):
    assert reason in (refusal(importer, target) or "")
