"""The weight gradient of a grouped convolution: products over pixels, summed in two fixed stages.

A program multiplies gy (outputs, pixels) with the input under some taps, (pixels, taps x channels),
over its share of the pixels; a second kernel adds the shares in their order. Of groups that share a
tile, what one makes with another is not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import triton
import triton.language as tl

from .grouped_gather import Gather
from .launch import Launch, power_of_two, wide

PROGRAMS = 1056  # wanted, eight for each multiprocessor of an H100
LONGEST = 64  # shares at most
REDUCED = 256  # sums that one program of the second stage makes


@triton.jit
def grouped_weight_sums(
    x_ptr, gy_ptr, sums_ptr,
    in_t, in_h, in_w, out_t, out_h, out_w, before_t, before_h, before_w,
    in_channels, out_channels, pixels, tiles, share,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    GT: tl.constexpr, CG: tl.constexpr, KG: tl.constexpr, PARTS: tl.constexpr,
    CI_BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr,
    LAST: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sums (shares, K, C / G, taps): those of BLOCK_CO outputs and BLOCK_N columns (tap, input)."""
    at = tl.program_id(0)
    column_block, at = at % COLUMNS, at // COLUMNS
    c_block, at = at % CI_BLOCKS, at // CI_BLOCKS
    tile, part = at % tiles, at // tiles
    if WIDE:
        part, tile = part.to(tl.int64), tile.to(tl.int64)
        in_w, out_w = tl.cast(in_w, tl.int64), tl.cast(out_w, tl.int64)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = column // BLOCK_CI
    c = c_block * BLOCK_CI + column % BLOCK_CI
    first = tile // PARTS * (GT * CG)
    co = tile % PARTS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    k = tile // PARTS * (GT * KG) + co
    real_k = (co < GT * KG) & (k < out_channels)
    real_c = (tap < KT * KH * KW) & (c < GT * CG) & (first + c < in_channels)
    dt, dh, dw = tap // (KH * KW) * DT, tap // KW % KH * DH, tap % KW * DW
    out_volume, in_volume = out_t * out_h * out_w, in_t * in_h * in_w
    # The same numbers, and the compiler sees what divides them.
    inputs, outputs = in_channels // ALIGN_X * ALIGN_X, out_channels // ALIGN_Y * ALIGN_Y
    shift = (dt * in_h + dh) * in_w + dw
    if LAST:
        shift *= inputs
    else:
        shift += (first + c) * in_volume
    acc = tl.zeros((BLOCK_CO, BLOCK_N), tl.float32)
    for block in range(share):
        q = (part * share + block) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = q < pixels
        w = q % out_w * SW - before_w
        h = q // out_w % out_h * SH - before_h
        t = q // (out_w * out_h) % out_t * ST - before_t
        n = q // out_volume
        if LAST:
            y_at = (q * outputs)[None, :] + k[:, None]
            pixel = ((n * in_t + t) * in_h + h) * in_w + w
            base = pixel * inputs + first
            x_at = base[:, None] + shift[None, :] + c[None, :]
            f, g, e = t[:, None] + dt[None, :], h[:, None] + dh[None, :], w[:, None] + dw[None, :]
            ok = inside[:, None] & real_c[None, :]
        else:
            y_at = (q + n * out_volume * (out_channels - 1))[None, :] + (k * out_volume)[:, None]
            base = ((n * in_channels * in_t + t) * in_h + h) * in_w + w
            x_at = base[None, :] + shift[:, None]
            f, g, e = t[None, :] + dt[:, None], h[None, :] + dh[:, None], w[None, :] + dw[:, None]
            ok = inside[None, :] & real_c[:, None]
        ok &= (f >= 0) & (f < in_t) & (g >= 0) & (g < in_h) & (e >= 0) & (e < in_w)
        y = tl.load(gy_ptr + y_at, mask=real_k[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + x_at, mask=ok, other=0.0)
        if not LAST:
            x = tl.trans(x)
        acc = tl.dot(y, x, acc, input_precision=PRECISION)
    j = c[None, :] - (co // KG * CG)[:, None]
    taps: tl.constexpr = KT * KH * KW
    target = part * out_channels * (CG * taps) + (k[:, None] * CG + j) * taps + tap[None, :]
    own = real_k[:, None] & real_c[None, :] & (j >= 0) & (j < CG)
    tl.store(sums_ptr + target, acc, mask=own)


@triton.jit
def grouped_weight_total(sums_ptr, gw_ptr, size, shares, BLOCK: tl.constexpr):
    """gw = the sum of all shares, in their order."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(shares):
        total += tl.load(sums_ptr + e, mask=mask, other=0.0)
        sums_ptr += size
    tl.store(gw_ptr + e, total.to(gw_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class WeightSums:
    """How the weight gradient is cut; `share`: blocks of pixels that one program adds up."""

    gather: Gather
    dtype: str
    last: bool
    precision: str
    each: int
    parts: int
    pixels: int
    inputs: int
    outputs: int
    columns: int
    share: int
    warps: int
    stages: int

    @property
    def shares(self) -> int:
        blocks = -(-self.gather.pixels // self.pixels)
        return max(1, -(-blocks // self.share))

    @property
    def size(self) -> int:
        """Elements of gw."""
        g = self.gather
        return g.out_channels * g.inputs * g.taps

    @property
    def launches(self) -> tuple[Launch, Launch]:
        """On arrays x, gy, gw and sums, which is float32 with `shares * size` elements."""
        g = self.gather
        tiles = -(-g.groups // self.each) * self.parts
        steps = -(-self.each * g.inputs // self.inputs)
        blocks = -(-g.taps * self.inputs // self.columns)
        constants = (
            *g.window,
            ("GT", self.each),
            ("CG", g.inputs),
            ("KG", g.outputs),
            ("PARTS", self.parts),
            ("CI_BLOCKS", steps),
            ("COLUMNS", blocks),
            ("BLOCK_P", self.pixels),
            ("BLOCK_CI", self.inputs),
            ("BLOCK_CO", self.outputs),
            ("BLOCK_N", self.columns),
            ("LAST", self.last),
            ("ALIGN_X", gcd(g.in_channels, self.each * g.inputs, 16)),
            ("ALIGN_Y", gcd(g.out_channels, self.each * g.outputs, 16)),
            ("PRECISION", self.precision),
            ("WIDE", g.wide or wide(self.shares * self.size)),
        )
        sums = Launch(
            grouped_weight_sums,
            tiles * steps * blocks * self.shares,
            ("x", "gy", "sums"),
            (*g.sizes, g.pixels, tiles, self.share),
            constants,
            self.warps,
            self.stages,
        )
        return sums, total(self.size, self.shares)


def total(size: int, shares: int) -> Launch:
    """The start that adds shares of `size` sums, on arrays sums and gw."""
    constants = (("BLOCK", REDUCED),)
    return Launch(
        grouped_weight_total, -(-size // REDUCED), ("sums", "gw"), (size, shares), constants
    )


@lru_cache(maxsize=4096)
def cut(
    gather: Gather, dtype: str, last: bool, precision: str, options: tuple[tuple[str, int], ...]
) -> WeightSums:
    """The tiles of a weight gradient; options: 'weight_pixels', 'weight_columns'."""
    g, given = gather, dict(options)
    each = max(1, min(16 // g.inputs, 16 // g.outputs, g.groups))
    inputs = max(16, min(64 if last else 32, power_of_two(each * g.inputs)))
    outputs = max(16, min(64, power_of_two(each * g.outputs)))
    columns = given.get("weight_columns", 128 if last else 64)
    columns = max(inputs, min(columns, power_of_two(g.taps * inputs)))
    pixels = given.get("weight_pixels", 32 if dtype == "float32" or not last else 64)
    parts = -(-each * g.outputs // outputs)
    programs = -(-g.groups // each) * parts * -(-each * g.inputs // inputs)
    programs *= -(-g.taps * inputs // columns)
    blocks = -(-g.pixels // pixels)
    shares = max(1, min(-(-PROGRAMS // programs), LONGEST, blocks))
    share = max(1, -(-blocks // shares))
    warps = 8 if dtype == "float32" and outputs * columns >= 64 * 64 else 4
    return WeightSums(
        g, dtype, last, precision, each, parts, pixels, inputs, outputs, columns, share, warps, 3
    )
