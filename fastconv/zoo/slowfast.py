"""SlowFast-R50 8x8 and 4x16 in plain PyTorch, untrained, weights seeded.

Source: Feichtenhofer et al., SlowFast Networks for Video Recognition, ICCV 2019, and its published
code: the lateral convolutions have 7 taps where the fast pathway has 4 frames to a slow one, 5
where it has 8.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .slow import EXPANSION, GAINS, INNER, SLOW_TAPS, STEM, Block, Taps, full, stage, stem
from .units import convolution, relu
from .weights import by_part, seeded

FAST = 8  # the slow pathway has this many times the channels
FAST_STEM_TAPS, FAST_TAPS = 5, (3,)
LATERAL = 2  # channels of a lateral connection per fast channel


def slowfast_r50_8x8(*, num_classes: int = 400, seed: int = 0) -> SlowFast:
    """SlowFast-8x8-R50: 32 frames, every 2nd, of 256 x 256, of which the slow pathway sees 8."""
    return _build(4, 7, num_classes, seed)


def slowfast_r50_4x16(*, num_classes: int = 400, seed: int = 0) -> SlowFast:
    """SlowFast-4x16-R50: 32 frames, every 2nd, of 256 x 256, of which the slow pathway sees 4."""
    return _build(8, 5, num_classes, seed)


def _build(alpha: int, lateral_taps: int, num_classes: int, seed: int) -> SlowFast:
    return seeded(
        lambda: SlowFast(alpha=alpha, lateral_taps=lateral_taps, num_classes=num_classes),
        seed,
        by_part(GAINS),
    )


class SlowFast(nn.Module):
    """Two pathways over one clip: few frames with many channels, all frames with an eighth of them.

    x: (N, 3, T, H, W), T a multiple of every * alpha
    returns logits (N, num_classes)

    alpha         fast frames to a slow one
    every         clip frames to a fast one
    lateral_norm  batch norm and ReLU after the lateral convolutions
    slow, fast    blocks of the pathways; slow_taps of the slow one
    motion        applied to the fast pathway's frames first
    """

    def __init__(
        self,
        *,
        alpha: int,
        lateral_taps: int,
        num_classes: int,
        every: int = 1,
        lateral_norm: bool = True,
        bias: bool = True,
        slow: Block = full,
        fast: Block = full,
        slow_taps: Taps = SLOW_TAPS,
        motion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.every = alpha, every
        self.motion = nn.Identity() if motion is None else motion
        few, many = STEM // FAST, STEM
        self.fast = nn.ModuleDict({"stage0": nn.Sequential(stem(few, FAST_STEM_TAPS))})
        self.slow = nn.ModuleDict({"stage0": nn.Sequential(stem(many, 1))})
        self.lateral = nn.ModuleDict()
        for number, inner in enumerate(INNER, start=1):
            self.lateral[f"stage{number - 1}"] = _lateral(few, alpha, lateral_taps, lateral_norm)
            name, narrow = f"stage{number}", inner // FAST
            self.fast[name] = stage(number, few, narrow, FAST_TAPS, fast)
            joined = many + LATERAL * few
            self.slow[name] = stage(number, joined, inner, slow_taps[number - 1], slow)
            few, many = narrow * EXPANSION, inner * EXPANSION
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(many + few, num_classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        clip = x[:, :, :: self.every]
        slow = self.slow["stage0"](clip[:, :, :: self.alpha])
        fast = self.fast["stage0"](self.motion(clip))
        for number in range(1, len(INNER) + 1):
            slow = torch.cat([slow, self.lateral[f"stage{number - 1}"](fast)], dim=1)
            slow = self.slow[f"stage{number}"](slow)
            fast = self.fast[f"stage{number}"](fast)
        features = torch.cat([self.pool(slow), self.pool(fast)], dim=1).flatten(1)
        logits: Tensor = self.classifier(self.dropout(features))
        return logits


def _lateral(channels: int, alpha: int, taps: int, norm: bool) -> nn.Sequential:
    c_out = LATERAL * channels
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=convolution(channels, c_out, (taps, 1, 1), (alpha, 1, 1))
    )
    if norm:
        layers["bn"] = nn.BatchNorm3d(c_out)
        layers["act"] = relu()
    return nn.Sequential(layers)
