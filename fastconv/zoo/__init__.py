"""Networks of the papers in plain PyTorch: what rewriting and counting are tried on.

They are untrained, with seeded weights, and use nothing of the rest of fastconv. Listing them needs
no PyTorch, building one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

X3D_PAPER = "Feichtenhofer, X3D: Expanding Architectures for Efficient Video Recognition, CVPR 2020"
C3D_PAPER = (
    "Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks, ICCV 2015"
)


@dataclass(frozen=True)
class Network:
    """A network that can be built: `builder(num_classes=..., seed=...)` makes it, in training mode.

    family: the module that has the builder, under the network's name
    input_shape: (C, T, H, W), the clip of its paper
    """

    name: str
    family: str
    input_shape: tuple[int, int, int, int]
    description: str
    source: str

    @property
    def builder(self) -> Callable[..., nn.Module]:
        """The keyword-only function that makes the network. Raises ImportError without PyTorch."""
        try:
            module = import_module(f"{__name__}.{self.family}")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                "fastconv.zoo needs PyTorch, which is not installed: pip install 'fastconv[torch]'",
                name="torch",
            ) from error
        builder: Callable[..., nn.Module] = getattr(module, self.name)
        return builder


def build(name: str, **options: Any) -> nn.Module:
    """Build a network by name; options are those of its builder, at least `num_classes` and `seed`.

    Raises ValueError for an unknown name, ImportError without PyTorch.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}. Known: {', '.join(sorted(NETWORKS))}")
    return NETWORKS[name].builder(**options)


def _x3d(size: str, *clip: int) -> Network:
    frames, height, width = clip
    return Network(
        name=f"x3d_{size}",
        family="x3d",
        input_shape=(3, frames, height, width),
        description=f"X3D-{size.upper()}: inverted bottlenecks with depthwise 3x3x3 convolutions",
        source=X3D_PAPER,
    )


_ALL = (
    Network(
        name="c3d",
        family="c3d",
        input_shape=(3, 16, 112, 112),
        description="C3D: eight dense 3x3x3 convolutions and three fully connected layers",
        source=C3D_PAPER,
    ),
    _x3d("xs", 4, 160, 160),
    _x3d("s", 13, 160, 160),
    _x3d("m", 16, 224, 224),
    _x3d("l", 16, 312, 312),
)
NETWORKS: dict[str, Network] = {network.name: network for network in _ALL}
