"""Gradients of a depthwise convolution; a plan here is that of the forward pass.

The gradient of the input is the forward kernel with other reads. That of the weights is summed in
two stages, each in a fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd, prod

import torch

from ..geometry import Geometry
from ..plan import CHANNELS_LAST, Plan
from . import depthwise_axes as axes
from . import depthwise_weight_source as weight_source
from . import emit, launch
from .depthwise_launch import PROCESSORS, Pass, kernel_launch, strides

MOST_SUMS = 64  # taps times elements that a thread sums in registers
PLACES = 256  # gradients that one program of the second stage completes
PARTS = 16  # partial sums that it adds at once
TRANSPOSE = """\
def depthwise_transpose(w_ptr, packed_ptr, channels, taps, B: tl.constexpr):
    place = tl.program_id(0) * B + tl.arange(0, B)
    has = place < channels * taps
    w = tl.load(w_ptr + (place % channels * taps + place // channels), mask=has)
    tl.store(packed_ptr + place, w, mask=has)
"""


def supports(geometry: Geometry, dtype: str) -> str | None:
    """None, or the reason against."""
    if not geometry.is_depthwise:
        return f"not depthwise: {geometry.groups} groups for {geometry.in_channels} input channels"
    return launch.refuse_dtype(dtype)


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that either gradient needs as scratch."""
    g = plan.geometry
    partial = _splits(plan) * prod(g.w_shape) * (4 // _bytes(plan))
    return max(partial, prod(g.w_shape) if plan.layout == CHANNELS_LAST else 0)


@lru_cache(maxsize=4096)
def launches_input(plan: Plan) -> tuple[launch.Launch, ...]:
    """The kernel starts of `input_gradient`; `packed` is the workspace."""
    g = plan.geometry
    if not prod(g.x_shape):
        return ()
    gradient = Pass(plan, backward=True, options=plan.options)
    names = ("bias", "residual", "gx")
    if plan.layout != CHANNELS_LAST:
        return (kernel_launch(gradient, ("gy", "w", *names)),)
    pack = launch.Launch(
        kernel=emit.kernel(TRANSPOSE),
        programs=-(-prod(g.w_shape) // PLACES),
        arrays=("w", "packed"),
        scalars=(g.out_channels, g.taps),
        constants=(("B", PLACES),),
    )
    return pack, kernel_launch(gradient, ("gy", "packed", *names))


def input_gradient(plan, gy, w, gx, workspace) -> None:
    """Write the gradient of the input to gx.

    gy         (N, K, *out_size)
    w          (K, 1, *kernel), contiguous
    gx         (N, C, *in_size), written
    workspace  `workspace_size(plan)` elements, overwritten

    Equivalent to `torch.nn.grad.conv3d_input(x.shape, w, gy, ..., groups=C)`.
    """
    arrays = {"gy": gy, "w": w, "packed": workspace, "bias": None, "residual": None, "gx": gx}
    with launch.device_of(gy):
        for start in launches_input(plan):
            start(arrays)


@lru_cache(maxsize=4096)
def launches_weight(plan: Plan) -> tuple[launch.Launch, ...]:
    """The kernel starts of `weight_gradient`; `partial` is the workspace as float32."""
    g = plan.geometry
    splits = _splits(plan)
    second = launch.Launch(
        kernel=emit.kernel(weight_source.SUM),
        programs=-(-prod(g.w_shape) // PLACES),
        arrays=("partial", "gw"),
        scalars=(g.out_channels, g.taps, splits),
        constants=(("B", PLACES), ("S", PARTS)),
    )
    return (*((_first_stage(plan, splits),) if splits else ()), second)


def weight_gradient(plan, x, gy, gw, workspace) -> None:
    """Write the gradient of the weights to gw.

    x          (N, C, *in_size)
    gy         (N, K, *out_size)
    gw         (K, 1, *kernel), contiguous, written
    workspace  `workspace_size(plan)` elements, overwritten

    Equivalent to `torch.nn.grad.conv3d_weight(x, w.shape, gy, ..., groups=C)`.
    """
    partial = workspace.view(torch.float32) if _splits(plan) else gw  # of an empty batch: none
    arrays = {"x": x, "gy": gy, "partial": partial, "gw": gw}
    with launch.device_of(x):
        for start in launches_weight(plan):
            start(arrays)


def _bytes(plan: Plan) -> int:
    return 4 if plan.dtype == "float32" else 2


class _Share:
    """How the outputs and taps of a plan are shared out among the programs of the first stage."""

    def __init__(self, plan: Plan) -> None:
        g = plan.geometry.lifted()
        options = plan.options
        channels = g.out_channels
        self.multiplier = channels // g.in_channels
        last = plan.layout == CHANNELS_LAST
        widest = gcd(channels, 16 // _bytes(plan)) if last and self.multiplier == 1 else 1
        # Axes whose taps are shared out, time first, until the rest fits into registers.
        self.kernel, self.shared = list(g.kernel), [1, 1, 1]
        for axis in range(3):
            if prod(self.kernel) > MOST_SUMS:
                self.shared[axis], self.kernel[axis] = self.kernel[axis], 1
        fits = MOST_SUMS // prod(self.kernel) // (1 if last else 2)
        fits = 4 if fits >= 4 else 2 if fits >= 2 else 1
        self.vector = gcd(widest, options.get("vector", fits))
        elements = max(self.vector, options.get("elements", fits))
        self.channels = _channel_block(channels, self.vector, _bytes(plan)) if last else 1
        self.warps = options.get("warps", 4)
        self.positions = max(1, 32 * self.warps * elements // self.channels)
        # A tile never reaches beyond the outputs: their gradients there would be zeros, and zero
        # times an infinite input NaN.
        self.tile = (2 if self.kernel[1] > 1 and g.out_size[1] % 2 == 0 else 1, 1)
        dilation = [1 if s > 1 else d for s, d in zip(self.shared, g.dilation, strict=True)]
        self.time = axes.forward_stream(self.kernel[0], g.stride[0], dilation[0])
        self.height, self.width = (
            axes.forward(o, k, s, d)
            for o, k, s, d in zip(
                self.tile, self.kernel[1:], g.stride[1:], dilation[1:], strict=True
            )
        )
        self.rows, self.columns = (-(-g.out_size[1 + i] // self.tile[i]) for i in (0, 1))
        self.units = g.batch * self.rows * self.columns
        self.blocks = -(-channels // self.channels)
        self.unit_blocks = -(-self.units // self.positions)
        steps = -(-g.out_size[0] // self.time.residues)
        self.frames = max(1, min(steps, options.get("frames", 32)))
        programs = self.unit_blocks * self.blocks * prod(self.shared) * self.time.residues
        while programs * -(-steps // self.frames) < 2 * PROCESSORS and self.frames > 4:
            self.frames = -(-self.frames // 2)
        self.chunks = self.time.residues * -(-steps // self.frames)
        self.items = self.unit_blocks * self.chunks
        share = self.blocks * prod(self.shared)
        self.splits = min(self.items, max(1, 8 * PROCESSORS // share))


def _channel_block(channels: int, vector: int, size: int) -> int:
    """Channels of a program: a power of two that wastes little and makes whole sectors."""
    candidates = [c for c in (128, 64, 32, 16, 8) if c >= vector]
    most = launch.power_of_two(channels)
    return min(
        (min(c, most) for c in candidates),
        key=lambda c: (-(-channels // c) * c * (1 if c * size >= 64 else 1.2), -c),
    )


@lru_cache(maxsize=4096)
def _share(plan: Plan) -> _Share:
    return _Share(plan)


def _splits(plan: Plan) -> int:
    """Partial sums per gradient: 0 for an empty batch."""
    return _share(plan).splits if prod(plan.geometry.y_shape) else 0


def _first_stage(plan: Plan, splits: int) -> launch.Launch:
    g, share = plan.geometry.lifted(), _share(plan)
    last = plan.layout == CHANNELS_LAST
    wide = bool(plan.options.get("wide")) or launch.wide(
        g.batch * g.in_channels * prod(g.padded_size), 2 * prod(g.y_shape), splits * prod(g.w_shape)
    )
    s = weight_source.Structure(
        time=share.time,
        height=share.height,
        width=share.width,
        kernel=tuple(share.kernel),
        dilation=g.dilation,
        vector=share.vector,
        channels_last=last,
        multiplied=share.multiplier > 1,
        ahead=bool(plan.options.get("ahead", 0)),
        wide=wide,
    )
    before = [-pair[0] for pair in g.padding]
    scalars = (
        *(share.units, share.items, splits, share.chunks, share.frames, share.multiplier),
        *(g.out_channels // share.vector, share.blocks, share.columns, share.rows),
        *share.shared[1:],
        *(*g.in_size, *g.out_size, *before),
        *(e // share.vector for e in strides(g.x_shape, last)),
        *(e // share.vector for e in strides(g.y_shape, last)),
    )
    return launch.Launch(
        kernel=emit.kernel(weight_source.source(s), general=weight_source.INTEGERS),
        programs=splits * share.blocks * prod(share.shared),
        arrays=("x", "gy", "partial"),
        scalars=scalars,
        constants=(("P", share.positions), ("C", share.channels)),
        warps=share.warps,
        registers=plan.options.get("registers", 0),
    )
