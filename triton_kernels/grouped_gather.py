"""What a grouped kernel sums, a convolution or the input gradient of one, and its packed weights.

Both are one gather. With f = (o * stride + tap * dilation - before) / divisor per axis

    y[n, k, o] = sum over taps and the channels c of k's group of w[k, c, tap] * x[n, c, f]

where terms at a fraction or outside x are zero. A convolution has divisor 1. Its input gradient
gathers gy with stride 1, the forward stride as divisor, taps backwards and weights transposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import triton
import triton.language as tl

from ..geometry import Geometry
from .launch import Launch, wide

PACK = 1024  # elements that one program packs


@dataclass(frozen=True)
class Gather:
    """Sizes over three axes; `before` may be negative; the groups are those of the forward."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    divisor: tuple[int, ...] = (1, 1, 1)
    transposed: bool = False

    @classmethod
    def forward(cls, geometry: Geometry) -> Gather:
        """y from x."""
        g = geometry.lifted()
        return cls(
            g.batch,
            g.in_channels,
            g.out_channels,
            g.groups,
            g.in_size,
            g.out_size,
            g.kernel,
            g.stride,
            g.dilation,
            tuple(before for before, _ in g.padding),
        )

    @classmethod
    def backward(cls, geometry: Geometry) -> Gather:
        """gx from gy."""
        g = geometry.lifted()
        return cls(
            g.batch,
            g.out_channels,
            g.in_channels,
            g.groups,
            g.out_size,
            g.in_size,
            g.kernel,
            (1, 1, 1),
            g.dilation,
            tuple(s - 1 - before for s, (before, _) in zip(g.span, g.padding, strict=True)),
            g.stride,
            True,
        )

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.in_channels // self.groups

    @property
    def outputs(self) -> int:
        """Output channels of a group."""
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    @property
    def pixels(self) -> int:
        """Outputs of one channel, over the batch."""
        return self.batch * prod(self.out_size)

    @property
    def wide(self) -> bool:
        """Whether offsets into x, y and one tile's edge beyond them need 64 bits."""
        return wide(
            self.batch * self.in_channels * prod(self.in_size), self.pixels * self.out_channels
        )

    @property
    def padded(self) -> bool:
        """Whether some output reaches outside x."""
        last = (
            (o - 1) * s + (k - 1) * d - b
            for o, s, k, d, b in zip(
                self.out_size, self.stride, self.kernel, self.dilation, self.before, strict=True
            )
        )
        return any(b > 0 for b in self.before) or any(
            end >= size * v for end, size, v in zip(last, self.in_size, self.divisor, strict=True)
        )

    @property
    def flat(self) -> bool:
        """Whether an output reads the one pixel that has its own number."""
        plain = self.taps == 1 and max(*self.stride, *self.divisor) == 1
        return plain and self.in_size == self.out_size and self.before == (0, 0, 0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The integers behind the pointers of every kernel here."""
        channels = (self.in_channels, self.out_channels)
        return (*self.in_size, *self.out_size, *self.before, *channels)

    @property
    def window(self) -> tuple[tuple[str, Any], ...]:
        """The constexprs KT .. SW of taps, dilation and stride."""
        named = (("K", self.kernel), ("D", self.dilation), ("S", self.stride))
        return tuple(
            (letter + axis, value)
            for letter, values in named
            for axis, value in zip("THW", values, strict=True)
        )


@triton.jit
def _weight(w_ptr, k, c, tap, mask, CG: tl.constexpr, KG: tl.constexpr, TAPS: tl.constexpr,
            TRANSPOSED: tl.constexpr):  # fmt: skip
    """w of output k and input c of its group, of a gather; w (K, C / G, taps) is the forward's."""
    if TRANSPOSED:
        offset = ((k // KG * CG + c) * KG + k % KG) * TAPS + TAPS - 1 - tap
    else:
        offset = (k * CG + c) * TAPS + tap
    return tl.load(w_ptr + offset, mask=mask, other=0.0)


@triton.jit
def _pack_tiles(w_ptr, packed_ptr, size, out_channels, GT: tl.constexpr, CG: tl.constexpr,
                KG: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
                BLOCK_CO: tl.constexpr, LAST: tl.constexpr, TRANSPOSED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """packed (tiles, taps, rows, outputs), or (.., outputs, rows): groups on the diagonal."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        co = e % BLOCK_CO
        row = e // BLOCK_CO % ROWS
    else:
        row = e % ROWS
        co = e // ROWS % BLOCK_CO
    rest = e // (BLOCK_CO * ROWS)
    tile = rest // TAPS
    co += tile % PARTS * BLOCK_CO
    k = tile // PARTS * (GT * KG) + co
    c = row - co // KG * CG
    mask = (e < size) & (co < GT * KG) & (k < out_channels) & (c >= 0) & (c < CG)
    value = _weight(w_ptr, k, c, rest % TAPS, mask, CG, KG, TAPS, TRANSPOSED)
    tl.store(packed_ptr + e, value, mask=e < size)


@triton.jit
def _pack_lanes(w_ptr, packed_ptr, size, out_channels, CG: tl.constexpr, KG: tl.constexpr,
                KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PARTS: tl.constexpr,
                OUTPUTS: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """packed (tiles, KH, CG, KT, KW, outputs); PARTS 0: tiles of channels whatever their group."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = e // OUTPUTS
    kw, rest = rest % KW, rest // KW
    kt, rest = rest % KT, rest // KT
    c, rest = rest % CG, rest // CG
    kh, tile = rest % KH, rest // KH
    mask = e < size
    if PARTS == 0:
        k = tile * OUTPUTS + e % OUTPUTS
    else:
        co = tile % PARTS * OUTPUTS + e % OUTPUTS
        k = tile // PARTS * KG + co
        mask &= co < KG
    mask &= k < out_channels
    tap = (kt * KH + kh) * KW + kw
    value = _weight(w_ptr, k, c, tap, mask, CG, KG, KT * KH * KW, TRANSPOSED)
    tl.store(packed_ptr + e, value, mask=e < size)


def pack_tiles(
    gather: Gather, each: int, parts: int, rows: int, outputs: int, last: bool
) -> tuple[int, Launch]:
    """The size of packed weights (tiles, taps, rows, outputs), and the start that writes them.

    each: groups of a tile;  parts: tiles of one group that is larger than a tile
    last: outputs are the last axis, else rows
    """
    size = -(-gather.groups // each) * parts * gather.taps * rows * outputs
    constants = (
        ("GT", each),
        ("CG", gather.inputs),
        ("KG", gather.outputs),
        ("TAPS", gather.taps),
        ("PARTS", parts),
        ("ROWS", rows),
        ("BLOCK_CO", outputs),
        ("LAST", last),
        ("TRANSPOSED", gather.transposed),
    )
    return size, _start(_pack_tiles, size, gather, constants)


def pack_lanes(gather: Gather, parts: int, outputs: int) -> tuple[int, Launch]:
    """The size of packed weights (tiles, KH, C / G, KT, KW, outputs), and the start that writes.

    parts: tiles of each group, or 0 for tiles of channels whatever their group
    """
    tiles = gather.groups * parts if parts else -(-gather.out_channels // outputs)
    size = tiles * gather.taps * gather.inputs * outputs
    constants = (
        ("CG", gather.inputs),
        ("KG", gather.outputs),
        *zip(("KT", "KH", "KW"), gather.kernel, strict=True),
        ("PARTS", parts),
        ("OUTPUTS", outputs),
        ("TRANSPOSED", gather.transposed),
    )
    return size, _start(_pack_lanes, size, gather, constants)


def _start(kernel: Any, size: int, gather: Gather, constants: tuple[Any, ...]) -> Launch:
    return Launch(
        kernel,
        -(-size // PACK),
        ("w", "packed"),
        (size, gather.out_channels),
        (*constants, ("BLOCK", PACK)),
    )
