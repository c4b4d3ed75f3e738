"""3D-ShuffleNetV1 and V2 at the widths of their paper, in plain PyTorch, weights seeded.

Source: Kopuklu et al., Resource Efficient 3D Convolutional Neural Networks, ICCVW 2019, tables 5
and 6, and its published code where they differ: V2 at width 2 begins with 224 channels (table 6
prints 244, which gives other parameters and multiplications than table 8).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .units import ChannelShuffle, Network, classifier, conv_bn, named, relu
from .weights import by_part, seeded

STEM = 24
UNITS = (4, 8, 4)  # per stage; the first of a stage halves every axis
V1_GROUPS = 3
V1_STAGES = (240, 480, 960)
# width: channels of the stages, of the last pointwise convolution
V2 = {
    0.25: ((32, 64, 128), 1024),
    0.5: ((48, 96, 192), 1024),
    1.0: ((116, 232, 464), 1024),
    1.5: ((176, 352, 704), 1024),
    2.0: ((224, 488, 976), 2048),
}
GAINS = {"depthwise": 1.0, "last": 0.25, "classifier": 1.0}


def shufflenet3d_v1(*, width: float = 1.0, num_classes: int = 600, seed: int = 0) -> Network:
    """3D-ShuffleNetV1 with 3 groups, for 16 frames of 112 x 112."""
    return seeded(lambda: Network(*_v1(width, num_classes)), seed, by_part(GAINS))


def shufflenet3d_v2(*, width: float = 1.0, num_classes: int = 600, seed: int = 0) -> Network:
    """3D-ShuffleNetV2, for 16 frames of 112 x 112. Raises ValueError for a width not in V2."""
    if width not in V2:
        known = ", ".join(map(str, V2))
        raise ValueError(f"shufflenet3d_v2: width must be one of {known}, got {width}")
    return seeded(lambda: Network(*_v2(width, num_classes)), seed, by_part(GAINS))


def _stem(channels: int) -> OrderedDict[str, nn.Module]:
    stem = conv_bn(3, channels, 3, (1, 2, 2), act=relu)
    return OrderedDict(stem=stem, pool=nn.MaxPool3d(3, 2, 1))


def _v1(width: float, num_classes: int) -> tuple[nn.Module, nn.Module]:
    channels = int(STEM * width)
    trunk = _stem(channels)
    for number, (full, count) in enumerate(zip(V1_STAGES, UNITS, strict=True), start=2):
        units: list[nn.Module] = []
        for i in range(count):
            units.append(GroupedUnit(channels, int(full * width), first=i == 0))
            channels = int(full * width)
        trunk[f"stage{number}"] = nn.Sequential(named("unit", units, 1))
    return nn.Sequential(trunk), classifier(channels, num_classes)


class GroupedUnit(nn.Module):
    """ShuffleNetV1: grouped pointwise, shuffle, depthwise, grouped pointwise; then add or join.

    x: (N, c_in, T, H, W)
    returns (N, c_out, T, H, W); the first unit of a stage halves all three, rounding up, and
        concatenates c_out - c_in new channels with averages of its input

    The first pointwise convolution has one group where c_in is 24, as the published code has it.
    """

    def __init__(self, c_in: int, c_out: int, *, first: bool) -> None:
        super().__init__()
        middle, new = c_out // 4, c_out - c_in if first else c_out
        groups = 1 if c_in == STEM else V1_GROUPS
        self.branch = nn.Sequential(
            OrderedDict(
                reduce=conv_bn(c_in, middle, groups=groups, act=relu),
                shuffle=ChannelShuffle(V1_GROUPS),
                depthwise=conv_bn(middle, middle, 3, 2 if first else 1, groups=middle),
                last=conv_bn(middle, new, groups=V1_GROUPS),
            )
        )
        # Strided before anything else: two frames, three by three pixels padded by one.
        self.average = nn.AvgPool3d((2, 3, 3), 2, (0, 1, 1)) if first else None
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        joined = x + y if self.average is None else torch.cat([y, self.average(x)], dim=1)
        out: Tensor = self.relu(joined)
        return out


def _v2(width: float, num_classes: int) -> tuple[nn.Module, nn.Module]:
    stages, last = V2[width]
    channels, trunk = STEM, _stem(STEM)
    for number, (c_out, count) in enumerate(zip(stages, UNITS, strict=True), start=2):
        units: list[nn.Module] = [HalvingUnit(channels, c_out)]
        units += [SplitUnit(c_out) for _ in range(count - 1)]
        trunk[f"stage{number}"] = nn.Sequential(named("unit", units, 1))
        channels = c_out
    trunk["features"] = conv_bn(channels, last, act=relu)
    return nn.Sequential(trunk), classifier(last, num_classes, dropout=0.2)


class SplitUnit(nn.Module):
    """ShuffleNetV2, stride 1: the second half of the channels is convolved, the first passes by.

    x: (N, channels, T, H, W), returned in the same shape
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        h = channels // 2
        self.branch = nn.Sequential(
            OrderedDict(
                reduce=conv_bn(h, h, act=relu),
                depthwise=conv_bn(h, h, 3, groups=h),
                pointwise=conv_bn(h, h, act=relu),
            )
        )
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        passes, convolved = x.chunk(2, dim=1)
        y: Tensor = self.shuffle(torch.cat([passes, self.branch(convolved)], dim=1))
        return y


class HalvingUnit(nn.Module):
    """ShuffleNetV2, stride 2: two branches, each to half the output channels, concatenated.

    x: (N, c_in, T, H, W)
    returns (N, c_out, ceil(T / 2), ceil(H / 2), ceil(W / 2))
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        h = c_out // 2
        self.short = nn.Sequential(
            OrderedDict(
                depthwise=conv_bn(c_in, c_in, 3, 2, groups=c_in),
                pointwise=conv_bn(c_in, h, act=relu),
            )
        )
        self.long = nn.Sequential(
            OrderedDict(
                reduce=conv_bn(c_in, h, act=relu),
                depthwise=conv_bn(h, h, 3, 2, groups=h),
                pointwise=conv_bn(h, h, act=relu),
            )
        )
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shuffle(torch.cat([self.short(x), self.long(x)], dim=1))
        return y
