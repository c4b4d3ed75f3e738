"""3D-SqueezeNet, version 1.1 with simple bypasses, in plain PyTorch, weights seeded.

Source: Kopuklu et al., Resource Efficient 3D Convolutional Neural Networks, ICCVW 2019, table 2,
and its published code: every convolution but the last has a bias and a batch norm. The paper's text
says dropout 0.2, the code 0.5.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .units import Network, conv_bn, relu
from .weights import by_part, seeded

STEM = 64
# squeezed channels, expanded channels of each branch, per stage; a stage is a fire module and one
# with a bypass, and a max pooling stands between stages
STAGES = ((16, 64), (32, 128), (48, 192), (64, 256))
GAINS = {"expand1": 1.0, "expand3": 1.0, "classifier": 1.0}  # half of the bypasses' sums


def squeezenet3d(*, num_classes: int = 600, seed: int = 0) -> Network:
    """3D-SqueezeNet: eight fire modules, for 16 frames of 112 x 112."""
    return seeded(lambda: Network(*_parts(num_classes)), seed, by_part(GAINS))


def _parts(num_classes: int) -> tuple[nn.Module, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=conv_bn(3, STEM, 3, (1, 2, 2), bias=True, act=relu), pool1=nn.MaxPool3d(3, 2, 1)
    )
    channels = STEM
    for number, (squeeze, expand) in enumerate(STAGES, start=1):
        if number > 1:
            layers[f"pool{number}"] = nn.MaxPool3d(3, 2, 1)
        layers[f"fire{2 * number}"] = Fire(channels, squeeze, expand, bypass=False)
        channels = 2 * expand
        layers[f"fire{2 * number + 1}"] = Fire(channels, squeeze, expand, bypass=True)
    head = nn.Sequential(
        OrderedDict(
            dropout=nn.Dropout(0.5),
            classifier=nn.Conv3d(channels, num_classes, 1),
            relu=relu(),
            pool=nn.AdaptiveAvgPool3d(1),
            flat=nn.Flatten(),
        )
    )
    return nn.Sequential(layers), head


class Fire(nn.Module):
    """Pointwise down to few channels, then pointwise and 3 x 3 x 3 side by side, concatenated.

    x: (N, c_in, T, H, W)
    returns (N, 2 * expand, T, H, W), the input added before the last ReLU if there is a bypass
    """

    def __init__(self, c_in: int, squeeze: int, expand: int, *, bypass: bool) -> None:
        super().__init__()
        self.bypass = bypass
        self.squeeze = conv_bn(c_in, squeeze, bias=True, act=relu)
        self.expand1 = conv_bn(squeeze, expand, bias=True)
        self.expand3 = conv_bn(squeeze, expand, 3, bias=True)
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        few = self.squeeze(x)
        y = torch.cat([self.expand1(few), self.expand3(few)], dim=1)
        out: Tensor = self.relu(x + y if self.bypass else y)
        return out
