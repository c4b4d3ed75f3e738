"""Vector code through Numba: building blocks, kernels compiled once per machine, a parallel loop.

The recipe, from the inside out:

1.  A *building block* is a Python function that writes LLVM IR with a `Code` (see `emit`). Its
    first parameter after the code is the element type. Parameters annotated `int` or `str` are
    compile-time constants, `Int` ones are int64 at run time: addresses in bytes, strides and counts
    in elements.

        @block
        def scale(code: Code, dtype: str, factor: int, source: Int, target: Int, count: Int):
            def body(i: Int, _):
                code.store(code.load(source, i) * factor, target, i)
            code.loop(count, body, step=code.lanes)

2.  A *kernel* is plain Numba code with the fixed signature `(params, item, thread)`, made by a
    factory whose arguments are ints and strings. It computes addresses and calls building blocks;
    the factory's arguments are their compile-time constants.

        def scale_kernel(DTYPE, FACTOR):
            def kernel(params, item, thread):
                scale(DTYPE, FACTOR, peek(params, 0), peek(params, 1), peek(params, 2))
            return kernel

3.  `parallel_for(kernel(scale_kernel, "float32", 3), (address(x), address(y), x.size), items)` runs
    it for item = 0 .. items - 1 on Numba's threads; `thread` is below `threads()` and names the
    caller's part of a workspace. One parallel driver serves every kernel. The `address` of a kernel
    can be a parameter of another, which runs it by `call(address, params, item, thread)`.

Disk cache. Numba finds a cached function by its file name, its signature and the constants in its
closure. `kernel` names each specialisation after a digest of its constants and of the sources that
make it, so an edit compiles afresh, and two processes compiling different specialisations never
write the same file. Closure cells must be ints and strings only: building blocks are global names
of the module (a cell holding one would have a new identity in each process). A cache folder that
cannot be written costs time, never a failure.

Offsets are int64. Extents and strides are run-time values: specialise on taps, tiles and block
shapes only.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .emit import ITEM_BYTES, LINE_BYTES, Code, Int, Vec, fma, register_count, vector_width

__all__ = [
    "ITEM_BYTES",
    "LINE_BYTES",
    "Code",
    "Int",
    "Kernel",
    "Vec",
    "address",
    "block",
    "call",
    "compiled",
    "fma",
    "kernel",
    "parallel_for",
    "peek",
    "register_count",
    "threads",
    "vector_width",
]

_SIGNATURE = types.void(types.int64, types.int64, types.int64)


def block(function: Callable) -> Any:
    """Make a building block callable from Numba code. Annotated `-> Int`, it returns an int64."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    static = [p.annotation in ("int", "str", int, str) for p in parameters]
    returns = types.int64 if function.__annotations__.get("return") in ("Int", Int) else types.void

    def typing(_context, *given):
        for is_static, parameter, ty in zip(static, parameters, given, strict=True):
            if is_static and not isinstance(ty, types.Literal):
                name = f"{function.__name__}: {parameter.name}"
                raise TypeError(f"{name} must be a compile-time constant, not {ty}")
        signature = returns(*(t if s else types.int64 for s, t in zip(static, given, strict=True)))

        def generate(context, builder, signature, values):
            code = Code(builder, signature.args[0].literal_value)
            arguments = [
                t.literal_value if s else Int(builder, v)
                for s, t, v in zip(static, signature.args, values, strict=True)
            ]
            result = function(code, *arguments)
            return context.get_dummy_value() if result is None else code.int(result).value

        return signature, generate

    own = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    own += [inspect.Parameter(p.name, p.kind) for p in parameters]
    typing.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    typing.__name__, typing.__doc__ = function.__name__, function.__doc__
    return intrinsic(prefer_literal=True)(typing)


