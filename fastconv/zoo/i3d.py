"""I3D, Inception-v1 inflated to 3D, in plain PyTorch, untrained, weights seeded.

Source: Carreira and Zisserman, Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset,
CVPR 2017. Padding is TensorFlow's: every layer has ceil(size / stride) outputs.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .units import Network, SamePadding, WindowAverage, conv_bn, relu
from .weights import by_part, seeded

# Channels of an inception module: pointwise | pointwise, 3 x 3 x 3 | pointwise, 3 x 3 x 3 |
# pooling, pointwise. One list per stage; a max pooling of this kernel and stride stands in front.
Mixed = tuple[int, int, int, int, int, int]
STAGES: tuple[tuple[tuple[int, int, int], tuple[int, int, int], tuple[Mixed, ...]], ...] = (
    ((1, 3, 3), (1, 2, 2), ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64))),
    (
        (3, 3, 3),
        (2, 2, 2),
        (
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
        ),
    ),
    ((2, 2, 2), (2, 2, 2), ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))),
)
STEM = (64, 64, 192)
WINDOW = (2, 7, 7)


def i3d(*, num_classes: int = 400, seed: int = 0) -> Network:
    """I3D for RGB clips of 64 frames of 224 x 224, the classes averaged over time."""
    return seeded(lambda: Network(_trunk(), head(num_classes)), seed, by_part({"classifier": 1.0}))


def head(num_classes: int) -> nn.Sequential:
    """Averages over windows of 2 x 7 x 7, classes for each window, averaged."""
    channels = out_channels(STAGES[-1][2][-1])
    return nn.Sequential(
        OrderedDict(
            window=WindowAverage(WINDOW),
            dropout=nn.Dropout(0.5),
            classifier=nn.Conv3d(channels, num_classes, 1),
            mean=nn.AdaptiveAvgPool3d(1),
            flat=nn.Flatten(),
        )
    )


def out_channels(mixed: Mixed) -> int:
    """Channels of an inception module's concatenated output."""
    return mixed[0] + mixed[2] + mixed[4] + mixed[5]


def _trunk() -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        pad1=SamePadding((7, 7, 7), (2, 2, 2)),
        conv1=conv_bn(3, STEM[0], 7, 2, padding=0, act=relu),
        pad2=SamePadding((1, 3, 3), (1, 2, 2)),
        pool2=nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
        conv2a=conv_bn(STEM[0], STEM[1], act=relu),
        conv2b=conv_bn(STEM[1], STEM[2], 3, act=relu),
    )
    channels = STEM[2]
    for number, (kernel, stride, stage) in enumerate(STAGES, start=3):
        layers[f"pad{number}"] = SamePadding(kernel, stride)
        layers[f"pool{number}"] = nn.MaxPool3d(kernel, stride)
        for letter, mixed in zip("abcde", stage, strict=False):
            layers[f"mixed{number}{letter}"] = Inception(channels, mixed)
            channels = out_channels(mixed)
    return nn.Sequential(layers)


class Inception(nn.Module):
    """Four branches side by side, concatenated.

    x: (N, c_in, T, H, W), not negative: the zeros that pad the pooling must not exceed it
    returns (N, out_channels(mixed), T, H, W)
    """

    def __init__(self, c_in: int, mixed: Mixed) -> None:
        super().__init__()
        a, b, c, d, e, f = mixed
        self.branch0 = conv_bn(c_in, a, act=relu)
        self.branch1 = nn.Sequential(conv_bn(c_in, b, act=relu), self.spread(b, c))
        self.branch2 = nn.Sequential(conv_bn(c_in, d, act=relu), self.spread(d, e))
        self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), conv_bn(c_in, f, act=relu))

    def spread(self, c_in: int, c_out: int) -> nn.Module:
        """The convolution over neighbours."""
        return conv_bn(c_in, c_out, 3, act=relu)

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.branch0, self.branch1, self.branch2, self.branch3)
        return torch.cat([branch(x) for branch in branches], dim=1)
