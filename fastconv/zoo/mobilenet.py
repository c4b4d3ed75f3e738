"""3D-MobileNetV1 and V2 at any width, and the 2D MobileNetV2, in plain PyTorch, weights seeded.

Source: Kopuklu et al., Resource Efficient 3D Convolutional Neural Networks, ICCVW 2019, tables 3
and 4, and its published code: widths are truncated, and the last pointwise convolution of V2 has
1280 channels at every width up to 1 (table 4 prints 1024 where it pools). The 2D network is that of
Sandler et al., MobileNetV2, CVPR 2018, with widths rounded to multiples of 8.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .units import Network, Size, classifier, conv_bn, named, relu, relu6
from .weights import by_part, seeded

STEM = 32
# channels, blocks, stride of the first block
V1 = ((64, 1, 2), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 1))
# expansion, channels, blocks, stride of the first block
V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
V2_LAST = 1280
# Makes a block of c_in, c_out, expansion, stride and the number of axes.
Block = Callable[[int, int, int, int, int], nn.Module]
# Variance gains: no ReLU follows a projection, and those with a shortcut add up; a depthwise
# convolution of one frame has two thirds of its taps on padding.
GAINS = {"depthwise": 4.0, "last": 0.7, "classifier": 1.0}


def mobilenet3d_v1(*, width: float = 1.0, num_classes: int = 600, seed: int = 0) -> Network:
    """3D-MobileNetV1: 13 depthwise-separable blocks of 3 x 3 x 3, for 16 frames of 112 x 112."""
    return seeded(lambda: Network(*_v1(width, num_classes)), seed, by_part(GAINS))


def mobilenet3d_v2(*, width: float = 1.0, num_classes: int = 600, seed: int = 0) -> Network:
    """3D-MobileNetV2: 17 inverted residuals around a depthwise 3 x 3 x 3, for 16 x 112 x 112."""

    def scaled(channels: int) -> int:
        return int(channels * width)

    return seeded(lambda: Network(*_v2(scaled, num_classes, 3, Inverted)), seed, by_part(GAINS))


def mobilenet_v2(*, width: float = 1.0, num_classes: int = 1000, seed: int = 0) -> Network:
    """The 2D MobileNetV2, for images of 224 x 224."""
    return seeded(lambda: images(width, num_classes), seed, by_part(GAINS))


def images(width: float, num_classes: int, block: Block | None = None) -> Network:
    """The 2D MobileNetV2 with its own weights not drawn, around other blocks where given."""
    rounded = partial(_multiple_of_8, width=width)
    return Network(*_v2(rounded, num_classes, 2, block or Inverted))


def _multiple_of_8(channels: int, width: float) -> int:
    """The nearest multiple of 8, the next one where that loses more than a tenth."""
    exact = channels * width
    nearest = max(8, int(exact + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * exact else nearest + 8


def _v1(width: float, num_classes: int) -> tuple[nn.Module, nn.Module]:
    channels = int(STEM * width)
    blocks: list[nn.Module] = []
    stem = conv_bn(3, channels, 3, (1, 2, 2), act=relu)
    for full, count, first in V1:
        for i in range(count):
            blocks.append(_separable(channels, int(full * width), 1 if i else first))
            channels = int(full * width)
    trunk = nn.Sequential(OrderedDict(stem=stem, **named("block", blocks, 1)))
    return trunk, classifier(channels, num_classes)


def _separable(c_in: int, c_out: int, stride: Size) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            depthwise=conv_bn(c_in, c_in, 3, stride, groups=c_in, act=relu),
            pointwise=conv_bn(c_in, c_out, act=relu),
        )
    )


def _v2(
    scaled: Callable[[int], int], num_classes: int, dims: int, block: Block
) -> tuple[nn.Module, nn.Module]:
    channels = scaled(STEM)
    blocks: list[nn.Module] = []
    stem = conv_bn(3, channels, 3, (1, 2, 2) if dims == 3 else 2, act=relu6, dims=dims)
    for expansion, full, count, first in V2:
        for i in range(count):
            blocks.append(block(channels, scaled(full), expansion, 1 if i else first, dims))
            channels = scaled(full)
    last = max(V2_LAST, scaled(V2_LAST))
    features = conv_bn(channels, last, act=relu6, dims=dims)
    trunk = nn.Sequential(OrderedDict(stem=stem, **named("block", blocks, 1), features=features))
    return trunk, classifier(last, num_classes, dropout=0.2, dims=dims)


class Inverted(nn.Module):
    """Pointwise up, depthwise 3 x 3 x 3, pointwise down without activation; the input is added.

    x: (N, c_in, *size)
    returns (N, c_out, *ceil(size / stride)); nothing is added where the shape changes

    groups: of the pointwise convolutions
    """

    def __init__(
        self, c_in: int, c_out: int, expansion: int, stride: int, dims: int, groups: int = 1
    ) -> None:
        super().__init__()
        inner = expansion * c_in
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion != 1:
            layers["expand"] = conv_bn(c_in, inner, groups=groups, act=relu6, dims=dims)
        layers["depthwise"] = conv_bn(inner, inner, 3, stride, groups=inner, act=relu6, dims=dims)
        layers["last"] = conv_bn(inner, c_out, groups=groups, dims=dims)
        self.branch = nn.Sequential(layers)
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        return x + y if self.adds else y
