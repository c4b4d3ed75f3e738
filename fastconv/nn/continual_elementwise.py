"""What stands between the convolutions of a stream: means, scales, sums, activations, pooling.

Our C kernels do it for float32 in main memory, in a clip as in a step, so that both have the same
bits; PyTorch does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastconv import backends, ops, torch_ops, torch_ops_block, torch_ops_runner
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST

_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def kernels() -> Any:
    """The launchers of the C kernels."""
    from fastconv.c_kernels import elementwise

    return elementwise


@cache
def has_c() -> bool:
    """Whether the C kernels are there."""
    return backends.why_not("c") is None


def in_c(x: Tensor, scale: Tensor | None = None, residual: Tensor | None = None) -> bool:
    """Whether the C kernels take these: no gradient is asked for, nobody traces or compiles."""
    # Of one precision and device: see is_plain.
    mine = x.dtype == torch.float32 and x.is_cpu and x.numel() > 0
    return mine and torch_ops_runner.is_plain(x, scale, residual) and has_c()


def like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor of a shape, dense with channels last."""
    strides = torch_ops_runner.dense_strides(shape, CHANNELS_LAST)
    return x.new_empty_strided(shape, strides)


def address(x: Tensor) -> tuple[Tensor, int]:
    """x dense with channels last, to be kept, and where it lies."""
    held = torch_ops.dense(x, CHANNELS_LAST)
    return held, held.data_ptr()


def means_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], *(1,) * (len(shape) - 2))


def spatial_mean(x: Tensor) -> Tensor:
    """(N, C, 1, *size) averaged over its positions, (N, C, 1, 1, ...)."""
    axes = tuple(range(3, x.dim()))
    if not axes:
        return x
    if not in_c(x):
        return x.mean(axes, keepdim=True)
    small, y = kernels(), like(x, means_shape(x.shape))
    params = small.means(x.shape)
    scratch = ops.workspace(small.means_size(params), torch_ops_runner.FLOAT32)
    x, at = address(x)
    small.lib.fc_run_means(params, at, y.data_ptr(), scratch.ctypes.data, torch.get_num_threads())
    return y


@dataclass(frozen=True)
class Blend:
    """activation(x * scale + residual), of values that are given in this order."""

    scaled: bool = False
    added: bool = False
    activation: str = "none"

    def parts(self, *xs: Any) -> tuple[Any, Any, Any] | None:
        """What are x, scale and residual, by their shapes; None where the kernel has no such form.

        xs: what has a shape
        """
        x, *rest = xs
        scale = rest.pop(0) if self.scaled else None
        if scale is not None and x.shape == means_shape(scale.shape):
            x, scale = scale, x
        residual = rest.pop(0) if self.added else None
        fits = len(x.shape) > 1 and (scale is None or scale.shape == means_shape(x.shape))
        fits = fits and (residual is None or residual.shape == x.shape)
        return (x, scale, residual) if fits else None

    def __call__(self, *xs: Tensor) -> Tensor:
        parts = self.parts(*xs) if in_c(*xs) else None
        if parts is None:
            z, *rest = xs
            z = z * rest.pop(0) if self.scaled else z
            z = z + rest.pop(0) if self.added else z
            return torch_ops_block.ACTIVATIONS[self.activation](z)
        x = parts[0]
        small, y = kernels(), like(x, x.shape)
        params = small.blend(x.shape, self.activation, per_image=self.scaled)
        held = [(None, 0) if part is None else address(part) for part in parts]
        (_, at), (_, scale), (_, residual) = held
        threads = torch.get_num_threads()
        small.lib.fc_run_blend(params, at, scale, 0, residual, y.data_ptr(), threads)
        return y


@dataclass(frozen=True)
class Pool:
    """The mean or largest value of windows inside a column (N, C, 1, *size), as PyTorch has it.

    kernel, stride, padding, dilation: per axis, time first
    counted  zeros of the padding count in a mean
    """

    mean: bool
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    counted: bool = True

    def geometry(self, shape: tuple[int, ...]) -> Geometry | None:
        """Of the kernel; None where it has no such form."""
        wide = any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True))
        if self.ceil_mode or wide or any(d != 1 for d in self.dilation):
            return None
        n, c, *size = shape
        pairs = tuple((p, p) for p in self.padding)
        g = Geometry(n, c, c, c, tuple(size), self.kernel, self.stride, pairs, self.dilation)
        return g if min(g.out_size) > 0 else None

    def __call__(self, x: Tensor) -> Tensor:
        geometry = self.geometry(x.shape) if in_c(x) else None
        if geometry is None:
            return self._torch(x)
        small, y = kernels(), like(x, geometry.y_shape)
        params = small.pool(geometry, mean=self.mean, counted=self.counted)
        x, at = address(x)
        small.lib.fc_run_pool(params, at, y.data_ptr(), torch.get_num_threads())
        return y

    def _torch(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
        }
        if self.mean:
            return _AVERAGE[len(self.kernel)](x, count_include_pad=self.counted, **options)
        return _MAX[len(self.kernel)](x, dilation=self.dilation, **options)


def _reduced(reduce: str, otherwise: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    if stack.shape[0] < 2 or not in_c(stack):
        return otherwise(stack)
    small, stack = kernels(), stack.contiguous()
    *kept, newest = stack.unbind()
    y, steps = torch.empty_like(newest), torch.zeros(stack.shape[1], dtype=torch.int64)
    params = small.window(newest.shape, len(kept), reduce)
    small.lib.fc_run_window(
        params, newest.data_ptr(), kept[0].data_ptr(), steps.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


# Of (k, N, ...), over the k, the oldest first.
mean = partial(_reduced, "mean", partial(torch.mean, dim=0))
summed = partial(_reduced, "sum", partial(torch.sum, dim=0))
largest = partial(_reduced, "max", partial(torch.amax, dim=0))
REDUCTIONS = {mean: "mean", summed: "sum", largest: "max"}
