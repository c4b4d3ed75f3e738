"""What several families are made of: convolution with batch norm, shortcuts, bottlenecks, heads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Size = int | tuple[int, ...]
Activation = Callable[[], nn.Module]
CONVOLUTION: Mapping[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: Mapping[int, Callable[[int], nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL: Mapping[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
GLOBAL_POOL: Mapping[int, Callable[[int], nn.Module]] = {
    2: nn.AdaptiveAvgPool2d,
    3: nn.AdaptiveAvgPool3d,
}


def relu() -> nn.Module:
    """ReLU in place."""
    return nn.ReLU(inplace=True)


def relu6() -> nn.Module:
    """min(max(x, 0), 6) in place."""
    return nn.ReLU6(inplace=True)


def half(kernel: Size) -> Size:
    """The padding that keeps the extent of an odd kernel at stride 1."""
    return kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)


def convolution(
    c_in: int,
    c_out: int,
    kernel: Size = 1,
    stride: Size = 1,
    *,
    padding: Size | None = None,
    groups: int = 1,
    bias: bool = False,
    dims: int = 3,
) -> nn.Module:
    """A convolution; padding is half the kernel unless given."""
    padding = half(kernel) if padding is None else padding
    return CONVOLUTION[dims](c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)


def conv_bn(
    c_in: int,
    c_out: int,
    kernel: Size = 1,
    stride: Size = 1,
    *,
    padding: Size | None = None,
    groups: int = 1,
    bias: bool = False,
    act: Activation | None = None,
    dims: int = 3,
) -> nn.Sequential:
    """Convolution `conv`, batch norm `bn` and, if given, an activation `act`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=convolution(
            c_in, c_out, kernel, stride, padding=padding, groups=groups, bias=bias, dims=dims
        ),
        bn=BATCH_NORM[dims](c_out),
    )
    if act is not None:
        layers["act"] = act()
    return nn.Sequential(layers)


def classifier(
    channels: int, num_classes: int, *, dropout: float = 0.0, dims: int = 3, bias: bool = True
) -> nn.Sequential:
    """Global average, dropout if any, one linear layer `classifier`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(pool=GLOBAL_POOL[dims](1), flat=nn.Flatten())
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["classifier"] = nn.Linear(channels, num_classes, bias=bias)
    return nn.Sequential(layers)


def named(prefix: str, modules: Iterable[nn.Module], start: int = 0) -> OrderedDict[str, nn.Module]:
    """Modules under prefix0, prefix1, ... for a Sequential."""
    return OrderedDict((f"{prefix}{i}", module) for i, module in enumerate(modules, start))


class Network(nn.Module):
    """A trunk and a head, one after the other.

    x: (N, 3, T, H, W), or (N, 3, H, W) in a network for images
    returns logits (N, num_classes); a softmax is left to the caller
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(x))
        return logits


class PaddedSubsampling(nn.Module):
    """Shortcut A: every stride-th position, and zeros for the channels that are new; no parameters.

    x: (N, c_in, *size)
    returns (N, c_out, *ceil(size / stride))

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, option A.
    """

    def __init__(self, c_in: int, c_out: int, stride: Size, dims: int = 3) -> None:
        super().__init__()
        self.extra = c_out - c_in
        self.stride = (stride,) * dims if isinstance(stride, int) else stride

    def forward(self, x: Tensor) -> Tensor:
        index: tuple[Any, ...] = (..., *(slice(None, None, s) for s in self.stride))
        x = x[index]
        return torch.cat([x, x.new_zeros(x.shape[0], self.extra, *x.shape[2:])], dim=1)


def shortcut(kind: str, c_in: int, c_out: int, stride: Size, dims: int = 3) -> nn.Module:
    """Identity where the shape stays, else 'A' (see PaddedSubsampling) or 'B', a projection."""
    if c_in == c_out and (stride == 1 or set(_axes(stride)) == {1}):
        return nn.Identity()
    if kind == "A":
        return PaddedSubsampling(c_in, c_out, stride, dims)
    return conv_bn(c_in, c_out, 1, stride, dims=dims)


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)), both of one shape."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.branch(x) + self.shortcut(x))
        return y


def basic_block(
    c_in: int, c_out: int, stride: Size = 1, *, kind: str = "B", kernel: Size = 3, dims: int = 3
) -> Residual:
    """Two convolutions of one kernel with batch norm, the first strided, around a shortcut."""
    branch = nn.Sequential(
        OrderedDict(
            first=conv_bn(c_in, c_out, kernel, stride, act=relu, dims=dims),
            last=conv_bn(c_out, c_out, kernel, dims=dims),
        )
    )
    return Residual(branch, shortcut(kind, c_in, c_out, stride, dims))


def bottleneck(
    c_in: int,
    inner: int,
    c_out: int,
    stride: Size = 1,
    *,
    taps: int = 1,
    kernel: Size = 3,
    groups: int = 1,
    kind: str = "B",
    dims: int = 3,
) -> Residual:
    """To `inner` channels over `taps` frames, a strided convolution, to `c_out`, a shortcut."""
    reduce: Size = (taps, 1, 1) if dims == 3 else 1
    branch = nn.Sequential(
        OrderedDict(
            reduce=conv_bn(c_in, inner, reduce, act=relu, dims=dims),
            space=conv_bn(inner, inner, kernel, stride, groups=groups, act=relu, dims=dims),
            last=conv_bn(inner, c_out, dims=dims),
        )
    )
    return Residual(branch, shortcut(kind, c_in, c_out, stride, dims))


def _axes(size: Size) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else size


class ChannelShuffle(nn.Module):
    """Channel i of group g becomes channel g of group i: the next grouped convolution sees all.

    x: (N, C, *size), C a multiple of `groups`; returned in the same shape

    Source: Zhang et al., ShuffleNet, CVPR 2018, section 3.1.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, *size = x.shape
        apart = x.reshape(n, self.groups, c // self.groups, *size)
        return apart.transpose(1, 2).reshape(n, c, *size)  # (N, C / groups, groups, *size)


class SamePadding(nn.Module):
    """Zeros in front and behind so that what follows has ceil(size / stride) outputs.

    x: (N, C, *size); the odd zero of an axis goes behind
    """

    def __init__(self, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.kernel, self.stride = tuple(kernel), tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        pairs: list[int] = []
        sizes = zip(x.shape[2:], self.kernel, self.stride, strict=True)
        for size, kernel, stride in reversed(list(sizes)):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pairs += [total // 2, total - total // 2]
        return functional.pad(x, pairs)


class WindowAverage(nn.AvgPool3d):
    """Averages over a window at stride 1; a smaller map is its own window.

    x: (N, C, T, H, W)
    returns (N, C, max(T - kT, 0) + 1, ...)
    """

    def __init__(self, window: tuple[int, int, int]) -> None:
        super().__init__(window, 1)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        window = [min(pair) for pair in zip(self.window, x.shape[2:], strict=True)]
        return functional.avg_pool3d(x, window, 1)
