"""Triton's interpreter, which runs kernels on CPU tensors, made to compute what a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl


def interpreted() -> bool:
    """Whether the interpreter runs the kernels."""
    return bool(triton.knobs.runtime.interpret)


def mend() -> None:
    """Three things that Triton 3.6 does on a GPU and its interpreter does not.

    Run-time integers bound a loop: they are arrays of one axis there, converted by `int(array)`,
    which NumPy 2.4 refuses. Operands of a product in bfloat16 are the numbers that their bits mean,
    not the integers that hold the bits. And float32 is rounded to bfloat16, not cut.
    """
    from triton.runtime import interpreter

    builder, patch = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    dot, cast = builder.create_dot, builder.cast_impl

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        even = bits + 0x7FFF + (bits >> 16 & 1)
        bits = np.where(np.isfinite(src.data), even, bits | (np.isnan(src.data) << 22))
        return interpreter.TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)

    interpreter._patch_lang_tensor = patched
    builder.create_dot, builder.cast_impl = create_dot, cast_impl
