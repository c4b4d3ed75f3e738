"""Triton kernels from source text: loops over taps, tiles and transforms are written out in it.

Triton has no arrays of blocks, so what a kernel keeps in registers under an index (accumulators,
the values of a transform) gets a name each. The text is made once per structure (taps, stride,
tile), never per extent.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from ..programs import Program
from . import finish


def _let_scalars_bound_loops() -> None:
    """Let `range` take run-time integers in Triton's interpreter, which holds them as arrays.

    Triton 3.6 converts them by `int(array)`, which NumPy 2.4 refuses for arrays of one axis.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if triton.knobs.runtime.interpret:
    _let_scalars_bound_loops()


@lru_cache(maxsize=1024)
def kernel(source: str, *helpers: Any) -> Any:
    """The @triton.jit function whose text this is, `def name(...): ...`; equal texts share it.

    The text may use `tl`, `store`, `activate` and, by their names, @triton.jit functions `helpers`.
    """
    name = source.split("(", 1)[0].removeprefix("def ").strip()
    filename = f"<fastconv {name} {abs(hash(source)):x}>"
    # Triton reads a function's text through `inspect`, which asks linecache.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    names: dict[str, Any] = {
        "tl": tl,
        "activate": finish.activate,
        "store": finish.store,
        **{helper.__name__: helper for helper in helpers},
        "__name__": f"{__package__}.generated",
    }
    exec(compile(source, filename, "exec"), names)
    return triton.jit(names[name])


def indented(lines: Sequence[str], level: int = 1) -> str:
    """Lines of a body, each moved in by `level` steps of four spaces."""
    return "\n".join("    " * level + line for line in lines)


def transformed(
    program: Program, inputs: Sequence[str], outputs: Sequence[str], temp: str
) -> list[str]:
    """Assignments `output = ...` of a transform program on named blocks, all in float32.

    temp: prefix of temporaries, unique in the kernel
    """
    return program.source(inputs, outputs, constant, temp)


def constant(c: Fraction) -> str:
    """A factor as a Python literal; Triton takes it to the precision of the block it multiplies."""
    return repr(float(c))
