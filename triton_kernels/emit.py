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


@lru_cache(maxsize=1024)
def kernel(source: str, *helpers: Any, general: tuple[str, ...] = ()) -> Any:
    """The @triton.jit function whose text this is, `def name(...): ...`; equal texts share it.

    The text may use `tl`, `store`, `activate` and, by their names, @triton.jit functions `helpers`.
    general: integer parameters whose values are of no help to the compiler; otherwise it makes a
    kernel of its own for those that are 1, and for those divisible by 16
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
    return triton.jit(names[name], do_not_specialize=list(general))


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
