"""The functions people call, on NumPy arrays or PyTorch tensors: check, plan, pack, run.

This module owns every allocation: output, workspace and packed weights. Kernels own nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from . import backends, planner
from .epilogue import Epilogue
from .errors import GeometryError, UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .layouts import CONTIGUOUS, is_tensor, layout_of
from .layouts import dense_layout as dense_layout
from .plan import Plan

Array = Any  # np.ndarray or torch.Tensor
NUMPY_DTYPES = ("float32", "float64")
TORCH_DTYPES = ("float32", "float64", "float16", "bfloat16")
_scratch = threading.local()


def conv1d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    residual: Array | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = planner.DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
) -> Array:
    """1D convolution; layouts, options and errors as for `conv3d`.

    input   (N, C, T), or (C, T) without a batch
    weight  (K, C / groups, KT)
    result  (N, K, OT)
    """
    return _conv(
        1, input, weight, bias, stride, padding, dilation, groups, activation, residual,
        algorithm, backend, tolerance, max_workspace_bytes,
    )  # fmt: skip


def conv2d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    residual: Array | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = planner.DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
) -> Array:
    """2D convolution; layouts, options and errors as for `conv3d`.

    input   (N, C, H, W), or (C, H, W) without a batch
    weight  (K, C / groups, KH, KW)
    result  (N, K, OH, OW)
    """
    return _conv(
        2, input, weight, bias, stride, padding, dilation, groups, activation, residual,
        algorithm, backend, tolerance, max_workspace_bytes,
    )  # fmt: skip


def conv3d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    residual: Array | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = planner.DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
) -> Array:
    """3D convolution of NumPy arrays or PyTorch tensors; a tensor in gives a tensor out.

    input   (N, C, T, H, W), or (C, T, H, W) without a batch; any strides
    weight  (K, C / groups, KT, KH, KW)
    bias    (K,) or None
    result  (N, K, OT, OH, OW), in the memory layout of the input

    Keyword options:
    activation  'none', 'relu', 'silu', 'hardswish' or 'sigmoid', applied last
    residual    an array of the result's shape, added before the activation
    algorithm   'auto', 'direct', 'winograd', 'depthwise' or 'grouped'
    backend     'auto', 'reference', 'numba', 'c', 'triton' or 'torch'
    tolerance   largest expected error in multiples of a direct sum's in the same precision; 4
    max_workspace_bytes  most scratch memory our kernels may ask for; None for no limit

    Equivalent to `F.conv3d(input, weight, bias, stride, padding, dilation, groups)` of PyTorch,
    then the residual and the activation.

    Raises GeometryError for shapes that do not fit, UnsupportedError for valid requests nobody
    serves, BackendError for a backend that is not available.
    """
    return _conv(
        3, input, weight, bias, stride, padding, dilation, groups, activation, residual,
        algorithm, backend, tolerance, max_workspace_bytes,
    )  # fmt: skip


def _conv(
    n: int,
    input: Array,
    weight: Array,
    bias: Array | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    activation: str,
    residual: Array | None,
    algorithm: str,
    backend: str,
    tolerance: float,
    max_workspace_bytes: int | None,
) -> Array:
    op, key = f"conv{n}d", None
    if is_tensor(input) and is_tensor(weight):
        from . import torch_ops

        options = (
            n, stride, padding, dilation, groups, activation,
            algorithm, backend, tolerance, max_workspace_bytes,
        )  # fmt: skip
        key = torch_ops.key_of(input, weight, bias, residual, options)
        if key is None:
            given = (input, weight, bias, residual)
            input, weight, bias, residual = torch_ops.as_autocast_does(*given)
        else:
            run = torch_ops.known(key)
            if run is not None:
                packed = torch_ops.held_weights(weight).form(run, weight)
                return run(input, packed, bias, residual)
    check_arrays(op, input=input, weight=weight, bias=bias, residual=residual)
    if len(weight.shape) != n + 2:
        raise GeometryError(
            f"{op}: weight must have {n + 2} dimensions, got shape {tuple(weight.shape)}"
        )
    geometry = Geometry.of(input.shape, weight.shape, stride, padding, dilation, groups, op=op)
    unbatched = len(input.shape) == n + 1
    if unbatched:
        input, residual = input[None], None if residual is None else residual[None]
    check_extras(op, geometry.out_channels, geometry.y_shape, bias, residual)
    epilogue = Epilogue(bias is not None, activation, residual is not None)
    if is_tensor(input):
        y = torch_ops.conv(
            input,
            weight,
            bias,
            geometry,
            epilogue,
            residual,
            key=None if unbatched else key,
            algorithm=algorithm,
            backend=backend,
            tolerance=float(tolerance),
            max_workspace_bytes=max_workspace_bytes,
        )
    else:
        plan = planner.plan(
            geometry,
            dtype=str(input.dtype),
            epilogue=epilogue,
            layout=layout_of(input),
            algorithm=algorithm,
            backend=backend,
            tolerance=tolerance,
            max_workspace_bytes=max_workspace_bytes,
        )
        y = execute(plan, input, pack(plan, weight), flat(bias), residual)
    return y[0] if unbatched else y


def flat(bias: np.ndarray | None) -> np.ndarray | None:
    """Kernels that see addresses read one element behind the other."""
    return None if bias is None else np.ascontiguousarray(bias)


def separable_block(
    input: Array,
    temporal_weight: Array,
    depthwise_weight: Array,
    pointwise_weight: Array,
    biases: Sequence[Array | None] = (None, None, None),
    activations: Sequence[str] = ("none", "none", "none"),
    residual: Array | None = None,
    stride: Any = 1,
    padding: Any = "same",
    *,
    backend: str = "auto",
    tolerance: float = planner.DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
) -> Array:
    """A fully separable block by the hybrid fast algorithm, in one pass.

    input             (N, C, T, H, W), or without a batch
    temporal_weight   (M, C, KT, 1, 1)
    depthwise_weight  (M, 1, 1, KH, KW)
    pointwise_weight  (K, M, 1, 1, 1)
    biases            (M,), (M,), (K,), each may be None; activations: one per stage
    residual          (N, K, OT, OH, OW) or None, added before the last activation
    stride, padding   per (T, H, W): time in the first stage, space in the second; 'same' with a
                      stride means k // 2

    Equivalent to `conv3d` three times, each with its bias and activation. Raises as `conv3d` does.
    """
    op = "separable_block"
    weights = (temporal_weight, depthwise_weight, pointwise_weight)
    if len(biases) != 3 or len(activations) != 3:
        raise GeometryError(
            f"{op}: needs three biases and three activations, "
            f"got {len(biases)} and {len(activations)}"
        )
    if is_tensor(input):
        from . import torch_ops

        given = torch_ops.as_autocast_does(input, *weights, *biases, residual)
        input, weights, biases, residual = given[0], tuple(given[1:4]), given[4:7], given[7]
    stages = ("temporal", "depthwise", "pointwise")
    check_arrays(
        op,
        input=input,
        **{f"{stage}_weight": w for stage, w in zip(stages, weights, strict=True)},
        **{f"{stage}_bias": b for stage, b in zip(stages, biases, strict=True)},
        residual=residual,
    )
    wt, wd, wp = (w.shape for w in weights)
    geometry = SeparableGeometry.of(input.shape, wt, wd, wp, stride, padding, op=op)
    unbatched = len(input.shape) == 4
    if unbatched:
        input, residual = input[None], None if residual is None else residual[None]
    for stage, bias in zip(geometry.stages, biases, strict=True):
        last = stage is geometry.pointwise
        check_extras(op, stage.out_channels, stage.y_shape, bias, residual if last else None)
    epilogue = (
        Epilogue(biases[0] is not None, activations[0]),
        Epilogue(biases[1] is not None, activations[1]),
        Epilogue(biases[2] is not None, activations[2], residual is not None),
    )
    if is_tensor(input):
        y = torch_ops.separable_block(
            input,
            weights,
            biases,
            geometry,
            epilogue,
            residual,
            backend=backend,
            tolerance=float(tolerance),
            max_workspace_bytes=max_workspace_bytes,
        )
    else:
        plan = planner.plan(
            geometry,
            dtype=str(input.dtype),
            epilogue=epilogue,
            layout=layout_of(input),
            backend=backend,
            tolerance=tolerance,
            max_workspace_bytes=max_workspace_bytes,
        )
        y = execute(plan, input, pack(plan, weights), tuple(map(flat, biases)), residual)
    return y[0] if unbatched else y


def pack(plan: Plan, weights: Any) -> Any:
    """Weights in the form a plan's kernel reads; NumPy arrays, or tensors for the torch backend."""
    return backends.kernel(plan.family, plan.backend).prepack(weights, plan)


