"""The way from a plan and arrays into the C library, and its instruction set.

Kernels see addresses only: everything else follows from the plan and is put into C structures once,
when the weights are packed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from ..epilogue import ACTIVATIONS, Epilogue
from ..errors import BackendError
from ..geometry import Geometry
from ..plan import CHANNELS_LAST, CONTIGUOUS, Plan
from ._csrc import ffi, lib

Scratch = Callable[[int], int]  # floats -> the address of as many that nobody else uses meanwhile
FAMILIES = ("winograd", "depthwise", "grouped", "hfa", "continual")  # csrc/families.h
LINE = 16  # floats of a cache line
_fc_run, _fc_step, _fc_max_threads = lib.fc_run, lib.fc_step, lib.fc_max_threads


def instruction_sets() -> dict[str, int]:
    """The compiled instruction sets that this CPU has, best first, with their index."""
    found, index = {}, 0
    while (name := lib.fc_isa_name(index)) != ffi.NULL:
        if lib.fc_isa_usable(index):
            found[ffi.string(name).decode()] = index
        index += 1
    return found


def _chosen() -> str:
    usable = instruction_sets()
    wanted = os.environ.get("FASTCONV_ISA")
    if not wanted:
        return next(iter(usable))
    if wanted not in usable:
        raise BackendError(
            f"FASTCONV_ISA={wanted} cannot run here. Usable on this CPU: {', '.join(usable)}"
        )
    return wanted


_isa = _chosen()


def isa() -> str:
    """The instruction set that plans are packed for: the best one, or what FASTCONV_ISA says."""
    return _isa


def lanes() -> int:
    """Floats per vector of the instruction set."""
    return int(lib.fc_isa_lanes(instruction_sets()[_isa]))


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Pack for another instruction set meanwhile; what is packed keeps running on its own.

    For tests and measurements: not for several threads at once.
    """
    global _isa
    usable = instruction_sets()
    if name not in usable:
        raise BackendError(f"instruction set {name!r} cannot run here. Usable: {', '.join(usable)}")
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


def threads() -> int:
    """Threads that a kernel uses: PyTorch's number where it is loaded, else OpenMP's."""
    most: int = _fc_max_threads()
    torch = sys.modules.get("torch")
    if most == 1 or torch is None:
        return most
    return torch.get_num_threads()


def address(array: Any) -> int:
    """Address of the first element of a NumPy array or a tensor; 0 for None."""
    if array is None:
        return 0
    pointer = getattr(array, "data_ptr", None)
    return pointer() if pointer is not None else array.__array_interface__["data"][0]


