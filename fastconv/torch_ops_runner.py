"""Plans on tensors: kernels on NumPy arrays see zero-copy views, the others the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, ops, torch_memory
from .counts import ELEMENT_BYTES
from .epilogue import Epilogue
from .ops import workspace_address
from .plan import CONTIGUOUS, Plan
from .torch_ops_packed import ON_TENSORS, held_weights, view

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

# PyTorch has a memory format for 2 and 3 axes; one axis is channels last by its strides.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
FLOAT32 = np.dtype(np.float32)


class Runner:
    """A plan ready for many calls: its kernel, workspace and output shape are looked up once."""

    def __init__(self, plan: Plan) -> None:
        module = backends.kernel(plan.family, plan.backend)
        self.plan, self._layout = plan, plan.layout
        self._run = module.run
        self._size_of = module.workspace_size
        self._sizes: dict[int, int] = {}  # by number of threads
        self._y_shape, self._y_strides = plan.geometry.y_shape, None
        self._nothing = 0 in self._y_shape
        y_bytes = prod(self._y_shape) * ELEMENT_BYTES[plan.dtype]
        if plan.device != "cpu" or y_bytes < torch_memory.SMALLEST:
            # PyTorch's allocator has memory at hand.
            self._y_strides = dense_strides(self._y_shape, plan.layout)
        # PyTorch's convolution allocates its own result: one pass over memory less than `run`.
        plain = isinstance(plan.epilogue, Epilogue) and plan.epilogue.plain
        direct = plan.backend == "torch" and plan.family in ("grouped", "depthwise")
        dense_module = backends.kernel("grouped", "torch") if direct and plain else None
        self._convolve = None if dense_module is None else dense_module.convolve

    def __call__(self, x: Tensor, packed: Any, bias: Any, residual: Tensor | None = None) -> Tensor:
        """y (N, K, *out_size) in the plan's layout, without a gradient; x may have any strides."""
        layout = self._layout
        x = dense(x, layout)
        if self._convolve is not None:
            return dense(self._convolve(x, packed, bias, self.plan.geometry), layout)
        if residual is not None:
            residual = dense(residual, layout)
        bias = tuple(map(flat, bias)) if isinstance(bias, tuple) else flat(bias)
        y = self._new_y(x)
        if not self._nothing:
            self._write(x, packed, bias, residual, y)
        return y

    def _new_y(self, x: Tensor) -> Tensor:
        if self._y_strides is None:
            return new_dense(self._y_shape, x, self._layout)
        return x.new_empty_strided(self._y_shape, self._y_strides)

    def _write(self, x: Tensor, packed: Any, bias: Any, residual: Any, y: Tensor) -> None:
        """Run the kernel; everything is dense."""
        if self.plan.backend in ON_TENSORS:
            scratch = device_workspace(self._size_of(self.plan), y)
            self._run(self.plan, x, packed, bias, residual, y, scratch)
            return
        threads = follow_threads() if self.plan.backend == "numba" else 0
        size = self._sizes.get(threads)
        if size is None:
            size = self._sizes[threads] = self._size_of(self.plan)
        b = tuple(map(view, bias)) if isinstance(bias, tuple) else view(bias)
        x_view, y_view = view(x), view(y)
        workspace = ops.workspace(size, y_view.dtype)
        self._run(self.plan, x_view, packed, b, view(residual), y_view, workspace)


class _RunnerInC(Runner):
    """Of kernels that see addresses only, and know what was packed: few steps for small layers."""

    def __call__(self, x: Tensor, packed: Any, bias: Any, residual: Tensor | None = None) -> Tensor:
        layout = self._layout
        x, residual = dense(x, layout), dense(residual, layout)
        biases: Any
        if bias is None:
            biases = _NO_BIASES
        elif isinstance(bias, tuple):
            bias = tuple(map(flat, bias))
            biases = tuple(0 if b is None else b.data_ptr() for b in bias)
        else:
            bias = flat(bias)
            biases = (bias.data_ptr(), 0, 0)
        y = self._new_y(x)
        if not self._nothing:
            added = 0 if residual is None else residual.data_ptr()
            packed.run_at(x.data_ptr(), biases, added, y.data_ptr(), workspace_address)
        return y