def execute(plan: Plan, x: Array, packed: Any, bias: Any, residual: Array | None) -> Array:
    """Run a winograd, depthwise, grouped or hfa plan on NumPy arrays; allocates and returns y.

    x and residual may have any strides; they are copied to plan.layout if they are not dense in it.
    """
    y = empty(plan.geometry.y_shape, x.dtype, plan.layout)
    run(plan, x, packed, bias, residual, y)
    return y


def run(
    plan: Plan, x: np.ndarray, packed: Any, bias: Any, residual: np.ndarray | None, y: np.ndarray
) -> None:
    """`execute` into a y that is dense in plan.layout."""
    if not y.size:
        return
    module = backends.kernel(plan.family, plan.backend)
    x, residual = dense(x, plan.layout), dense(residual, plan.layout)
    module.run(plan, x, packed, bias, residual, y, workspace(module.workspace_size(plan), y.dtype))


def dense(array: Array | None, layout: str) -> Array:
    """The array itself if it is dense in the layout, else a copy that is."""
    if array is None or layout == CONTIGUOUS:
        return array if array is None else np.ascontiguousarray(array)
    last = array.transpose(0, *range(2, array.ndim), 1)
    if last.flags.c_contiguous:
        return array
    return np.moveaxis(np.ascontiguousarray(last), -1, 1)


