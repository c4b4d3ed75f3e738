"""Multi-fiber networks, 3D and 2D, with and without multiplexers, and embedded; plain PyTorch.

Source: Chen et al., Multi-Fiber Networks for Video Recognition, ECCV 2018, and its published 3D
code where they differ: the multiplexer's middle has a quarter of the unit's middle channels (the
text says of its input). The 2D network is the 3D one with 2D kernels and no temporal stride: its
own code was not published, and neither were the widths of its variants nor the layers of the two
networks that multi-fiber units are embedded in. Here are readings; weights are seeded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .mobilenet import GAINS as MOBILENET_GAINS
from .mobilenet import Inverted, images
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

FIBERS = 16  # and the channels of the stem
UNITS = (3, 4, 6, 3)
WIDTHS = (96, 192, 384, 768)
# Multiples of the fibers, near 1, 2, 4 and 8 times one number: the one with the printed operations.
WIDTHS_12 = (96, 180, 360, 720)
WIDTHS_24 = (96, 216, 432, 840)
# Deeper and wider, without multiplexers: both printed figures within a thousandth.
DEEPER_UNITS, WIDER = (3, 4, 8, 3), (112, 224, 448, 896)
# Embedded in ResNet-18, the middle of a unit in channels of its output; in MobileNetV2.
RESNET_STEM, RESNET_UNITS, RESNET_WIDTHS, RESNET_MIDDLE = 64, (2, 2, 2, 2), (64, 128, 256, 512), 8
MOBILE_FIBERS, MOBILE_EXPANSION = 4, 10
TIME_STRIDES, SPACE_STRIDES = (2, 1, 1, 1), (1, 2, 2, 2)
# A unit's output is not normalised before it is added.
GAINS = {"second": 0.25, "up": 0.25, "adapt": 1.0, "classifier": 1.0}
MOBILE_GAINS = {**MOBILENET_GAINS, "up": 0.25}


def mfnet3d(
    *,
    fibers: int = FIBERS,
    widths: Sequence[int] = WIDTHS,
    units: Sequence[int] = UNITS,
    multiplexers: bool = True,
    num_classes: int = 400,
    seed: int = 0,
) -> Network:
    """MF-Net 3D of 16 fibers, for 16 frames of 224 x 224."""
    sizes = (fibers, widths, units, multiplexers, num_classes, 3)
    return seeded(lambda: _network(*sizes), seed, by_part(GAINS))


def mfnet2d(
    *,
    fibers: int = FIBERS,
    widths: Sequence[int] = WIDTHS,
    units: Sequence[int] = UNITS,
    multiplexers: bool = True,
    num_classes: int = 1000,
    seed: int = 0,
) -> Network:
    """MF-Net 2D, for images of 224 x 224.

    Its stem has as many channels as there are fibers.
    """
    sizes = (fibers, widths, units, multiplexers, num_classes, 2)
    return seeded(lambda: _network(*sizes), seed, by_part(GAINS))


def mfnet2d_n12(*, num_classes: int = 1000, seed: int = 0) -> Network:
    """MF-Net 2D of 12 fibers. The paper prints no widths; none that doubles has its figures."""
    return mfnet2d(fibers=12, widths=WIDTHS_12, num_classes=num_classes, seed=seed)


def mfnet2d_n24(*, num_classes: int = 1000, seed: int = 0) -> Network:
    """MF-Net 2D of 24 fibers. The paper prints no widths; none that doubles has its figures."""
    return mfnet2d(fibers=24, widths=WIDTHS_24, num_classes=num_classes, seed=seed)


def mfnet2d_deeper(*, num_classes: int = 1000, seed: int = 0) -> Network:
    """MF-Net 2D without multiplexers, deeper and wider.

    The paper prints neither depth nor widths; here two units more in the third stage, all of them a
    sixth wider, which comes within a thousandth of both printed figures.
    """
    return mfnet2d(
        widths=WIDER, units=DEEPER_UNITS, multiplexers=False, num_classes=num_classes, seed=seed
    )


def mf_resnet18(*, num_classes: int = 1000, seed: int = 0) -> Network:
    """The 2D ResNet-18 with multi-fiber units for its blocks, for images of 224 x 224.

    The paper prints no layers. Here stem, stages and widths are ResNet-18's, and the units, of 16
    fibers, have 8 times as many channels between their convolutions.
    """

    def make() -> Network:
        stem = conv_bn(3, RESNET_STEM, 7, 2, act=relu, dims=2)
        stages = zip(RESNET_UNITS, RESNET_WIDTHS, strict=True)
        return _staged(stem, RESNET_STEM, stages, FIBERS, True, num_classes, 2, RESNET_MIDDLE)

    return seeded(make, seed, by_part(GAINS))


def mf_mobilenet_v2(*, width: float = 1.4, num_classes: int = 1000, seed: int = 0) -> Network:
    """The 2D MobileNetV2 with fibers, for images of 224 x 224.

    The paper prints no layers. Here every block expands 10 times instead of 6, and where the input
    is added, the pointwise convolutions have 4 fibers, behind a multiplexer of a quarter of it.
    """
    return seeded(lambda: images(width, num_classes, _inverted), seed, by_part(MOBILE_GAINS))


def _inverted(c_in: int, c_out: int, expansion: int, stride: int, dims: int) -> nn.Module:
    expansion = 1 if expansion == 1 else MOBILE_EXPANSION
    if stride != 1 or c_in != c_out:
        return Inverted(c_in, c_out, expansion, stride, dims)
    return nn.Sequential(
        OrderedDict(
            multiplexer=Multiplexer(c_in, c_in // 4, dims),
            block=Inverted(c_in, c_out, expansion, stride, dims, MOBILE_FIBERS),
        )
    )


def _network(
    fibers: int,
    widths: Sequence[int],
    units: Sequence[int],
    multiplexers: bool,
    num_classes: int,
    dims: int,
) -> Network:
    kernel, step = _spatial(3, 5, dims), _spatial(1, 2, dims)
    stem = conv_bn(3, fibers, kernel, step, act=relu, dims=dims)
    stages = zip(units, widths, strict=True)
    return _staged(stem, fibers, stages, fibers, multiplexers, num_classes, dims)


def _staged(
    stem: nn.Module,
    channels: int,
    stages: Iterable[tuple[int, int]],
    fibers: int,
    multiplexers: bool,
    num_classes: int,
    dims: int,
    middle: int = 1,
) -> Network:
    """A stem of some channels, pooled, units and widths of four stages, and the classifier."""
    pool = MAX_POOL[dims](_spatial(1, 3, dims), _spatial(1, 2, dims), _spatial(0, 1, dims))
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem, pool=pool)
    strides = zip(TIME_STRIDES, SPACE_STRIDES, strict=True)
    for number, ((count, c_out), stride) in enumerate(zip(stages, strides, strict=True), start=1):
        of_stage: list[nn.Module] = []
        for i in range(count):
            adapt = None if i else _spatial(*stride, dims)
            between = middle * c_out
            of_stage.append(
                MultiFiberUnit(channels, c_out, fibers, adapt, multiplexers, dims, between)
            )
            channels = c_out
        layers[f"stage{number}"] = nn.Sequential(named("unit", of_stage, 1))
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
    middle: channels between the two convolutions, c_out without
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        fibers: int,
        adapt: Size | None = None,
        multiplexer: bool = True,
        dims: int = 3,
        middle: int | None = None,
    ) -> None:
        super().__init__()
        middle = middle or c_out
        self.multiplexer = Multiplexer(c_in, middle // 4, dims) if multiplexer else nn.Identity()
        stride = 1 if adapt is None else adapt
        self.first = _preactivated(c_in, middle, 3, stride, groups=fibers, dims=dims)
        if adapt is None:
            kernel = _spatial(1, 3, dims)
            self.second = _preactivated(middle, c_out, kernel, groups=fibers, dims=dims)
            self.adapt: nn.Module = nn.Identity()
        else:
            self.second = _preactivated(middle, c_out, dims=dims)
            self.adapt = _preactivated(c_in, c_out, 1, adapt, dims=dims)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(self.multiplexer(x))) + self.adapt(x)
        return y
