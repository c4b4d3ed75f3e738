"""Multi-fiber networks, 3D and 2D, with and without multiplexers, in plain PyTorch, seeded.

Source: Chen et al., Multi-Fiber Networks for Video Recognition, ECCV 2018, and its published 3D
code where they differ: the multiplexer's middle has a quarter of the unit's middle channels (the
text says of its input). The 2D network is the 3D one with 2D kernels and no temporal stride: its
own code was not published.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from .units import (
    BATCH_NORM,
    MAX_POOL,
    Network,
    Size,
    classifier,
    conv_bn,
    convolution,
    named,
    relu,
)
from .weights import by_part, seeded

STEM = 16
FIBERS = 16
UNITS = (3, 4, 6, 3)
WIDTHS = (96, 192, 384, 768)
TIME_STRIDES, SPACE_STRIDES = (2, 1, 1, 1), (1, 2, 2, 2)
# A unit's output is not normalised before it is added.
GAINS = {"second": 0.25, "up": 0.25, "adapt": 1.0, "classifier": 1.0}


def mfnet3d(
    *,
    fibers: int = FIBERS,
    widths: Sequence[int] = WIDTHS,
    multiplexers: bool = True,
    num_classes: int = 400,
    seed: int = 0,
) -> Network:
    """MF-Net 3D of 16 fibers, for 16 frames of 224 x 224."""
    sizes = (fibers, widths, multiplexers, num_classes, 3)
    return seeded(lambda: _network(*sizes), seed, by_part(GAINS))


def mfnet2d(
    *,
    fibers: int = FIBERS,
    widths: Sequence[int] = WIDTHS,
    multiplexers: bool = True,
    num_classes: int = 1000,
    seed: int = 0,
) -> Network:
    """MF-Net 2D, for images of 224 x 224.

    The paper prints rows for 12 and 24 fibers, and for a deeper and wider net without multiplexers,
    but no widths: none that doubles from stage to stage gives their figures, so none is named here.
    """
    sizes = (fibers, widths, multiplexers, num_classes, 2)
    return seeded(lambda: _network(*sizes), seed, by_part(GAINS))


def _network(
    fibers: int, widths: Sequence[int], multiplexers: bool, num_classes: int, dims: int
) -> Network:
    kernel, step = _spatial(3, 5, dims), _spatial(1, 2, dims)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=conv_bn(3, STEM, kernel, step, act=relu, dims=dims),
        pool=MAX_POOL[dims](_spatial(1, 3, dims), step, _spatial(0, 1, dims)),
    )
    channels = STEM
    strides = zip(TIME_STRIDES, SPACE_STRIDES, strict=True)
    for number, (count, c_out, stride) in enumerate(
        zip(UNITS, widths, strides, strict=True), start=1
    ):
        units: list[nn.Module] = []
        for i in range(count):
            adapt = None if i else _spatial(*stride, dims)
            units.append(MultiFiberUnit(channels, c_out, fibers, adapt, multiplexers, dims))
            channels = c_out
        layers[f"stage{number}"] = nn.Sequential(named("unit", units, 1))
    layers["bn"] = BATCH_NORM[dims](channels)
    layers["act"] = relu()
    return Network(nn.Sequential(layers), classifier(channels, num_classes, dims=dims))


def _spatial(time: int, space: int, dims: int) -> Size:
    return (time, space, space) if dims == 3 else (space, space)


def _preactivated(
    c_in: int, c_out: int, kernel: Size = 1, stride: Size = 1, *, groups: int = 1, dims: int = 3
) -> nn.Sequential:
    conv = convolution(c_in, c_out, kernel, stride, groups=groups, dims=dims)
    return nn.Sequential(OrderedDict(bn=BATCH_NORM[dims](c_in), act=relu(), conv=conv))


class Multiplexer(nn.Module):
    """Two pointwise convolutions over all channels, added to the input: fibers exchange here.

    x: (N, channels, *size), returned in the same shape
    """

    def __init__(self, channels: int, middle: int, dims: int = 3) -> None:
        super().__init__()
        self.down = _preactivated(channels, middle, dims=dims)
        self.up = _preactivated(middle, channels, dims=dims)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.up(self.down(x))
        return y


class MultiFiberUnit(nn.Module):
    """A multiplexer, two convolutions in `fibers` groups, and the input added.

    x: (N, c_in, *size)
    returns (N, c_out, *ceil(size / stride))

    adapt: stride of a stage's first unit, which adds a projection of its input and whose second
        convolution is pointwise over all channels; None elsewhere, where c_in is c_out
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        fibers: int,
        adapt: Size | None = None,
        multiplexer: bool = True,
        dims: int = 3,
    ) -> None:
        super().__init__()
        self.multiplexer = Multiplexer(c_in, c_out // 4, dims) if multiplexer else nn.Identity()
        stride = 1 if adapt is None else adapt
        self.first = _preactivated(c_in, c_out, 3, stride, groups=fibers, dims=dims)
        if adapt is None:
            kernel = _spatial(1, 3, dims)
            self.second = _preactivated(c_out, c_out, kernel, groups=fibers, dims=dims)
            self.adapt: nn.Module = nn.Identity()
        else:
            self.second = _preactivated(c_out, c_out, dims=dims)
            self.adapt = _preactivated(c_in, c_out, 1, adapt, dims=dims)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(self.multiplexer(x))) + self.adapt(x)
        return y
