"""Fully separable blocks and temporal residual gradients: FSB-C3D and the variants of SlowFast.

Source: Design Light-weight 3D Convolutional Networks for Video Recognition: Temporal Residual,
Fully Separable Block, and Fast Algorithm, arXiv 1905.13388. The paper has no published code and
leaves open where batch norm and activations stand and how wide some layers are: what is chosen here
is said at each builder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .c3d import C3D, STAGES, Clip
from .c3d import GAINS as C3D_GAINS
from .slow import GAINS, SLOW_TAPS, Block, Taps, full
from .slowfast import SlowFast
from .units import Size, bottleneck, convolution, relu
from .weights import by_part, seeded

# Middle channels of each of C3D's convolutions; 0 keeps the dense convolution.
# table 4: what the rates and the total of the paper's table 4 need; conv_4 (3b) has 128, although
#   the table says 256.
# input: as many as input channels, 64 in the first. output: as many as output channels, which is
#   the text's alpha = 1.
MIDDLES = {
    "table 4": (0, 64, 128, 128, 256, 512, 512, 512),
    "input": (64, 64, 128, 256, 256, 512, 512, 512),
    "output": (64, 128, 256, 256, 512, 512, 512, 512),
}
NO_TEMPORAL: Taps = ((1,), (1,), (1,), (1,))
UCF101 = 101


class FullySeparable(nn.Module):
    """A fully separable block: K x 1 x 1 over all channels, depthwise 1 x R x S, pointwise.

    x: (N, c_in, T, H, W)
    returns (N, c_out, T, H, W) / stride, padded by half the kernel

    It replaces a dense K x R x S convolution: K c_in middle + R S middle + middle c_out weights for
    K R S c_in c_out. A ReLU stands between the block's two stages, time and space; what follows the
    block is the caller's.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        middle: int | None = None,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        m = c_out if middle is None else middle
        over_time, over_space = (kernel[0], 1, 1), (1, *kernel[1:])
        self.time = convolution(c_in, m, over_time, (stride[0], 1, 1), bias=bias)
        self.relu = relu()
        self.space = convolution(m, m, over_space, (1, *stride[1:]), groups=m, bias=bias)
        self.mix = convolution(m, c_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(self.space(self.relu(self.time(x))))
        return y


class TemporalGradient(nn.Module):
    """Temporal residual gradient: the differences of neighbouring frames, then the mean frame.

    x: (N, C, T, H, W)
    returns (N, C, T, H, W): frame t is x[t + 1] - x[t] for t < T - 1, and frame T - 1 the mean

    No multiplications but those by 1 / T in the mean, which a power of two makes a shift.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, 1:] - x[:, :, :-1], x.mean(dim=2, keepdim=True)], dim=2)


def fsb_c3d(
    *,
    num_classes: int = 487,
    clip: Clip = (16, 112, 112),
    middles: str | Sequence[int] = "table 4",
    seed: int = 0,
) -> C3D:
    """C3D with fully separable blocks in place of its convolutions.

    middles: middle channels of the eight blocks, 0 for a dense convolution, or a name of MIDDLES.
        The paper gives them only by the rates of its table 4; the others are other readings.

    Raises ValueError for an unknown name and unless there are eight.
    """
    if isinstance(middles, str):
        if middles not in MIDDLES:
            known = ", ".join(MIDDLES)
            raise ValueError(f"fsb_c3d: middles must be one of {known}, got {middles!r}")
        middles = MIDDLES[middles]
    convolutions = sum(len(widths) for widths, _, _ in STAGES)
    if len(middles) != convolutions:
        raise ValueError(f"fsb_c3d: middles must be {convolutions} numbers, got {len(middles)}")

    def layer(number: int, c_in: int, c_out: int) -> nn.Module:
        middle = middles[number]
        if not middle:
            return nn.Conv3d(c_in, c_out, 3, padding=1)
        return FullySeparable(c_in, c_out, middle)

    def gain(name: str) -> float:
        return 1.0 if name.endswith(".space") else C3D_GAINS.get(name, 2.0)

    return seeded(lambda: C3D(num_classes=num_classes, clip=clip, layer=layer), seed, gain)


def slowfast_ucf101(
    *, slow_taps: Taps = SLOW_TAPS, num_classes: int = UCF101, seed: int = 0
) -> SlowFast:
    """The SlowFast that the paper starts from, as far as is known: SlowFast-4x16-R50 for UCF-101.

    64 frames of 112 x 112, of which the fast pathway sees 32 and the slow one 4; the lateral
    convolutions have no batch norm, the classifier no bias. The paper names neither its source nor
    its widths, and its parameters and workload come out of no network tried.

    slow_taps: SLOW_TAPS, or NO_TEMPORAL for a slow pathway without temporal convolutions
    """
    return _variant(full, full, slow_taps, num_classes, seed)


def slow_depth(
    *, slow_taps: Taps = SLOW_TAPS, num_classes: int = UCF101, seed: int = 0
) -> SlowFast:
    """SlowDepth: the slow pathway's convolutions over neighbours depthwise, time and space as one.

    The paper gives no layers: here a slow block is pointwise, depthwise taps x 3 x 3, pointwise.
    """
    return _variant(_depthwise, full, slow_taps, num_classes, seed)


def slow_fsb(*, slow_taps: Taps = SLOW_TAPS, num_classes: int = UCF101, seed: int = 0) -> SlowFast:
    """SlowFSB: fully separable blocks in the slow pathway.

    Its bottlenecks are taps x 1 x 1, 1 x 3 x 3, pointwise already, so their 1 x 3 x 3 becomes
    depthwise and the widths stay; the paper does not print any.
    """
    return _variant(_separable, full, slow_taps, num_classes, seed)


def fast_trg(*, slow_taps: Taps = SLOW_TAPS, num_classes: int = UCF101, seed: int = 0) -> SlowFast:
    """FastTRG: SlowFSB whose fast pathway sees temporal residual gradients instead of frames."""
    return _variant(_separable, full, slow_taps, num_classes, seed, TemporalGradient())


def fast_depth(
    *, slow_taps: Taps = SLOW_TAPS, num_classes: int = UCF101, seed: int = 0
) -> SlowFast:
    """FastDepth: SlowFSB with the fast pathway's 1 x 3 x 3 depthwise too; a reading, as above."""
    return _variant(_separable, _separable, slow_taps, num_classes, seed)


def fast_3d(*, slow_taps: Taps = SLOW_TAPS, num_classes: int = UCF101, seed: int = 0) -> SlowFast:
    """Fast3D: SlowFSB with dense 3 x 3 x 3 in the fast pathway; a reading, as above."""
    return _variant(_separable, _dense, slow_taps, num_classes, seed)


def _variant(
    slow: Block,
    fast: Block,
    slow_taps: Taps,
    num_classes: int,
    seed: int,
    motion: nn.Module | None = None,
) -> SlowFast:
    return seeded(
        lambda: SlowFast(
            alpha=8,
            lateral_taps=5,
            num_classes=num_classes,
            every=2,
            lateral_norm=False,
            bias=False,
            slow=slow,
            fast=fast,
            slow_taps=slow_taps,
            motion=motion,
        ),
        seed,
        by_part(GAINS),
    )


def _separable(c_in: int, inner: int, c_out: int, stride: Size, taps: int) -> nn.Module:
    return bottleneck(c_in, inner, c_out, stride, taps=taps, kernel=(1, 3, 3), groups=inner)


def _depthwise(c_in: int, inner: int, c_out: int, stride: Size, taps: int) -> nn.Module:
    return bottleneck(c_in, inner, c_out, stride, kernel=(taps, 3, 3), groups=inner)


def _dense(c_in: int, inner: int, c_out: int, stride: Size, taps: int) -> nn.Module:
    return bottleneck(c_in, inner, c_out, stride, kernel=(taps, 3, 3))
