"""3D ResNet-18, 50, 101, ResNeXt-101, and the 2D ResNet-18, 50, ResNeXt-26, plain PyTorch, seeded.

Source: Kopuklu et al., Resource Efficient 3D Convolutional Neural Networks, ICCVW 2019, and its
published code, after Hara et al., Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and
ImageNet?, CVPR 2018. Shortcut A needs no parameters, B is a projection: the printed operations are
those of A for the ResNets and of B for ResNeXt. The 2D networks are those of He et al., Deep
Residual Learning for Image Recognition, CVPR 2016, with the stride on the 3 x 3 convolution.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .units import (
    MAX_POOL,
    Network,
    Size,
    basic_block,
    bottleneck,
    classifier,
    conv_bn,
    named,
    relu,
)
from .weights import by_part, seeded

STEM = 64
# blocks per stage, output channels per inner channel (1: basic blocks)
DEPTHS = {18: ((2, 2, 2, 2), 1), 50: ((3, 4, 6, 3), 4), 101: ((3, 4, 23, 3), 4)}
INNER = (64, 128, 256, 512)
CARDINALITY, RESNEXT_INNER, RESNEXT_EXPANSION = 32, (128, 256, 512, 1024), 2
CARDINALITY_26, RESNEXT_26_EXPANSION = 8, 0.5  # 8 groups of 16 channels in the first stage
GAINS = {"last": 0.25, "shortcut": 1.0, "classifier": 1.0}


def resnet3d_18(*, shortcut: str = "A", num_classes: int = 600, seed: int = 0) -> Network:
    """3D ResNet-18, for 16 frames of 112 x 112; shortcuts 'A' or 'B'."""
    return _resnet(18, shortcut, num_classes, seed, 3)


def resnet3d_50(*, shortcut: str = "A", num_classes: int = 600, seed: int = 0) -> Network:
    """3D ResNet-50, for 16 frames of 112 x 112; shortcuts 'A' or 'B'."""
    return _resnet(50, shortcut, num_classes, seed, 3)


def resnet3d_101(*, shortcut: str = "A", num_classes: int = 600, seed: int = 0) -> Network:
    """3D ResNet-101, for 16 frames of 112 x 112; shortcuts 'A' or 'B'."""
    return _resnet(101, shortcut, num_classes, seed, 3)


def resnext3d_101(*, shortcut: str = "B", num_classes: int = 600, seed: int = 0) -> Network:
    """3D ResNeXt-101 with 32 groups, for 16 frames of 112 x 112; shortcuts 'A' or 'B'."""
    _check(shortcut)
    blocks = DEPTHS[101][0]
    sizes = (blocks, RESNEXT_INNER, RESNEXT_EXPANSION, CARDINALITY)
    return seeded(lambda: _network(*sizes, shortcut, num_classes, 3), seed, by_part(GAINS))


def resnet18(*, num_classes: int = 1000, seed: int = 0) -> Network:
    """The 2D ResNet-18, for images of 224 x 224."""
    return _resnet(18, "B", num_classes, seed, 2)


def resnet50(*, num_classes: int = 1000, seed: int = 0) -> Network:
    """The 2D ResNet-50, for images of 224 x 224."""
    return _resnet(50, "B", num_classes, seed, 2)


def resnext26(*, num_classes: int = 1000, seed: int = 0) -> Network:
    """The 2D ResNeXt-26 (8x16d), for images of 224 x 224.

    Chen et al., Multi-Fiber Networks for Video Recognition, ECCV 2018, compares with it, and prints
    its size and operations but no layers. Both are those of ResNet-18's stages and widths with
    bottlenecks that are twice as wide inside, 128 channels in 8 groups and so on.
    """
    sizes = (DEPTHS[18][0], RESNEXT_INNER, RESNEXT_26_EXPANSION, CARDINALITY_26)
    return seeded(lambda: _network(*sizes, "B", num_classes, 2), seed, by_part(GAINS))


def _resnet(depth: int, shortcut: str, num_classes: int, seed: int, dims: int) -> Network:
    _check(shortcut)
    blocks, expansion = DEPTHS[depth]
    sizes = (blocks, INNER, expansion, 1)
    return seeded(lambda: _network(*sizes, shortcut, num_classes, dims), seed, by_part(GAINS))


def _check(shortcut: str) -> None:
    if shortcut not in ("A", "B"):
        raise ValueError(f"resnet: shortcut must be 'A' or 'B', got {shortcut!r}")


def _network(
    counts: tuple[int, ...],
    inners: tuple[int, ...],
    expansion: float,
    groups: int,
    kind: str,
    num_classes: int,
    dims: int,
) -> Network:
    stride: Size = (1, 2, 2) if dims == 3 else 2
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=conv_bn(3, STEM, 7, stride, act=relu, dims=dims),
        pool=MAX_POOL[dims]((3,) * dims, 2, 1),
    )
    channels = STEM
    for number, (count, inner) in enumerate(zip(counts, inners, strict=True), start=1):
        blocks: list[nn.Module] = []
        for i in range(count):
            step = 2 if number > 1 and i == 0 else 1
            width = int(inner * expansion)
            if expansion == 1:
                blocks.append(basic_block(channels, width, step, kind=kind, dims=dims))
            else:
                blocks.append(
                    bottleneck(channels, inner, width, step, groups=groups, kind=kind, dims=dims)
                )
            channels = width
        layers[f"stage{number}"] = nn.Sequential(named("block", blocks, 1))
    return Network(nn.Sequential(layers), classifier(channels, num_classes, dims=dims))
