"""The gradient kernels of csrc/gradients.h: how a plan is cut into blocks, strips and chunks."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from ..geometry import Geometry
from ..plan import CONTIGUOUS, Plan
from . import launch
from .launch import ffi, lib

OUTPUTS = {16: (1, 2, 3, 4, 6, 8), 8: (1, 2, 3, 4), 4: (1, 2, 3, 4)}  # csrc/weight_gradient.h
STRIP_BYTES = 256 << 10  # of one vector of inputs and outputs: they stay in L2 for all taps
ITEMS = 32  # blocks times chunks, for any number of threads
MOST_CHUNKS = 64
SUMS_BYTES = 8 << 20  # of all chunks, unless one needs more
MOST_ROW_TAPS = 64  # taps in time and height of csrc/input_gradient.h


class Gradient:
    """A plan's C structure, and the floats of workspace that its two kernels need."""

    def __init__(self, plan: Plan, lanes: int) -> None:
        geometry = plan.geometry.lifted()
        blocks, lane_of = cut(geometry, lanes)
        sums = geometry.taps * lanes * sum(b["outputs"] for b in blocks)
        high, chunks = _strips(geometry, len(blocks), sums, lanes)
        # (blocks, most outputs, lanes)
        table = np.zeros((len(blocks), lib.FC_MOST_OUTPUTS, lanes), np.int32)
        for i, rows in enumerate(lane_of):
            table[i, : len(rows)] = rows
        self._keep = (ffi.new("fc_gradient_block[]", blocks), table)
        self.params = ffi.new(
            "fc_gradient *",
            {
                "geometry": launch.c_geometry(plan.geometry),
                "isa": launch.instruction_sets()[launch.isa()],
                "contiguous": plan.layout == CONTIGUOUS,
                "blocks": len(blocks),
                "high": high,
                "chunks": chunks,
                "sums": sums,
                "block": self._keep[0],
                "lane_of": ffi.cast("int32_t *", launch.address(table)),
            },
        )
        copies = int(lib.fc_gradient_copies(self.params))
        packed = geometry.taps * (geometry.in_channels + lanes)
        self.workspace = copies + max(chunks * sums, packed)


@lru_cache(maxsize=1024)
def _gradient(plan: Plan, lanes: int, isa: str) -> Gradient:
    return Gradient(plan, lanes)


def gradient_of(plan: Plan) -> Gradient:
    """The Gradient of a plan for the instruction set in use."""
    return _gradient(plan, launch.lanes(), launch.isa())


def cut(geometry: Geometry, lanes: int) -> tuple[list[dict[str, int]], list[np.ndarray]]:
    """The blocks, initialisers of fc_gradient_block, and (outputs, lanes) for each: the lane of its
    vector of gy that each lane multiplies.

    As many whole groups as fit share a vector; a group that does not fit has several.
    """
    c, k = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    together = max(1, lanes // max(c, k))
    most = OUTPUTS[lanes][-1]
    pieces = -(-k // most)
    size = -(-k // pieces)  # outputs of a block
    # One output alone multiplies lane by lane; a group's inputs share theirs.
    compiled = next(n for n in OUTPUTS[lanes] if n >= size and (n > 1 or c == 1))
    lane = np.arange(lanes)
    blocks, lane_of = [], []
    for group in range(0, geometry.groups, together):
        groups = min(together, geometry.groups - group)
        for first in range(0, groups * c, lanes):
            for output in range(0, k, size):
                valid = min(size, k - output)
                one = groups == 1 and together == 1
                block = {
                    "x_channel": group * c + first,
                    "x_lanes": min(lanes, groups * c - first),
                    "y_channel": group * k + (output if one else 0),
                    "outputs": compiled,
                    "valid": valid,
                }
                start = 0 * lane if one else np.minimum(lane // c, groups - 1) * k + output
                blocks.append(block)
                lane_of.append(start + np.minimum(np.arange(compiled), valid - 1)[:, None])
    return blocks, lane_of


def _strips(geometry: Geometry, blocks: int, sums: int, lanes: int) -> tuple[int, int]:
    """Output rows of a strip, and the number of chunks."""
    n, (_, out_h, out_w) = geometry.batch, geometry.out_size
    row = 4 * lanes * (out_w + geometry.kernel[0] * geometry.stride[1] * geometry.in_size[2])
    wanted = -(-ITEMS // blocks)
    high = max(1, min(STRIP_BYTES // row, -(-out_h // -(-wanted // max(n, 1)))))
    strips = n * -(-out_h // high)
    fitting = max(1, SUMS_BYTES // (4 * sums))
    return high, max(1, min(strips, MOST_CHUNKS, fitting))


def workspace_size(plan: Plan) -> int:
    """Elements of float32 that either kernel needs as scratch."""
    return gradient_of(plan).workspace


def weight_gradient(plan: Plan, x: Any, gy: Any, gw: Any, workspace: Any) -> None:
    """Write the gradient of the weights to gw (K, C / G, *kernel)."""
    lib.fc_weight_gradient(
        gradient_of(plan).params,
        *map(launch.address, (x, gy, gw, workspace)),
        launch.threads(),
    )


def depthwise_input_gradient(plan: Plan, gy: Any, w: Any, gx: Any, workspace: Any) -> None:
    """Write the gradient of the input to gx; of depthwise convolutions without multiplier."""
    if prod(plan.geometry.x_shape):
        lib.fc_input_gradient(
            gradient_of(plan).params,
            *map(launch.address, (gy, w, gx, workspace)),
            launch.threads(),
        )
