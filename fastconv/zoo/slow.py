"""Slow-R50 and I3D-R50, ResNet-50 with temporal convolutions, in plain PyTorch, weights seeded.

Source: Feichtenhofer et al., SlowFast Networks for Video Recognition, ICCV 2019, table 1 (the slow
pathway alone), and for I3D-R50 Wang et al., Non-local Neural Networks, CVPR 2018.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from .units import Network, Size, bottleneck, classifier, conv_bn, named, relu
from .weights import by_part, seeded

STEM = 64
BLOCKS = (3, 4, 6, 3)
INNER = (64, 128, 256, 512)
EXPANSION = 4
STRIDES = (1, 2, 2, 2)  # of space, in the first block of a stage
Taps = tuple[tuple[int, ...], ...]
# Frames under the first convolution of a block; a stage repeats its pattern.
SLOW_TAPS: Taps = ((1,), (1,), (3,), (3,))
I3D_TAPS: Taps = ((3,), (3, 1), (3, 1), (1, 3))
I3D_STEM_TAPS = 5
GAINS = {"last": 0.25, "shortcut": 1.0, "classifier": 1.0}
# Makes a block of c_in, inner, c_out, stride and taps.
Block = Callable[[int, int, int, Size, int], nn.Module]


def slow_r50(*, num_classes: int = 400, seed: int = 0) -> Network:
    """Slow-8x8-R50: 8 frames, every 8th, of 224 x 224; its paper counts it at 256 x 256."""
    return seeded(lambda: _network(1, SLOW_TAPS, num_classes), seed, by_part(GAINS))


def i3d_r50(*, num_classes: int = 400, seed: int = 0) -> Network:
    """I3D-R50: 8 frames, every 8th, of 224 x 224; the first stage's output is halved in time."""
    return seeded(
        lambda: _network(I3D_STEM_TAPS, I3D_TAPS, num_classes, halved=True), seed, by_part(GAINS)
    )


def _network(stem_taps: int, taps: Taps, num_classes: int, *, halved: bool = False) -> Network:
    layers = stem(STEM, stem_taps)
    channels = STEM
    for number, inner in enumerate(INNER, start=1):
        layers[f"stage{number}"] = stage(number, channels, inner, taps[number - 1])
        channels = inner * EXPANSION
        if number == 1 and halved:
            layers["temporal_pool"] = nn.MaxPool3d((2, 1, 1))
    return Network(nn.Sequential(layers), classifier(channels, num_classes, dropout=0.5))


def stem(channels: int, taps: int) -> OrderedDict[str, nn.Module]:
    """A 7 x 7 convolution over `taps` frames and a max pooling, both halving H and W."""
    return OrderedDict(
        stem=conv_bn(3, channels, (taps, 7, 7), (1, 2, 2), act=relu),
        pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    )


def full(c_in: int, inner: int, c_out: int, stride: Size, taps: int) -> nn.Module:
    """A bottleneck around a dense 1 x 3 x 3 convolution."""
    return bottleneck(c_in, inner, c_out, stride, taps=taps, kernel=(1, 3, 3))


def stage(
    number: int, c_in: int, inner: int, taps: tuple[int, ...], block: Block = full
) -> nn.Sequential:
    """Stage 1 to 4: its first block takes other channels and, from stage 2 on, a spatial stride."""
    c_out, step = inner * EXPANSION, STRIDES[number - 1]
    blocks: list[nn.Module] = []
    for i in range(BLOCKS[number - 1]):
        stride = (1, 1, 1) if i else (1, step, step)
        blocks.append(block(c_out if i else c_in, inner, c_out, stride, taps[i % len(taps)]))
    return nn.Sequential(named("block", blocks, 1))
