"""One kernel start as data: what `run` does on a GPU, and what can be compiled without one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from ..epilogue import Epilogue
from ..plan import Plan
from . import interpreter

DTYPES = ("float32", "float16", "bfloat16")
INT32_MAX = 2**31 - 1
_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int64": "*i64"}

Tensor = torch.Tensor

if interpreter.interpreted():
    interpreter.mend()


@dataclass(frozen=True)
class Launch:
    """A kernel with everything but its arrays; a plan's launches are computed once.

    kernel     a @triton.jit function whose parameters are pointers, then integers, then constexprs
    programs   size of its grid, which has one axis (the only one that counts beyond 65535)
    arrays     the name of the array behind each pointer parameter, e.g. 'x', 'packed', 'y'
    scalars    the values of the integer parameters
    constants  the constexprs by name
    registers  a thread's most, so that more threads fit a processor; 0: the compiler decides
    """

    kernel: Any
    programs: int
    arrays: tuple[str, ...]
    scalars: tuple[int, ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()
    warps: int = 4
    stages: int = 3
    registers: int = 0

    def __call__(self, arrays: Mapping[str, Tensor | None]) -> None:
        """Start it on the current stream; an array that is None arrives as the constexpr None."""
        if self.programs:
            self.kernel[(self.programs,)](
                *(arrays[name] for name in self.arrays),
                *self.scalars,
                **dict(self.constants),
                **self.options,
            )

    def source(self, dtypes: Mapping[str, str | None]) -> Any:
        """What `triton.compile` takes, for arrays of these dtypes by name; None: not given.

        Specialised as Triton itself would: arrays begin at multiples of 16 bytes, integers that are
        1 are constants, and those divisible by 16 are known to be; unless the kernel is general in
        them.
        """
        names = self.kernel.arg_names
        signature: dict[str, str] = {}
        constants: dict[str, Any] = dict(self.constants)
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for i, name in enumerate(names):
            if i < len(self.arrays):
                dtype = dtypes[self.arrays[i]]
                signature[name] = "constexpr" if dtype is None else _POINTERS[dtype]
                divisible = dtype is not None
                if dtype is None:
                    constants[name] = None
            elif name in constants:
                signature[name], divisible = "constexpr", False
            else:
                value = self.scalars[i - len(self.arrays)]
                general = self.kernel.params[i].do_not_specialize
                if value == 1 and not general:
                    signature[name], divisible, constants[name] = "constexpr", False, 1
                else:
                    signature[name] = "i32" if abs(value) <= INT32_MAX else "i64"
                    divisible = value % 16 == 0 and not general
            if divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return triton.compiler.ASTSource(self.kernel, signature, constants, attributes)

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers else options


def refuse_dtype(dtype: str) -> str | None:
    """The reason against a dtype, or None."""
    return None if dtype in DTYPES else f"dtype {dtype} is not one of {', '.join(DTYPES)}"


def epilogue_constants(epilogue: Epilogue) -> tuple[tuple[str, Any], ...]:
    """HAS_BIAS, HAS_RESIDUAL and ACTIVATION for a kernel that ends with `finish.store`."""
    return (
        ("HAS_BIAS", epilogue.bias),
        ("HAS_RESIDUAL", epilogue.residual),
        ("ACTIVATION", epilogue.activation),
    )


def on_device(weights: Any, plan: Plan) -> Tensor:
    """Weights, a tensor or a NumPy array, as a tensor in the plan's dtype where the kernels run.

    A tensor that is already on a device of the plan's type stays on it.
    """
    w = (
        torch.from_numpy(np.ascontiguousarray(weights))
        if isinstance(weights, np.ndarray)
        else weights
    )
    w = w.detach()
    device = w.device if w.device.type == plan.device else torch.device(plan.device)
    return w.to(device, getattr(torch, plan.dtype))


def wide(*elements: int) -> bool:
    """Whether offsets into arrays of these sizes, padding included, need 64 bits."""
    return max(elements) > INT32_MAX // 2


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: sizes of blocks are such."""
    return 1 << max(0, n - 1).bit_length()
