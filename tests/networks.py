"""The zoo's networks as small as tests need them."""

from __future__ import annotations

import torch

from fastconv.zoo import NETWORKS, build

SMALL = (4, 32, 32)
C3D_CLIP = (16, 16, 16)  # spares C3D the large fc6
# Clips of these are not smaller: temporal strides, windows, poolings that leave nothing.
SMALLEST = {
    "c3d": (16, 32, 32),
    "fsb": (64, 32, 32),
    "slowfast": (32, 32, 32),
    "i3d": (9, 32, 32),
    "s3d": (14, 32, 32),
    "shufflenet": (16, 64, 64),
}


def small(name, **options):
    """A network in eval mode; C3D for clips of 16 x 16 x 16."""
    if name in ("c3d", "fsb_c3d"):
        options["clip"] = C3D_CLIP
    return build(name, **options).eval()


def small_input(name, batch=1):
    """Noise of the smallest clip that a network takes without an empty map, or a little more."""
    network = NETWORKS[name]
    size = C3D_CLIP if name in ("c3d", "fsb_c3d") else SMALLEST.get(network.family, SMALL)
    size = size[4 - len(network.input_shape) :]
    return noise(batch, 3, *size)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
