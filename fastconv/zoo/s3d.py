"""S3D, I3D with every convolution split into space and time, in plain PyTorch, weights seeded.

Source: Xie et al., Rethinking Spatiotemporal Feature Learning, ECCV 2018, as torchvision builds it:
symmetric padding, and a stem convolution whose temporal half is strided too.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .i3d import STAGES, STEM, Inception, head, out_channels
from .units import Network, conv_bn, relu
from .weights import by_part, seeded


def s3d(*, num_classes: int = 400, seed: int = 0) -> Network:
    """S3D, for clips of 224 x 224 and at least 14 frames."""
    return seeded(lambda: Network(_trunk(), head(num_classes)), seed, by_part({"classifier": 1.0}))


def _trunk() -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=split(3, STEM[0], 7, 2),
        pool2=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        conv2a=conv_bn(STEM[0], STEM[1], act=relu),
        conv2b=split(STEM[1], STEM[2], 3, 1),
    )
    channels = STEM[2]
    for number, (kernel, stride, stage) in enumerate(STAGES, start=3):
        padding = tuple((k - 1) // 2 for k in kernel)
        layers[f"pool{number}"] = nn.MaxPool3d(kernel, stride, padding)
        for letter, mixed in zip("abcde", stage, strict=False):
            layers[f"mixed{number}{letter}"] = SplitInception(channels, mixed)
            channels = out_channels(mixed)
    return nn.Sequential(layers)


def split(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Sequential:
    """Space, then time, each with batch norm and ReLU."""
    return nn.Sequential(
        OrderedDict(
            space=conv_bn(c_in, c_out, (1, kernel, kernel), (1, stride, stride), act=relu),
            time=conv_bn(c_out, c_out, (kernel, 1, 1), (stride, 1, 1), act=relu),
        )
    )


class SplitInception(Inception):
    """An inception module whose 3 x 3 x 3 convolutions are split."""

    def spread(self, c_in: int, c_out: int) -> nn.Module:
        return split(c_in, c_out, 3, 1)
