"""ir-CSN-101, a channel-separated network, in plain PyTorch, untrained, weights seeded.

Source: Tran et al., Video Classification with Channel-Separated Convolutional Networks, ICCV 2019,
as pytorchvideo builds it: a max pooling after the stem, time halved with space from stage 2 on, and
the classifier applied to windows of 4 x 7 x 7.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .units import Network, WindowAverage, bottleneck, conv_bn, named, relu
from .weights import by_part, seeded

STEM = 64
BLOCKS = (3, 4, 23, 3)
INNER, EXPANSION = (64, 128, 256, 512), 4
WINDOW = (4, 7, 7)
GAINS = {"last": 0.15, "shortcut": 1.0, "classifier": 1.0}


def csn_r101(*, num_classes: int = 400, seed: int = 0) -> Network:
    """ir-CSN-101: bottlenecks around a depthwise 3 x 3 x 3, for 32 frames, every 2nd, 224 x 224."""
    return seeded(lambda: _network(num_classes), seed, by_part(GAINS))


def _network(num_classes: int) -> Network:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=conv_bn(3, STEM, (3, 7, 7), (1, 2, 2), act=relu),
        pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    )
    channels = STEM
    for number, (count, inner) in enumerate(zip(BLOCKS, INNER, strict=True), start=1):
        blocks: list[nn.Module] = []
        for i in range(count):
            stride = 2 if number > 1 and i == 0 else 1
            blocks.append(bottleneck(channels, inner, inner * EXPANSION, stride, groups=inner))
            channels = inner * EXPANSION
        layers[f"stage{number}"] = nn.Sequential(named("block", blocks, 1))
    head = nn.Sequential(
        OrderedDict(
            window=WindowAverage(WINDOW),
            classifier=nn.Conv3d(channels, num_classes, 1),
            mean=nn.AdaptiveAvgPool3d(1),
            flat=nn.Flatten(),
        )
    )
    return Network(nn.Sequential(layers), head)