def empty(shape: tuple[int, ...], dtype: Any, layout: str) -> np.ndarray:
    if layout == CONTIGUOUS:
        return _aligned(shape, np.dtype(dtype))
    return np.moveaxis(_aligned((shape[0], *shape[2:], shape[1]), np.dtype(dtype)), -1, 1)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, from a cache line on: NumPy's large arrays begin within one, which costs every
    vector that is stored a second line."""
    size, line = prod(shape), 64 // dtype.itemsize
    memory = np.empty(size + line, dtype)
    skip = -memory.ctypes.data % 64 // dtype.itemsize
    return memory[skip : skip + size].reshape(shape)


def workspace(size: int, dtype: np.dtype) -> np.ndarray:
    """Scratch of this thread, kept between calls: fresh pages would cost more than many kernels."""
    held = _scratch.__dict__.get(dtype.char)
    if held is None or held[0] < size:
        held = _grown(size, dtype)
    array: np.ndarray = held[2]
    return array[:size]


def workspace_address(size: int) -> int:
    """`workspace` in float32, for those who see addresses only."""
    held = _scratch.__dict__.get("f")
    if held is None or held[0] < size:
        held = _grown(size, np.dtype(np.float32))
    address: int = held[1]
    return address


def _grown(size: int, dtype: np.dtype) -> tuple[int, int, np.ndarray]:
    """New scratch of this thread: its size, address and array."""
    array = _aligned((size,), dtype)
    held = _scratch.__dict__[dtype.char] = (size, array.ctypes.data, array)
    return held


def check_arrays(op: str, **arrays: Array | None) -> None:
    """One kind, one supported precision, one device for all arrays of a call; biases and residuals
    may be None."""
    optional = {name for name in arrays if name.endswith(("bias", "residual"))}
    given: dict[str, Any] = {n: a for n, a in arrays.items() if a is not None or n not in optional}
    check_dense(op, **given)
    (first, x), *rest = given.items()
    tensor = is_tensor(x)
    allowed = TORCH_DTYPES if tensor else NUMPY_DTYPES
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in allowed:
        raise UnsupportedError(
            f"{op}: dtype {dtype} is not supported; use one of {', '.join(allowed)}"
        )
    for name, a in rest:
        if a.dtype != x.dtype:
            other = str(a.dtype).removeprefix("torch.")
            raise UnsupportedError(f"{op}: {first} has dtype {dtype}, but {name} has {other}")
        if tensor and a.device != x.device:
            raise UnsupportedError(
                f"{op}: {first} is on device {x.device}, but {name} is on {a.device}"
            )


def check_dense(op: str, **arrays: Array) -> None:
    """Every array a NumPy array, or every one a dense PyTorch tensor."""
    first, x = next(iter(arrays.items()))
    tensor = is_tensor(x)
    for name, a in arrays.items():
        if not isinstance(a, np.ndarray) and not is_tensor(a):
            raise UnsupportedError(
                f"{op}: {name} must be a NumPy array or a PyTorch tensor, got {type(a).__name__}"
            )
        if is_tensor(a) != tensor:
            raise UnsupportedError(
                f"{op}: {first} and {name} must both be NumPy arrays or both PyTorch tensors"
            )
        if tensor and (a.is_nested or a.is_quantized or str(a.layout) != "torch.strided"):
            kind = "nested" if a.is_nested else "quantized" if a.is_quantized else str(a.layout)
            raise UnsupportedError(f"{op}: {name} must be a dense tensor, got a {kind} one")


def check_extras(
    op: str, channels: int, y_shape: tuple[int, ...], bias: Array | None, residual: Array | None
) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        raise GeometryError(f"{op}: bias must have shape ({channels},), got {tuple(bias.shape)}")
    if residual is not None and tuple(residual.shape) != y_shape:
        raise GeometryError(
            f"{op}: residual must have the result's shape {y_shape}, got {tuple(residual.shape)}"
        )
