"""Dissected 3D ResNets: one frame at a time over cached frames, in plain PyTorch, weights seeded.

Source: Kopuklu et al., Dissected 3D CNNs: Temporal Skip Connections for Efficient Online Video
Processing, CVIU 2022. Its code was not published; the layers are those that give its printed
parameters and operations for D-ResNet-18 and 50 (D-ResNet-101 is printed 0.02 M lower).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .units import Network, PaddedSubsampling, conv_bn, named, relu
from .weights import by_part, seeded

STEM, STEM_TAPS = 64, 3
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
INNER = (64, 128, 256, 512)
EXPANSION = {18: 1, 50: 4, 101: 4}
LAST = 512  # channels that conv_last of the bottleneck networks goes down to
FUSIONS = {"concat": 2, "sum": 1, "none": 1}  # frames under the convolution that follows
GAINS = {"last": 0.25, "classifier": 1.0}
# The sum of two frames is twice as large in mean square.
SUM_GAINS = {**GAINS, "first": 1.0, "space": 1.0, "last": 0.15}


def d_resnet18(*, fusion: str = "concat", num_classes: int = 600, seed: int = 0) -> Network:
    """D-ResNet-18, for a stream of 112 x 112; fusion 'concat', 'sum' or 'none' of cached frames."""
    return _build(18, fusion, num_classes, seed)


def d_resnet50(*, fusion: str = "concat", num_classes: int = 600, seed: int = 0) -> Network:
    """D-ResNet-50, for a stream of 112 x 112; fusion as for D-ResNet-18."""
    return _build(50, fusion, num_classes, seed)


def d_resnet101(*, fusion: str = "concat", num_classes: int = 600, seed: int = 0) -> Network:
    """D-ResNet-101, for a stream of 112 x 112; fusion as for D-ResNet-18."""
    return _build(101, fusion, num_classes, seed)


def _build(depth: int, fusion: str, num_classes: int, seed: int) -> Network:
    """x: (N, 3, T, H, W), T at least 3; the classes are those after the last frame.

    The trunk has an output frame for every input frame but the first two, which the stem needs. On
    3 frames it does one step of the stream: its caches hold zeros. The paper's figures are of that
    step without the head, which may be recurrent there.
    """
    if fusion not in FUSIONS:
        known = ", ".join(FUSIONS)
        raise ValueError(f"d_resnet: fusion must be one of {known}, got {fusion!r}")
    gain = by_part(SUM_GAINS if fusion == "sum" else GAINS)
    return seeded(lambda: _network(depth, fusion, num_classes), seed, gain)


def _network(depth: int, fusion: str, num_classes: int) -> Network:
    stem = conv_bn(3, STEM, (STEM_TAPS, 7, 7), (1, 2, 2), padding=(0, 3, 3), act=relu)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=stem, pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    )
    channels = STEM
    for number, (count, inner) in enumerate(zip(BLOCKS[depth], INNER, strict=True), start=1):
        blocks: list[nn.Module] = []
        for i in range(count):
            stride = 2 if number > 1 and i == 0 else 1
            width = inner * EXPANSION[depth]
            branch = _basic if EXPANSION[depth] == 1 else _bottleneck
            blocks.append(
                Dissected(branch(channels, inner, width, stride, fusion), channels, width, stride)
            )
            channels = width
        layers[f"stage{number}"] = nn.Sequential(named("block", blocks, 1))
    if EXPANSION[depth] > 1:
        layers["features"] = conv_bn(channels, LAST, act=relu)
        channels = LAST
    head = nn.Sequential(OrderedDict(last=LastFrame(), classifier=nn.Linear(channels, num_classes)))
    return Network(nn.Sequential(layers), head)


class TemporalSkip(nn.Module):
    """Temporal skip connection: each frame meets the one before it, which a stream keeps cached.

    x: (N, C, T, H, W)
    returns for 'concat' (N, C, T + 1, H, W), a zero frame in front, meant for a convolution over 2
        frames without temporal padding; for 'sum' (N, C, T, H, W), frame t plus frame t - 1; for
        'none' x

    Source: Dissected 3D CNNs, section 3.
    """

    def __init__(self, fusion: str) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, x: Tensor) -> Tensor:
        if self.fusion == "none":
            return x
        start = torch.zeros_like(x[:, :, :1])
        if self.fusion == "concat":
            return torch.cat([start, x], dim=2)
        return x + torch.cat([start, x[:, :, :-1]], dim=2)


class Dissected(nn.Module):
    """relu(branch(x) + shortcut(x)) with a shortcut that has no parameters.

    x: (N, c_in, T, H, W)
    returns (N, c_out, T, ceil(H / stride), ceil(W / stride))
    """

    def __init__(self, branch: nn.Module, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = PaddedSubsampling(c_in, c_out, (1, stride, stride))
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.branch(x) + self.shortcut(x))
        return y


class LastFrame(nn.Module):
    """The average over the pixels of the last frame.

    x: (N, C, T, H, W)
    returns (N, C)
    """

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, -1].mean(dim=(-2, -1))


def _fused(c_in: int, c_out: int, stride: int, fusion: str) -> nn.Sequential:
    kernel = (FUSIONS[fusion], 3, 3)
    return conv_bn(c_in, c_out, kernel, (1, stride, stride), padding=(0, 1, 1), act=relu)


def _basic(c_in: int, inner: int, c_out: int, stride: int, fusion: str) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            skip=TemporalSkip(fusion),
            first=_fused(c_in, inner, stride, fusion),
            last=conv_bn(inner, c_out, (1, 3, 3)),
        )
    )


def _bottleneck(c_in: int, inner: int, c_out: int, stride: int, fusion: str) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            reduce=conv_bn(c_in, inner, act=relu),
            skip=TemporalSkip(fusion),
            space=_fused(inner, inner, stride, fusion),
            last=conv_bn(inner, c_out),
        )
    )