_NO_BIASES = (0, 0, 0)


def is_plain(first: Tensor, *others: Tensor | None, gradients: bool = True) -> bool:
    """Ordinary dense tensors of one device and precision in an ordinary call: no gradient is
    asked for, nobody traces, transforms or watches, and no operator is needed for anything else.

    gradients: False where none is kept, whoever asks
    """
    if _is_compiling() or _watchers() or _traces() is not None or _transforms():
        return False
    if forward_ad._current_level >= 0 or _autocasts():
        return False
    if type(first) is not Tensor or first.layout is not _STRIDED or first.is_nested:
        return False
    if first.is_neg():
        return False
    dtype, on_cpu = first.dtype, first.is_cpu
    if not on_cpu:
        device = first.device
        if device.type == "meta" or any(t is not None and t.device != device for t in others):
            return False
    if gradients and _grad_enabled() and _any_requires_grad(first, *others):
        return False
    for t in others:
        if t is None:
            continue
        if type(t) not in _ORDINARY or t.dtype is not dtype or t.is_cpu is not on_cpu:
            return False
        if t.layout is not _STRIDED or t.is_neg():
            return False
    return True


# Looked up once: a call of a small layer asks all of them.
_is_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_any_requires_grad, _autocasts = torch._C._any_requires_grad, torch._C._is_any_autocast_enabled
_watchers, _traces = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transforms = torch._C._are_functorch_transforms_active
_STRIDED = torch.strided
_ORDINARY = (Tensor, torch.nn.Parameter)


def flat(bias: Tensor | None) -> Tensor | None:
    """Kernels that see addresses read one element behind the other."""
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


@lru_cache(maxsize=4096)
def runner(plan: Plan) -> Runner:
    """The plan's Runner."""
    return (_RunnerInC if plan.backend == "c" else Runner)(plan)


def execute(plan: Plan, x: Tensor, packed: Any, bias: Any, residual: Tensor | None) -> Tensor:
    """`ops.execute` on tensors: y is allocated by PyTorch, kernels on NumPy arrays see views."""
    return runner(plan)(x, packed, bias, residual)


def packed_weights(plan: Plan, weight: Tensor) -> Any:
    """The weights in the form that a plan's kernel reads, packed once per tensor and content."""
    return held_weights(weight).form(runner(plan), weight)


def device_workspace(size: int, like: Tensor) -> Tensor | None:
    """Scratch for a kernel on the stream of this call: PyTorch's allocator keeps streams apart."""
    return like.new_empty(size) if size else None


def precision_of(input: Tensor) -> str:
    """'tf32' where the user lets PyTorch's own convolutions of this tensor round to TF32."""
    if input.device.type != "cuda" or input.dtype != torch.float32:
        return "ieee"
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


def dtype_of(tensor: Tensor) -> str:
    """The name of a tensor's precision."""
    return str(tensor.dtype).removeprefix("torch.")


def new_dense(shape: Sequence[int], like: Tensor, layout: str) -> Tensor:
    """An uninitialised tensor (N, C, *size) in a layout."""
    memory = tuple(shape) if layout == CONTIGUOUS else (shape[0], *shape[2:], shape[1])
    plain = type(like) is Tensor and like.device.type == "cpu"
    if plain and like.dtype in torch_memory.DTYPES:
        y = torch_memory.empty(memory, like.dtype)
    else:
        y = like.new_empty(memory)
    return y if layout == CONTIGUOUS else y.movedim(-1, 1)


def dense_strides(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """Strides of a tensor (N, C, *size) that is dense in a layout."""
    order = range(len(shape)) if layout == CONTIGUOUS else (0, *range(2, len(shape)), 1)
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def dense(tensor: MaybeTensor, layout: str) -> MaybeTensor:
    """The tensor itself if it is dense in the layout, else a copy that is."""
    if tensor is None:
        return None
    if layout == CONTIGUOUS:
        return tensor.contiguous()
    if tensor.dim() in _CHANNELS_LAST:
        return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def follow_threads() -> int:
    """`torch.set_num_threads` rules the Numba kernels too; their number."""
    import numba

    from .numba_kernels import simd

    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if simd.threads() != wanted:
        numba.set_num_threads(wanted)
    return wanted
