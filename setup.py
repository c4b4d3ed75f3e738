"""The C extension; everything else is in pyproject.toml.

Without cffi or without a compiler the package installs without its C backend, and says so.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

FLAGS = ["-std=gnu11", "-fno-math-errno", "-Wall"]
if "-O" not in os.environ.get("CFLAGS", ""):
    FLAGS.append("-O3")
FAILURES = (CCompilerError, ExecError, PlatformError, OSError)


def recipe():  # type: ignore[no-untyped-def]
    """The module csrc/build_ffi.py."""
    spec = importlib.util.spec_from_file_location("build_ffi", "csrc/build_ffi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Generates the sources, and compiles with OpenMP where the compiler has it.

    FASTCONV_OPENMP=0 builds without, as the thread sanitizer needs it.
    """

    def build_extension(self, ext: Extension) -> None:
        build_ffi = recipe()
        folder = Path(self.build_temp) / "csrc"
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder / "glue.c", build_ffi.glue())
        self.write(folder / "programs.h", build_ffi.programs())
        sources, flags, links = list(ext.sources), ext.extra_compile_args, ext.extra_link_args
        ext.include_dirs = [*ext.include_dirs, str(folder)]
        ext.sources = [*sources, str(folder / "glue.c")]
        try:
            if os.environ.get("FASTCONV_OPENMP") == "0":
                super().build_extension(ext)
                return
            try:
                ext.extra_compile_args = [*flags, "-fopenmp"]
                ext.extra_link_args = [*links, "-fopenmp"]
                super().build_extension(ext)
            except FAILURES:
                ext.extra_compile_args, ext.extra_link_args = flags, links
                super().build_extension(ext)
        finally:
            ext.sources = sources

    @staticmethod
    def write(path: Path, text: str) -> None:
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def extensions() -> list[Extension]:
    if importlib.util.find_spec("cffi") is None:
        print("fastconv: cffi is not installed, so the C backend is left out", file=sys.stderr)
        return []
    build_ffi = recipe()
    return [
        Extension(
            build_ffi.MODULE,
            sources=[f"csrc/{name}" for name in build_ffi.SOURCES],
            depends=[str(path) for path in Path("csrc").glob("*.[hc]")],
            include_dirs=["csrc"],
            extra_compile_args=FLAGS,
            py_limited_api=True,
            optional=True,
        )
    ]


found = extensions()
setup(
    ext_modules=found,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if found else {},
)