def aligned(*shape: int) -> np.ndarray:
    """Zeros in float32 and C order that begin at a cache line, with a spare line behind."""
    size = prod(shape)
    memory = np.zeros(size + 2 * LINE, np.float32)
    start = -(address(memory) // 4) % LINE
    return memory[start : start + size].reshape(shape)


def lines(size: int) -> int:
    """Floats rounded up to whole cache lines."""
    return -(-size // LINE) * LINE


@lru_cache(maxsize=4096)
def copies_size(plan: Plan) -> int:
    """Floats in front of a family's own: transposed copies and, of a stream, a table of frames."""
    params = ffi.NULL
    if plan.family == "continual":
        fields = {"taps": plan.geometry.kernel[0], "sums": plan.options.get("sum", 0)}
        params = ffi.new("fc_continual *", fields)
    return int(lib.fc_copies_size(_c_plan(plan, params)))


def workspace_elements(plan: Plan, shared: int, each: int) -> int:
    """Floats of a workspace: transposed copies, what all threads share, and what each has."""
    return copies_size(plan) + lines(shared) + threads() * lines(each)


def _c_plan(plan: Plan, params: Any) -> Any:
    last = plan.epilogue[-1] if isinstance(plan.epilogue, tuple) else plan.epilogue
    geometry = plan.geometry
    first = 3 if plan.family == "continual" else 2  # of the axes that the copies hold
    return ffi.new(
        "fc_plan *",
        {
            "isa": instruction_sets()[_isa],
            "family": FAMILIES.index(plan.family),
            "contiguous": plan.layout == CONTIGUOUS,
            "has_residual": last.residual,
            "batch": geometry.x_shape[0],
            "in_channels": geometry.x_shape[1],
            "out_channels": geometry.y_shape[1],
            "in_points": prod(geometry.x_shape[first:]),
            "out_points": prod(geometry.y_shape[first:]),
            "params": params,
        },
    )


def c_geometry(geometry: Geometry) -> dict[str, Any]:
    """An initialiser of fc_geometry: three axes."""
    g = geometry.lifted()
    return {
        "batch": g.batch,
        "in_channels": g.in_channels,
        "out_channels": g.out_channels,
        "groups": g.groups,
        "in_size": g.in_size,
        "out_size": g.out_size,
        "kernel": g.kernel,
        "stride": g.stride,
        "dilation": g.dilation,
        "pad": [before for before, _ in g.padding],
    }


def activation_of(epilogue: Epilogue) -> int:
    """The number of an activation in C."""
    return ACTIVATIONS.index(epilogue.activation)


class Packed:
    """Weights in a family's form, with the C structures of the plan that reads them.

    weights  the array that the kernel gets
    params   the family's C structure; `keep` is what it points to
    shared, each  floats of workspace for all threads together and for every thread, lines each
    """

    __slots__ = ("_address", "_fixed", "_keep", "_plan", "each", "params", "shared", "weights")

    def __init__(
        self,
        plan: Plan,
        weights: np.ndarray,
        params: Any,
        shared: int = 0,
        each: int = 0,
        keep: Sequence[Any] = (),
    ) -> None:
        self.weights, self.params, self._keep = weights, params, keep
        self.shared, self.each = lines(shared), lines(each)
        self._plan = _c_plan(plan, params)
        self._address = address(weights)
        self._fixed = copies_size(plan) + self.shared  # floats of any number of threads

    def constants(self, workspace: Any) -> tuple[Any, int, int]:
        """What `lib.fc_run` gets in every call: the C plan, the weights' address, the threads."""
        return self._plan, self._address, self._threads(workspace)

    def run(self, x: Any, bias: Any, residual: Any, y: Any, workspace: Any) -> None:
        """One call of a plan."""
        biases = bias if isinstance(bias, tuple) else (bias, None, None)
        lib.fc_run(
            self._plan,
            address(x),
            self._address,
            address(biases[0]),
            address(biases[1]),
            address(biases[2]),
            address(residual),
            address(y),
            address(workspace),
            self._threads(workspace),
        )

    def run_at(
        self, x: int, biases: tuple[int, int, int], residual: int, y: int, scratch: Scratch
    ) -> None:
        """`run` by addresses, 0 for what is not there: asking arrays takes longer than a small
        layer."""
        n = threads()
        bias, bias1, bias2 = biases
        _fc_run(
            self._plan, x, self._address, bias, bias1, bias2, residual, y,
            scratch(self._fixed + n * self.each), n,
        )  # fmt: skip

    def step(
        self,
        x: Any,
        bias: Any,
        residual: Any,
        state: Any,
        steps: Any,
        y: Any,
        workspace: Any,
        active: Any = None,
        update: bool = True,
    ) -> None:
        """One step of a stream."""
        lib.fc_step(
            self._plan,
            address(x),
            self._address,
            address(bias),
            address(residual),
            address(state),
            address(steps),
            steps.strides[0] // 8,
            address(y),
            address(workspace),
            address(active),
            update,
            self._threads(workspace),
        )

    def step_at(
        self,
        x: int,
        bias: int,
        residual: int,
        state: int,
        steps: int,
        steps_stride: int,
        y: int,
        scratch: Scratch,
        active: int,
        update: bool,
    ) -> None:
        """`step` by addresses, 0 for what is not there."""
        n = threads()
        _fc_step(
            self._plan, x, self._address, bias, residual, state, steps, steps_stride, y,
            scratch(self._fixed + n * self.each), active, update, n,
        )  # fmt: skip

    def workspace_size(self) -> int:
        """Floats that a call needs with as many threads as now."""
        return self._fixed + threads() * self.each

    def _threads(self, workspace: Any) -> int:
        """No more threads than the workspace was made for."""
        if not self.each:
            return threads()
        room = workspace.size - self._fixed
        if room < self.each:
            raise BackendError(
                f"the workspace has {workspace.size} elements; "
                f"one thread needs {self._fixed + self.each}"
            )
        return min(threads(), room // self.each)


def refuse_dtype(dtype: str) -> str | None:
    """The C kernels compute in float32."""
    return None if dtype == "float32" else f"dtype {dtype} is not float32"


__all__ = ["CHANNELS_LAST", "Packed", "ffi", "lib"]
