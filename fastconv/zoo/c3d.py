"""C3D in plain PyTorch, untrained, weights seeded.

Source: Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks, ICCV 2015.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from .weights import seeded

# Stages of the trunk: channels of the 3 x 3 x 3 convolutions (padding 1, bias, ReLU), then over
# (T, H, W) kernel = stride and padding of a max pooling.
STAGES = (
    ((64,), (1, 2, 2), (0, 0, 0)),
    ((128,), (2, 2, 2), (0, 0, 0)),
    ((256, 256), (2, 2, 2), (0, 0, 0)),
    ((512, 512), (2, 2, 2), (0, 0, 0)),
    ((512, 512), (2, 2, 2), (0, 1, 1)),
)
FEATURES, HIDDEN = 512, 4096
# Variance gain of the weights: 2 between two ReLUs, 1 at either end.
GAINS = {"trunk.conv1a": 1.0, "classifier.fc8": 1.0}
Clip = tuple[int, int, int]
Layer = Callable[[int, int, int], nn.Module]


def c3d(*, num_classes: int = 487, clip: Clip = (16, 112, 112), seed: int = 0) -> C3D:
    """C3D for clips of (frames, height, width), at least 16 each; Sports-1M has 487 classes."""
    return seeded(lambda: C3D(num_classes=num_classes, clip=clip), seed, _gain)


def _gain(name: str) -> float:
    return GAINS.get(name, 2.0)


class C3D(nn.Module):
    """C3D: eight 3 x 3 x 3 convolutions, five max poolings, three fully connected layers.

    x: (N, 3, T, H, W)
    returns logits (N, num_classes); the softmax is left to the caller

    `trunk` takes any clip of at least 16 frames and 16 x 16 pixels. The first fully connected layer
    is as wide as the trunk's output for `clip` (8192 at 16 x 112 x 112), so the whole network takes
    only clips that the poolings bring to that same extent.

    layer: layer(number, c_in, c_out) makes the convolution of that number, counted from 0

    Raises ValueError for any other clip.
    """

    def __init__(self, *, num_classes: int, clip: Clip, layer: Layer | None = None) -> None:
        super().__init__()
        self.clip = clip
        if min(pooled(clip)) < 1:
            raise ValueError(
                f"c3d: clip (frames, height, width) must be at least (16, 16, 16), got {clip}"
            )
        frames, height, width = pooled(clip)
        width_of_fc6 = FEATURES * frames * height * width
        self.trunk = _trunk(layer or _dense)
        self.classifier = nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                fc6=nn.Linear(width_of_fc6, HIDDEN),
                relu6=nn.ReLU(inplace=True),
                drop6=nn.Dropout(0.5),
                fc7=nn.Linear(HIDDEN, HIDDEN),
                relu7=nn.ReLU(inplace=True),
                drop7=nn.Dropout(0.5),
                fc8=nn.Linear(HIDDEN, num_classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = x.shape[-3:]
        clip = (frames, height, width)
        if pooled(clip) != pooled(self.clip):
            raise ValueError(
                f"c3d: built for clips (frames, height, width) of {self.clip}, got {clip}: "
                f"build with c3d(clip={clip}), or use the convolutions alone, .trunk"
            )
        logits: Tensor = self.classifier(self.trunk(x))
        return logits


def pooled(clip: Clip) -> Clip:
    """Extents (T, H, W) after the five poolings; the last pads H and W by 1 on either side."""
    frames, height, width = clip
    return frames // 16, _padded_half(height // 16), _padded_half(width // 16)


def _padded_half(size: int) -> int:
    return size // 2 + 1 if size else 0


def _dense(number: int, c_in: int, c_out: int) -> nn.Module:
    return nn.Conv3d(c_in, c_out, 3, padding=1)


def _trunk(layer: Layer) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, done = 3, 0
    for number, (widths, kernel, padding) in enumerate(STAGES, start=1):
        for letter, width in zip("ab", widths, strict=False):
            layers[f"conv{number}{letter}"] = layer(done, channels, width)
            layers[f"relu{number}{letter}"] = nn.ReLU(inplace=True)
            channels, done = width, done + 1
        layers[f"pool{number}"] = nn.MaxPool3d(kernel, kernel, padding)
    return nn.Sequential(layers)