@intrinsic
def peek(_context, params, index):
    """params[index] of an int64 array given by its address."""

    def generate(_context, builder, _signature, values):
        array = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(array, [values[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def call(_context, function, params, item, thread):
    """Run the kernel at the address `function`."""

    def generate(context, builder, _signature, values):
        kernel_type = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        builder.call(builder.inttoptr(values[0], kernel_type.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


class Kernel:
    """A compiled kernel: its address, and whether it came from the disk cache."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled  # keeps the machine code alive
        self.name: str = compiled.__qualname__
        self.address: int = compiled.address
        self.from_cache: bool = compiled.cache_hits > 0

    def assembly(self) -> str:
        """The machine code as text, when it was compiled in this process."""
        return self._compiled._library.get_asm_str()

    def __repr__(self) -> str:
        return f"<Kernel {self.name}>"


_OTHER_SOURCES = ("programs", "transforms")  # what building blocks are also made from


@functools.cache
def _source_stamp() -> bytes:
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), *(here.parent / f"{n}.py" for n in _OTHER_SOURCES)]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.digest()


_compile_lock = threading.Lock()
_kernels: dict[tuple, Kernel] = {}


def kernel(factory: Callable, *constants: int | str) -> Kernel:
    """The kernel `factory(*constants)`, compiled or loaded once per process.

    Raises TypeError for constants that are not ints or strings.
    """
    key = (factory, constants)
    with _compile_lock:
        if key not in _kernels:
            _kernels[key] = _compile(factory, constants)
        return _kernels[key]


def compiled() -> tuple[Kernel, ...]:
    """Every kernel of this process so far."""
    return tuple(_kernels.values())


def _compile(factory: Callable, constants: tuple) -> Kernel:
    if not all(isinstance(c, (int, str)) for c in constants):
        raise TypeError(f"{factory.__name__}: constants must be ints or strings, got {constants}")
    digest = hashlib.sha256(_source_stamp() + repr((vector_width("float32"), constants)).encode())
    function = factory(*constants)
    function.__qualname__ = function.__name__ = f"{factory.__name__}-{digest.hexdigest()[:16]}"

    def compile_with(cache: bool) -> Any:
        return numba.cfunc(_SIGNATURE, cache=cache, error_model="numpy")(function)

    return Kernel(_cached(compile_with))


def _cached(compile_with: Callable[[bool], Any]) -> Any:
    """compile_with(True), or compile_with(False) where the disk refuses to keep the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", numba.NumbaWarning)
        try:
            return compile_with(True)
        except Exception:  # no permission, a full disk, a damaged file; a real error comes again
            return compile_with(False)


def address(array: np.ndarray | None) -> int:
    """Address of an array's first element; 0 for None. The caller keeps the array alive."""
    return 0 if array is None else array.__array_interface__["data"][0]


def threads() -> int:
    """Threads that `parallel_for` uses now."""
    _start_threads()
    return numba.get_num_threads()


@functools.cache
def _start_threads() -> None:
    """Let Numba start its threads: where they are OpenMP's, that sets PyTorch's number as well."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch is not None else 0
    numba.get_num_threads()
    if torch is not None:
        torch.set_num_threads(before)


def _drive_parallel(function, params, items):
    start = params.ctypes.data
    for item in numba.prange(items):
        call(function, start, item, numba.get_thread_id())


def _drive_serial(function, params, items):
    start = params.ctypes.data
    for item in range(items):
        call(function, start, item, 0)


@functools.cache
def _driver(parallel: bool) -> Any:
    signature = types.void(types.int64, types.int64[::1], types.int64)
    function = _drive_parallel if parallel else _drive_serial

    def compile_with(cache: bool) -> Any:
        return numba.njit(signature, parallel=parallel, cache=cache, nogil=True)(function)

    return _cached(compile_with)


_launch_lock = threading.Lock()
_launched_in: int | None = None  # the process that started Numba's threads


def parallel_for(kernel: Kernel, params: Sequence[int], items: int) -> None:
    """Run `kernel(params, item, thread)` for every item below `items`, in parallel, in any order.

    Safe to call from several Python threads at once: a threading layer that is not (workqueue) is
    used by one at a time. In a forked child of a process that has used the threads, where OpenMP
    cannot go on, the items run in the calling thread alone.
    """
    global _launched_in
    if items <= 0:
        return
    block = np.array(params, np.int64)
    if items == 1 or threads() == 1 or _launched_in not in (None, os.getpid()):
        _driver(False)(kernel.address, block, items)
        return
    if _launched_in is not None and numba.threading_layer() != "workqueue":
        _driver(True)(kernel.address, block, items)
        return
    with _launch_lock:
        _launched_in = os.getpid()
        _driver(True)(kernel.address, block, items)
