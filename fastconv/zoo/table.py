"""The networks by name: where each is built, for which input, after which paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

C3D = "Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks, ICCV 2015"
X3D = "Feichtenhofer, X3D: Expanding Architectures for Efficient Video Recognition, CVPR 2020"
FSB = "Design Light-weight 3D Convolutional Networks for Video Recognition, arXiv 1905.13388"
SLOWFAST = "Feichtenhofer et al., SlowFast Networks for Video Recognition, ICCV 2019"
NON_LOCAL = "Wang et al., Non-local Neural Networks, CVPR 2018"
I3D = "Carreira and Zisserman, Quo Vadis, Action Recognition?, CVPR 2017"
S3D = "Xie et al., Rethinking Spatiotemporal Feature Learning, ECCV 2018"
CSN = "Tran et al., Video Classification with Channel-Separated Convolutional Networks, ICCV 2019"
CLOSER_LOOK = "Tran et al., A Closer Look at Spatiotemporal Convolutions, CVPR 2018"
DISSECTED = "Kopuklu et al., Dissected 3D CNNs, CVIU 2022"
EFFICIENT = "Kopuklu et al., Resource Efficient 3D Convolutional Neural Networks, ICCVW 2019"
MFNET = "Chen et al., Multi-Fiber Networks for Video Recognition, ECCV 2018"
RESNET = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016"
MOBILENET_V2 = "Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018"
RCN = "Singh and Cuzzolin, Recurrent Convolutions for Causal 3D CNNs, ICCVW 2019"


@dataclass(frozen=True)
class Network:
    """A network that can be built: `builder(num_classes=..., seed=...)` makes it, in training mode.

    family       the module that has the builder, under the name `function`
    input_shape  (C, T, H, W), the clip of its paper; (C, H, W) of a network for images
    options      what the builder is given to make this network
    """

    name: str
    family: str
    input_shape: tuple[int, ...]
    description: str
    source: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def builder(self) -> Callable[..., nn.Module]:
        """The keyword-only function that makes the network. Raises ImportError without PyTorch."""
        try:
            module = import_module(f"{__package__}.{self.family}")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                "fastconv.zoo needs PyTorch, which is not installed: pip install 'fastconv[torch]'",
                name="torch",
            ) from error
        return partial(getattr(module, self.function), **self.options)


def _at(
    size: tuple[int, ...],
    family: str,
    name: str,
    description: str,
    source: str,
    function: str = "",
    **options: Any,
) -> Network:
    return Network(name, family, (3, *size), description, source, function or name, options)


def _widths(family: str, function: str, description: str, *widths: float) -> list[Network]:
    """A network at several widths, named as in shufflenet3d_v1_x0_5."""
    return [
        _at(
            (16, 112, 112),
            family,
            f"{function}_x{str(float(width)).replace('.', '_')}",
            f"{description}, {width} times as wide",
            EFFICIENT,
            function,
            width=float(width),
        )
        for width in widths
    ]


def _resnets(depth: int) -> list[Network]:
    """A 3D ResNet with shortcut A, without parameters, and with shortcut B."""
    name, title = f"resnet3d_{depth}", f"3D ResNet-{depth}"
    return [
        _at((16, 112, 112), "resnet", name, f"{title}, shortcut A", EFFICIENT),
        _at(
            (16, 112, 112),
            "resnet",
            f"{name}_b",
            f"{title}, shortcut B",
            EFFICIENT,
            name,
            shortcut="B",
        ),
    ]


def _dissected(depth: int) -> list[Network]:
    """The fusions of cached frames; a clip of 3 frames is one step of the stream."""
    name = f"d_resnet{depth}"
    fusions = {"": "concat", "_sum": "sum", "_none": "none"}
    return [
        _at(
            (3, 112, 112),
            "dresnet",
            name + suffix,
            f"D-ResNet-{depth}, one step of a stream, fusion {fusion!r}",
            DISSECTED,
            name,
            fusion=fusion,
        )
        for suffix, fusion in fusions.items()
    ]


_SEPARABLE = "inverted bottlenecks with depthwise 3x3x3 convolutions"
_UCF101 = (64, 112, 112)
ALL = (
    _at(
        (16, 112, 112),
        "c3d",
        "c3d",
        "C3D: eight dense 3x3x3 convolutions and three fully connected layers",
        C3D,
    ),
    _at((16, 112, 112), "fsb", "fsb_c3d", "C3D with fully separable blocks", FSB),
    _at((4, 160, 160), "x3d", "x3d_xs", f"X3D-XS: {_SEPARABLE}", X3D),
    _at((13, 160, 160), "x3d", "x3d_s", f"X3D-S: {_SEPARABLE}", X3D),
    _at((16, 224, 224), "x3d", "x3d_m", f"X3D-M: {_SEPARABLE}", X3D),
    _at((16, 312, 312), "x3d", "x3d_l", f"X3D-L: {_SEPARABLE}", X3D),
    _at((8, 224, 224), "slow", "slow_r50", "Slow-8x8-R50: SlowFast's slow pathway", SLOWFAST),
    _at((8, 224, 224), "slow", "i3d_r50", "I3D-R50: ResNet-50 inflated", NON_LOCAL),
    _at((32, 256, 256), "slowfast", "slowfast_r50_8x8", "SlowFast-8x8-R50", SLOWFAST),
    _at((32, 256, 256), "slowfast", "slowfast_r50_4x16", "SlowFast-4x16-R50", SLOWFAST),
    _at(_UCF101, "fsb", "slowfast_ucf101", "SlowFast as the FSB paper may have had it", FSB),
    _at(_UCF101, "fsb", "slow_depth", "SlowDepth: slow pathway with depthwise 3x3x3", FSB),
    _at(_UCF101, "fsb", "slow_fsb", "SlowFSB: slow pathway of fully separable blocks", FSB),
    _at(_UCF101, "fsb", "fast_trg", "FastTRG: SlowFSB, fast pathway on frame differences", FSB),
    _at(_UCF101, "fsb", "fast_depth", "FastDepth: SlowFSB, depthwise fast pathway", FSB),
    _at(_UCF101, "fsb", "fast_3d", "Fast3D: SlowFSB, dense 3x3x3 in the fast pathway", FSB),
    _at((64, 224, 224), "i3d", "i3d", "I3D: Inception-v1 inflated", I3D),
    _at((16, 224, 224), "s3d", "s3d", "S3D: I3D with space and time apart", S3D),
    _at((32, 224, 224), "csn", "csn_r101", "ir-CSN-101: ResNet-101 with depthwise 3x3x3", CSN),
    _at((16, 112, 112), "r2plus1d", "r3d_18", "R3D-18: dense 3x3x3 throughout", CLOSER_LOOK),
    _at((16, 112, 112), "r2plus1d", "r2plus1d_18", "R(2+1)D-18: 1x3x3 and 3x1x1", CLOSER_LOOK),
    *_dissected(18),
    *_dissected(50),
    *_dissected(101),
    *_resnets(18),
    *_resnets(50),
    *_resnets(101),
    _at((16, 112, 112), "resnet", "resnext3d_101", "3D ResNeXt-101, 32 groups", EFFICIENT),
    _at((16, 112, 112), "squeezenet", "squeezenet3d", "3D-SqueezeNet 1.1", EFFICIENT),
    *_widths("mobilenet", "mobilenet3d_v1", "3D-MobileNetV1", 0.5, 1, 1.5, 2),
    *_widths("mobilenet", "mobilenet3d_v2", "3D-MobileNetV2", 0.2, 0.45, 0.7, 1),
    *_widths("shufflenet", "shufflenet3d_v1", "3D-ShuffleNetV1, 3 groups", 0.5, 1, 1.5, 2),
    *_widths("shufflenet", "shufflenet3d_v2", "3D-ShuffleNetV2", 0.25, 0.5, 1, 1.5, 2),
    _at((16, 224, 224), "mfnet", "mfnet3d", "MF-Net 3D, 16 fibers", MFNET),
    _at(
        (16, 224, 224),
        "mfnet",
        "mfnet3d_plain",
        "MF-Net 3D without multiplexers",
        MFNET,
        "mfnet3d",
        multiplexers=False,
    ),
    _at((224, 224), "mfnet", "mfnet2d", "MF-Net 2D, 16 fibers", MFNET),
    _at(
        (224, 224),
        "mfnet",
        "mfnet2d_plain",
        "MF-Net 2D without multiplexers",
        MFNET,
        "mfnet2d",
        multiplexers=False,
    ),
    _at((224, 224), "mfnet", "mfnet2d_n12", "MF-Net 2D, 12 fibers, a reading", MFNET),
    _at((224, 224), "mfnet", "mfnet2d_n24", "MF-Net 2D, 24 fibers, a reading", MFNET),
    _at(
        (224, 224),
        "mfnet",
        "mfnet2d_deeper",
        "MF-Net 2D without multiplexers, deeper and wider, a reading",
        MFNET,
    ),
    _at((224, 224), "mfnet", "mf_resnet18", "ResNet-18 of multi-fiber units, a reading", MFNET),
    _at((224, 224), "mfnet", "mf_mobilenet_v2", "MobileNetV2 1.4 with fibers, a reading", MFNET),
    _at((8, 112, 112), "rcn", "rcn_18", "RCN-18: ResNet-18 of recurrent units", RCN),
    _at((224, 224), "resnet", "resnet18", "ResNet-18, for images", RESNET),
    _at((224, 224), "resnet", "resnet50", "ResNet-50, for images", RESNET),
    _at((224, 224), "resnet", "resnext26", "ResNeXt-26, 8 groups of 16, for images", MFNET),
    _at(
        (224, 224),
        "mobilenet",
        "mobilenet_v2_x1_4",
        "MobileNetV2, 1.4 times as wide, for images",
        MOBILENET_V2,
        "mobilenet_v2",
        width=1.4,
    ),
)

# Networks for clips that are known under names of their own when they take a frame at a time:
# Hedegaard and Iosifidis, Continual 3D Convolutional Neural Networks, ECCV 2022.
CONTINUAL = {
    "cox3d_s": "x3d_s",
    "cox3d_m": "x3d_m",
    "cox3d_l": "x3d_l",
    "coi3d": "i3d_r50",
    "coslow": "slow_r50",
}
