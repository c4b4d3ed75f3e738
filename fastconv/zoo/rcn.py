"""The recurrent convolutional unit and RCN-18, a causal ResNet-18, in plain PyTorch, seeded.

Source: Singh and Cuzzolin, Recurrent Convolutions for Causal 3D CNNs, ICCV workshops 2019: a 3D
convolution becomes a spatial one and a 1 x 1 convolution of the hidden state. Hedegaard and
Iosifidis, Continual 3D Convolutional Neural Networks, ECCV 2022, list it as RCU.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .units import (
    BATCH_NORM,
    Network,
    Residual,
    Size,
    classifier,
    convolution,
    named,
    relu,
    shortcut,
)
from .weights import by_part, seeded

STEM = 64
WIDTHS, BLOCKS = (64, 128, 256, 512), 2
# The hidden state feeds itself: less than 1, or it grows with every frame.
GAINS = {"hidden": 0.1, "last": 0.25, "shortcut": 1.0, "classifier": 1.0}


def rcn_18(*, num_classes: int = 400, seed: int = 0) -> Network:
    """RCN-18 for 8 frames of 112 x 112: ResNet-18 frame by frame, every k x k a recurrent unit.

    Its paper leaves open where the batch norm stands; here it follows the spatial convolution, as
    in ResNet-18. That gives 12.78 M parameters for 400 classes, where 12.80 M are printed.
    """
    return seeded(lambda: _network(num_classes), seed, by_part(GAINS))


class RecurrentUnit(nn.Module):
    """h[t] = bn(w_x * x[t]) + w_h * h[t - 1], with h[-1] = 0; w_x is 1 x k x k, w_h is 1 x 1 x 1.

    x: (N, c_in, T, H, W)
    returns (N, c_out, T, ceil(H / stride), ceil(W / stride)), every h[t]

    The hidden convolution runs once per frame but the first.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.space = convolution(c_in, c_out, (1, kernel, kernel), (1, stride, stride))
        self.bn = BATCH_NORM[3](c_out)
        self.hidden = convolution(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        steps = list(self.bn(self.space(x)).split(1, dim=2))
        for t in range(1, len(steps)):
            steps[t] = steps[t] + self.hidden(steps[t - 1])
        return torch.cat(steps, dim=2)


def _network(num_classes: int) -> Network:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=RecurrentUnit(3, STEM, 7, 2),
        act=relu(),
        pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    )
    channels = STEM
    for number, width in enumerate(WIDTHS, start=1):
        blocks: list[nn.Module] = []
        for i in range(BLOCKS):
            blocks.append(_block(channels, width, 2 if number > 1 and i == 0 else 1))
            channels = width
        layers[f"stage{number}"] = nn.Sequential(named("block", blocks, 1))
    return Network(nn.Sequential(layers), classifier(channels, num_classes))


def _block(c_in: int, c_out: int, stride: int) -> Residual:
    branch = OrderedDict(
        first=RecurrentUnit(c_in, c_out, stride=stride),
        act=relu(),
        last=RecurrentUnit(c_out, c_out),
    )
    step: Size = (1, stride, stride)
    return Residual(nn.Sequential(branch), shortcut("B", c_in, c_out, step))
