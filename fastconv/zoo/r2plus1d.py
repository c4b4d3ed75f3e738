"""R3D-18 and R(2+1)D-18 in plain PyTorch, untrained, weights seeded.

Source: Tran et al., A Closer Look at Spatiotemporal Convolutions for Action Recognition, CVPR 2018,
as torchvision builds them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from .units import Network, Residual, classifier, conv_bn, named, relu, shortcut
from .weights import by_part, seeded

STEM = 64
FACTORED_STEM = 45  # channels between the stem's two convolutions, as published
WIDTHS, BLOCKS = (64, 128, 256, 512), 2
GAINS = {"last": 0.25, "shortcut": 1.0, "classifier": 1.0}
# Makes of c_in, c_out, stride, middle a 3 x 3 x 3 convolution or what stands for it; no ReLU.
Layer = Callable[[int, int, int, int], nn.Sequential]


def r3d_18(*, num_classes: int = 400, seed: int = 0) -> Network:
    """R3D-18: 3 x 3 x 3 convolutions throughout, for 16 frames of 112 x 112."""

    def make() -> Network:
        stem = conv_bn(3, STEM, (3, 7, 7), (1, 2, 2), act=relu)
        return _network(stem, _whole, num_classes)

    return seeded(make, seed, by_part(GAINS))


def r2plus1d_18(*, num_classes: int = 400, seed: int = 0) -> Network:
    """R(2+1)D-18: each of them 1 x 3 x 3, then 3 x 1 x 1, with as many weights together."""

    def make() -> Network:
        stem = nn.Sequential(
            OrderedDict(
                space=conv_bn(3, FACTORED_STEM, (1, 7, 7), (1, 2, 2), act=relu),
                time=conv_bn(FACTORED_STEM, STEM, (3, 1, 1), act=relu),
            )
        )
        return _network(stem, _factored, num_classes)

    return seeded(make, seed, by_part(GAINS))


def _network(stem: nn.Module, layer: Layer, num_classes: int) -> Network:
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = STEM
    for number, width in enumerate(WIDTHS, start=1):
        blocks: list[nn.Module] = []
        for i in range(BLOCKS):
            blocks.append(_block(channels, width, 2 if number > 1 and i == 0 else 1, layer))
            channels = width
        layers[f"stage{number}"] = nn.Sequential(named("block", blocks, 1))
    return Network(nn.Sequential(layers), classifier(channels, num_classes))


def _block(c_in: int, c_out: int, stride: int, layer: Layer) -> Residual:
    # Both convolutions of a block are factored by its first one's sizes, as published.
    middle = 27 * c_in * c_out // (9 * c_in + 3 * c_out)
    first = layer(c_in, c_out, stride, middle)
    branch = OrderedDict(first=first, relu=relu(), last=layer(c_out, c_out, 1, middle))
    return Residual(nn.Sequential(branch), shortcut("B", c_in, c_out, stride))


def _whole(c_in: int, c_out: int, stride: int, middle: int) -> nn.Sequential:
    return conv_bn(c_in, c_out, 3, stride)


def _factored(c_in: int, c_out: int, stride: int, middle: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            space=conv_bn(c_in, middle, (1, 3, 3), (1, stride, stride), act=relu),
            time=conv_bn(middle, c_out, (3, 1, 1), (stride, 1, 1)),
        )
    )
