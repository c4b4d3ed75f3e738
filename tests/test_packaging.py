"""What the wheel holds, what it asks for, and that it works where only NumPy is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import setuptools

import fastconv
from fastconv import backends

ROOT = Path(__file__).parent.parent
FOLDERS = ("fastconv", "reference", "triton_kernels", "bench", "csrc")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
EXTENSION = "fastconv/c_kernels/_csrc.abi3.so"


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The output of a command, which must succeed."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(target: Path) -> Path:
    """A copy of what a release holds, without what was built in place."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return target


def build(tree: Path, **environment: str) -> Path:
    """The wheel of a source tree, built without a network."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    command = (sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "built", ".")
    run(*command, cwd=tree, **environment)
    (built,) = (tree / "built").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel as a machine without a C compiler gets it."""
    return build(sources(tmp_path_factory.mktemp("tree")), CC=shutil.which("false") or "false")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and NumPy, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--quiet", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=target)
    for part in Path(np.__file__).parent.parent.glob("numpy*"):  # with its libraries and metadata
        (target / part.name).symlink_to(part)
    return target


@pytest.fixture
def only_numpy(installed, tmp_path):
    """`only_numpy(script)`: its output in a fresh interpreter with only NumPy and the wheel."""

    def run_script(script: str) -> str:
        prologue = f"import sys\nsys.path.insert(0, {str(installed)!r})\n"
        return run(sys.executable, "-I", "-S", "-W", "error", "-c", prologue + script, cwd=tmp_path)

    return run_script


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "fastconv",
        f"fastconv-{fastconv.__version__}.dist-info",
    }
    expected = {
        f"fastconv/{p.relative_to(ROOT / 'fastconv')}" for p in ROOT.glob("fastconv/**/*.py")
    }
    expected |= {f"fastconv/reference/{p.name}" for p in ROOT.glob("reference/*.py")}
    expected |= {f"fastconv/triton_kernels/{p.name}" for p in ROOT.glob("triton_kernels/*.py")}
    expected |= {f"fastconv/bench/{p.name}" for p in ROOT.glob("bench/*.py")}
    expected |= {"fastconv/py.typed", "fastconv/published.csv", "fastconv/bench/cases.csv"}
    assert {name for name in names if name.startswith("fastconv/")} == expected


def test_the_wheel_says_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = f"fastconv-{fastconv.__version__}.dist-info"
    metadata = message_from_string(archive.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == fastconv.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    needs = metadata.get_all("Requires-Dist")
    assert [need for need in needs if "extra ==" not in need] == ["numpy>=1.26"]
    assert {"c", "numba", "torch", "triton", "demo", "bench", "test", "dev"} == set(
        metadata.get_all("Provides-Extra")
    )
    assert "fastconv = fastconv.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert any(name.endswith("LICENSE") for name in archive.namelist())


def pinned(requirements: str) -> set[str]:
    """The packages that a file of requirements pins."""
    lines = (ROOT / requirements).read_text().splitlines()
    return {line.split("==")[0] for line in lines if "==" in line}


def test_the_pinned_sets_serve_every_extra():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = dict(project["optional-dependencies"])
    bench = extras.pop("bench")

    def named(needs):
        return {need.split(">=")[0].split("[")[0] for need in needs} - {"fastconv"}

    development = named([*project["dependencies"], *chain(*extras.values())])
    assert development == pinned("requirements-dev.txt")
    assert named(bench) - development == pinned("requirements-bench.txt")


def test_importing_loads_numpy_alone(only_numpy):
    script = """
import fastconv
loaded = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(*sorted(loaded - {"__main__"}), fastconv.__version__)
"""
    assert only_numpy(script).split() == ["fastconv", "numpy", fastconv.__version__]


def test_a_convolution_with_numpy_alone(only_numpy):
    script = """
import numpy as np
import fastconv
x = np.arange(25.0).reshape(1, 1, 5, 5)
y = fastconv.conv2d(x, np.ones((1, 1, 3, 3)), backend="reference")
print(*y.ravel().tolist())
"""
    x = np.arange(25.0).reshape(5, 5)
    sums = [x[i : i + 3, j : j + 3].sum() for i in range(3) for j in range(3)]
    assert [float(number) for number in only_numpy(script).split()] == sums


def test_every_public_name_is_there(only_numpy):
    script = """
from fastconv import *
import fastconv
assert callable(plan) and plan is fastconv.plan, plan
print(len(fastconv.__all__), set(fastconv.__all__) <= set(dir(fastconv)))
"""
    assert only_numpy(script).split() == [str(len(fastconv.__all__)), "True"]


@pytest.mark.parametrize("attempt", ["import fastconv.nn", "import fastconv; fastconv.accelerate"])
def test_what_needs_pytorch_says_so(only_numpy, attempt):
    script = f"""
from fastconv.errors import BackendError
try:
    {attempt}
except BackendError as error:
    print(error)
"""
    assert only_numpy(script).strip() == (
        "fastconv.nn needs PyTorch, which is not installed: pip install 'fastconv[torch]'"
    )


def test_info_with_numpy_alone(only_numpy):
    output = only_numpy("from fastconv.cli import main\nsys.exit(main(['info']))")
    assert "numba is not installed: pip install 'fastconv[numba]'" in output
    assert "PyTorch is not installed: pip install 'fastconv[torch]'" in output
    assert "scikit-video, which is not installed" in output


def test_the_benchmarks_with_numpy_alone(only_numpy):
    output = only_numpy("from fastconv.cli import main\nsys.exit(main(['bench', 'list']))")
    assert "conv3d:54-54:3x3x3@16x56x56:p1:g54" in output
    assert "peer torch                PyTorch: torch not installed: pip install" in output


def test_without_a_compiler_the_c_backend_says_what_is_missing(only_numpy):
    output = only_numpy("from fastconv.cli import main\nsys.exit(main(['info']))")
    assert "cffi is not installed: pip install 'fastconv[c]'" in output
    script = """
import importlib.util
from fastconv import backends
backends.installed = lambda name: name == "cffi"
print(backends.available()["c"])
"""
    assert "install a C compiler (gcc or clang) and cffi" in only_numpy(script)


@pytest.mark.skipif(backends.available()["c"] is not None, reason="built without the C backend")
def test_one_wheel_with_the_extension_for_every_python(tmp_path):
    built = build(sources(tmp_path))
    assert "-cp310-abi3-" in built.name
    assert EXTENSION in zipfile.ZipFile(built).namelist()


def test_without_cffi_the_wheel_is_pure(tmp_path):
    tree, packages = sources(tmp_path), tmp_path / "packages"
    packages.mkdir()
    for module in (setuptools, np):
        for path in Path(module.__file__).parent.parent.iterdir():
            if "cffi" not in path.name and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    script = f"""
import runpy, sys
sys.path[:0] = [{str(packages)!r}, {str(tree)!r}]
sys.argv = ["setup.py", "-q", "bdist_wheel"]
runpy.run_path("setup.py", run_name="__main__")
"""
    run(sys.executable, "-I", "-S", "-W", "ignore", "-c", script, cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    assert built.name.endswith("py3-none-any.whl")
    assert EXTENSION not in zipfile.ZipFile(built).namelist()


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="^module 'fastconv' has no attribute 'conv4d'$"):
        _ = fastconv.conv4d
