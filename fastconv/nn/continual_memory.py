"""Memory of networks on streams, in numbers kept: as published, and of what is held here.

Source of the published count: Hedegaard and Iosifidis, Continual 3D Convolutional Neural Networks,
ECCV 2022, section 3.7. Its figures are the worst case of X3D-M and CoX3D-M.
"""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from .continual_conv import Convolution
from .continual_network import Continual
from .continual_ops import Delay
from .trace import trace


def held(network: Continual) -> int:
    """Numbers that one slot of a started network holds between two frames; counters aside."""
    return sum(
        tensor.numel()
        for _, _, state in network.named_states()
        for key, tensor in state.items()
        if key != "steps"
    ) // max(network.slots, 1)


def published_continual(network: Continual) -> int:
    """Numbers kept by the published count, for one slot of a started network.

    Two maps of the output of every convolution over time, as if each had three taps; two maps of
    what a residual keeps back; the columns under the last pooling but the newest.
    """
    total = 0
    for _, op, state in network.named_states():
        if isinstance(op, Convolution):
            if op.reach:
                _, k, _, *frame = op.sum_shape(state, network.slots)
                total += 2 * k * prod(frame)
        elif isinstance(op, Delay):
            total += 2 * state["columns"].numel() // network.slots
        else:
            kept = (t.numel() for key, t in state.items() if key != "steps")
            total += sum(kept) // network.slots
    return total


def published_clip(model: nn.Module, clip: Tensor) -> int:
    """Numbers kept where the clip (N, C, T, *size) is recomputed for every frame, for N = 1.

    The frames but the newest, and the first convolution's output.
    """
    first = trace(model, clip)[0]
    _, _, frames, *_ = clip.shape
    return (frames - 1) * prod(clip.shape[1:]) // frames + prod(first.y_shape[1:])
