"""Builds the C backend: one extension on the stable ABI, bound with cffi in API mode.

The straight-line transform programs are generated here, from the same exact transforms as on every
other backend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).parent
MODULE = "fastconv.c_kernels._csrc"
# What Python may call: read by cffi, so each is free of preprocessor lines.
HEADERS = (
    "fastconv.h",
    "grouped.h",
    "winograd.h",
    "depthwise.h",
    "hfa.h",
    "continual.h",
    "gradients.h",
    "elementwise.h",
    "play.h",
)
SOURCES = (
    "fastconv.c",
    "step.c",
    "play.c",
    "gradients.c",
    "isa_avx512.c",
    "isa_avx2.c",
    "isa_plain.c",
)
# F(m, r) with compiled programs; `fastconv.c_kernels.winograd` refuses others.
TILES, TAPS = range(1, 7), range(2, 8)


def glue() -> str:
    """The extension's C source: cffi's wrappers round the declarations of HEADERS."""
    from cffi import FFI

    ffi = FFI()
    for name in HEADERS:
        ffi.cdef((HERE / name).read_text())
    includes = "".join(f'#include "{name}"\n' for name in HEADERS)
    ffi.set_source(
        MODULE, f"#include <stddef.h>\n#include <stdint.h>\n{includes}", py_limited_api=True
    )
    return _emitted(ffi)


def _emitted(ffi) -> str:  # type: ignore[no-untyped-def]  # cffi has no types
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "glue.c"
        ffi.emit_c_code(str(target))
        return target.read_text()


def programs() -> str:
    """The header programs.h: input and output transforms of every F(m, r) as inline functions."""
    sys.path.insert(0, str(HERE.parent))
    try:
        from fastconv.transforms import transform
    finally:
        sys.path.pop(0)
    lines = ["/* Straight-line programs of F(m, r): v = BT d and y = AT m. */", "#pragma once", ""]
    for r in TAPS:
        for m in TILES:
            t = transform(m, r)
            lines += [
                *_function(f"bt_{m}_{r}", t.input_program),
                *_function(f"at_{m}_{r}", t.output_program),
            ]
    pairs = "".join(f" X({m}, {r}, {m + r - 1})" for r in TAPS for m in TILES)
    return "\n".join([*lines, f"#define EACH_PROGRAM(X){pairs}", ""])


def _function(name: str, program) -> Iterator[str]:  # type: ignore[no-untyped-def]
    outputs = [f"out[{i}]" for i in range(len(program.results))]
    inputs = [f"in{i}" for i in range(program.inputs)]
    yield f"INLINE void {name}(const vec *in, vec *out) {{"
    for i, value in enumerate(inputs):
        yield f"    const vec {value} = in[{i}];"
    for line in program.source(inputs, outputs, _constant):
        yield f"    {line};" if line.startswith("out[") else f"    const vec {line};"
    yield "}"


def _constant(c: Fraction) -> str:
    """Rounded once, to float."""
    import numpy as np

    return f"{float(np.float32(c.numerator / c.denominator))!r}f"
