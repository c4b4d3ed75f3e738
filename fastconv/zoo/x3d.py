"""X3D-XS, S, M and L in plain PyTorch, untrained, weights seeded.

Source: Feichtenhofer, X3D: Expanding Architectures for Efficient Video Recognition, CVPR 2020, and
its published code where the two differ: the temporal stem convolution has 5 taps (the paper's table
says 3), and the first block of every stage, the 24 -> 24 one included, has a projection shortcut
with batch norm.
"""

from __future__ import annotations

from collections import OrderedDict
from math import ceil

from torch import Tensor, nn

from .units import conv_bn, relu
from .weights import by_part, seeded

STEM = 24
# name, channels, inner channels (2.25 times that), squeeze channels (a sixteenth of inner, rounded
# to a multiple of 8), blocks at depth 1
STAGES = (
    ("s2", 24, 54, 8, 1),
    ("s3", 48, 108, 8, 2),
    ("s4", 96, 216, 16, 5),
    ("s5", 192, 432, 32, 3),
)
HEAD = (432, 2048)
# Variance gain of a layer's weights: 2 before a ReLU, 1 otherwise, and little at the end of a
# residual branch, or 55 of them would multiply the signal a million times in eval mode.
GAINS = {"space": 1.0, "depthwise": 1.0, "project": 0.25, "classifier": 1.0}


def x3d_xs(*, num_classes: int = 400, seed: int = 0) -> X3D:
    """X3D-XS, meant for clips of 4 frames, every 12th, 160 x 160: 26 blocks."""
    return _build(2.2, num_classes, seed)


def x3d_s(*, num_classes: int = 400, seed: int = 0) -> X3D:
    """X3D-S, meant for clips of 13 frames, every 6th, 160 x 160: the network of XS."""
    return _build(2.2, num_classes, seed)


def x3d_m(*, num_classes: int = 400, seed: int = 0) -> X3D:
    """X3D-M, meant for clips of 16 frames, every 5th, 224 x 224: the network of XS."""
    return _build(2.2, num_classes, seed)


def x3d_l(*, num_classes: int = 400, seed: int = 0) -> X3D:
    """X3D-L, meant for clips of 16 frames, every 5th, 312 x 312: 55 blocks."""
    return _build(5.0, num_classes, seed)


def _build(depth: float, num_classes: int, seed: int) -> X3D:
    return seeded(lambda: X3D(depth=depth, num_classes=num_classes), seed, by_part(GAINS))


class X3D(nn.Module):
    """X3D: a stem, four stages of inverted bottlenecks around a depthwise 3 x 3 x 3, a head.

    x: (N, 3, T, H, W), any T, H and W
    returns logits (N, num_classes), in training and in eval mode; the softmax that the published
        code applies in eval mode is left to the caller

    The published head averages over (T, S / 32, S / 32) for its own input size S; a global average
    does the same there and takes every other size.
    """

    def __init__(self, *, depth: float, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                space=nn.Conv3d(3, STEM, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
                time=nn.Conv3d(STEM, STEM, (5, 1, 1), 1, (2, 0, 0), groups=STEM, bias=False),
                bn=nn.BatchNorm3d(STEM),
                relu=nn.ReLU(inplace=True),
            )
        )
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        channels = STEM
        for name, width, inner, squeeze, blocks in STAGES:
            stages[name] = _stage(channels, width, inner, squeeze, ceil(depth * blocks))
            channels = width
        self.stages = nn.Sequential(stages)
        self.head = nn.Sequential(
            OrderedDict(
                features=conv_bn(channels, HEAD[0], act=relu),
                pool=nn.AdaptiveAvgPool3d(1),
                hidden=nn.Conv3d(*HEAD, 1, bias=False),
                relu=nn.ReLU(inplace=True),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(0.5),
                classifier=nn.Linear(HEAD[1], num_classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(x)))
        return logits


def _stage(c_in: int, c_out: int, inner: int, squeeze: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        *(
            Block(c_out if i else c_in, c_out, inner, squeeze if i % 2 == 0 else None, first=i == 0)
            for i in range(blocks)
        )
    )


class Block(nn.Module):
    """Pointwise up to `inner`, depthwise, squeeze and excitation, swish, pointwise down, shortcut.

    x: (N, c_in, T, H, W)
    returns (N, c_out, T, H, W); the first block of a stage halves H and W, rounding up
    """

    def __init__(
        self, c_in: int, c_out: int, inner: int, squeeze: int | None, *, first: bool
    ) -> None:
        super().__init__()
        stride = (1, 2, 2) if first else (1, 1, 1)
        self.expand = conv_bn(c_in, inner, act=relu)
        self.depthwise = conv_bn(inner, inner, 3, stride, groups=inner)
        self.excite = SqueezeExcite(inner, squeeze) if squeeze else nn.Identity()
        self.swish = nn.SiLU(inplace=True)
        self.project = conv_bn(inner, c_out)
        self.shortcut = conv_bn(c_in, c_out, 1, stride) if first else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.project(self.swish(self.excite(self.depthwise(self.expand(x)))))
        y: Tensor = self.relu(branch + self.shortcut(x))
        return y


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate in (0, 1) computed from the averages of all channels.

    x: (N, C, T, H, W), returned in the same shape

    Source: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018.
    """

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool3d(1),
                reduce=nn.Conv3d(channels, squeeze, 1),
                relu=nn.ReLU(inplace=True),
                expand=nn.Conv3d(squeeze, channels, 1),
                sigmoid=nn.Sigmoid(),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.gate(x)
        return scaled
