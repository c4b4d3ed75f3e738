"""Grouped convolution as products of tiles, on tensor cores: an implicit GEMM.

A program makes a tile of pixels x outputs: for every tap it adds the product of the pixels that
the tap reads, all channels of the tile's groups, with a block of packed weights. Small groups share
a tile, each a block on the diagonal of the weights, and zeros elsewhere. A zero times Inf is NaN,
so a tile that comes out with NaN is made again group by group, where no other group can reach it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import triton
import triton.language as tl

from ..epilogue import Epilogue
from . import finish
from .grouped_gather import Gather, pack_tiles
from .interpreter import interpreted
from .launch import Launch, epilogue_constants, power_of_two

SHARED_CHANNELS = 16  # of a tile that small groups share: the depth of one tensor core product
PROGRAMS = 264  # wanted at least, two for each multiprocessor of an H100


@triton.jit
def sum_of_products(
    x_ptr, w_ptr, n, t, h, w, inside, group, first, in_t, in_h, in_w, in_channels,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    VT: tl.constexpr, VH: tl.constexpr, VW: tl.constexpr,
    GT: tl.constexpr, CG: tl.constexpr, CI_BLOCKS: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    LAST: tl.constexpr, PADDED: tl.constexpr, FLAT: tl.constexpr, RAGGED: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of one tile in float32, (pixels, outputs) if LAST, else (outputs, pixels).

    n, t, h, w  of the pixels, (pixels,), where tap 0 reads; if FLAT, w is the offset of the pixel
    group       of the tile, the only one that is read if ALONE
    first       channel of the tile
    """
    if LAST:
        acc = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    else:
        acc = tl.zeros((BLOCK_CO, BLOCK_P), tl.float32)
    row = tl.arange(0, BLOCK_CI)
    co = tl.arange(0, BLOCK_CO)
    channels = in_channels // ALIGN * ALIGN  # the same number, and the compiler sees it divisible
    frames = in_t
    if not LAST:
        frames *= in_channels
    if FLAT:
        start = w
    else:
        start = ((n * frames + t) * in_h + h) * in_w + w
    for step in range(KT * KH * KW * CI_BLOCKS):
        tap = step // CI_BLOCKS
        c = step % CI_BLOCKS * BLOCK_CI + row
        dt = tap // (KH * KW) * DT
        dh = tap // KW % KH * DH
        dw = tap % KW * DW
        ok = inside
        if VT * VH * VW > 1:
            ft, fh, fw = t + dt, h + dh, w + dw
            ok = ok & (ft % VT == 0) & (fh % VH == 0) & (fw % VW == 0)
            ft, fh, fw = ft // VT, fh // VH, fw // VW
            ok = ok & (ft >= 0) & (ft < in_t) & (fh >= 0) & (fh < in_h) & (fw >= 0) & (fw < in_w)
            pixel = ((n * frames + ft) * in_h + fh) * in_w + fw
        else:
            if PADDED:
                ok = ok & (t >= -dt) & (t < in_t - dt) & (h >= -dh) & (h < in_h - dh)
                ok = ok & (w >= -dw) & (w < in_w - dw)
            pixel = start + ((dt * in_h + dh) * in_w + dw)
        if ALONE:
            real = (c >= group * CG) & (c < group * CG + CG)
        else:
            real = c < GT * CG
        if RAGGED:
            real = real & (first + c < in_channels)
        if LAST:
            offset = pixel * channels + first
            at = x_ptr + (offset[:, None] + c[None, :])
            if GT * CG == CI_BLOCKS * BLOCK_CI and not RAGGED and not ALONE:
                x = tl.load(at, mask=ok[:, None], other=0.0)
            else:
                x = tl.load(at, mask=ok[:, None] & real[None, :], other=0.0)
            w_at = w_ptr + step * (BLOCK_CI * BLOCK_CO)
            f = tl.load(w_at + (row[:, None] * BLOCK_CO + co[None, :]))
            acc = tl.dot(x, f, acc, input_precision=PRECISION)
        else:
            offset = (first + c) * (in_t * in_h * in_w)
            at = x_ptr + (offset[:, None] + pixel[None, :])
            x = tl.load(at, mask=real[:, None] & ok[None, :], other=0.0)
            w_at = w_ptr + tap * (CI_BLOCKS * BLOCK_CI * BLOCK_CO)
            f = tl.load(w_at + (co[:, None] * (CI_BLOCKS * BLOCK_CI) + c[None, :]))
            acc = tl.dot(f, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def grouped_tiles(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    in_t, in_h, in_w, out_t, out_h, out_w, before_t, before_h, before_w,
    in_channels, out_channels, pixels, tiles,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    VT: tl.constexpr, VH: tl.constexpr, VW: tl.constexpr,
    GT: tl.constexpr, CG: tl.constexpr, KG: tl.constexpr, PARTS: tl.constexpr,
    CI_BLOCKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    LAST: tl.constexpr, PADDED: tl.constexpr, FLAT: tl.constexpr, RAGGED: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_P pixels, counted over the batch, and BLOCK_CO outputs of GT groups."""
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    first = tile // PARTS * (GT * CG)
    if WIDE:
        block, first, tile = block.to(tl.int64), first.to(tl.int64), tile.to(tl.int64)
        in_w, out_w = tl.cast(in_w, tl.int64), tl.cast(out_w, tl.int64)
    q = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = q < pixels
    volume = out_t * out_h * out_w
    n = q // volume
    if FLAT:
        t, h, w = n, n, q
        if not LAST:
            w += n * volume * (in_channels - 1)
    else:
        w = q % out_w * SW - before_w
        h = q // out_w % out_h * SH - before_h
        t = q // (out_w * out_h) % out_t * ST - before_t
    w_ptr += tile * (KT * KH * KW * CI_BLOCKS * BLOCK_CI * BLOCK_CO)
    co = tile % PARTS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    k = tile // PARTS * (GT * KG) + co
    real = (co < GT * KG) & (k < out_channels)
    z = sum_of_products(x_ptr, w_ptr, n, t, h, w, inside, 0, first, in_t, in_h, in_w, in_channels,
             KT, KH, KW, DT, DH, DW, VT, VH, VW, GT, CG, CI_BLOCKS, False, BLOCK_P, BLOCK_CI,
             BLOCK_CO, LAST, PADDED, FLAT, RAGGED, ALIGN, PRECISION)  # fmt: skip
    if GT > 1:
        bad = tl.max((z != z).to(tl.int32))
        if bad > 0:
            for group in range(GT):
                own = sum_of_products(x_ptr, w_ptr, n, t, h, w, inside, group, first, in_t, in_h,
                           in_w, in_channels, KT, KH, KW, DT, DH, DW, VT, VH, VW, GT, CG, CI_BLOCKS,
                           True, BLOCK_P, BLOCK_CI, BLOCK_CO, LAST, PADDED, FLAT, RAGGED,
                           ALIGN, PRECISION)  # fmt: skip
                if LAST:
                    z = tl.where((co // KG == group)[None, :], own, z)
                else:
                    z = tl.where((co // KG == group)[:, None], own, z)
    if LAST:
        if HAS_BIAS:
            z += tl.load(bias_ptr + k, mask=real, other=0.0).to(tl.float32)[None, :]
        offsets = (q * (out_channels // ALIGN_Y * ALIGN_Y))[:, None] + k[None, :]
        mask = inside[:, None] & real[None, :]
    else:
        if HAS_BIAS:
            z += tl.load(bias_ptr + k, mask=real, other=0.0).to(tl.float32)[:, None]
        offsets = (k * volume)[:, None] + (q + n * volume * (out_channels - 1))[None, :]
        mask = real[:, None] & inside[None, :]
    finish.store(y_ptr, residual_ptr, offsets, z, mask, ACTIVATION, HAS_RESIDUAL)


@dataclass(frozen=True)
class Tiles:
    """How a gather is cut: groups of a tile, tiles of a large group, blocks of a product."""

    gather: Gather
    dtype: str
    last: bool
    precision: str
    each: int
    parts: int
    pixels: int
    inputs: int
    outputs: int
    warps: int
    stages: int

    @property
    def steps(self) -> int:
        """Blocks of channels."""
        return -(-self.each * self.gather.inputs // self.inputs)

    @property
    def pack(self) -> tuple[int, Launch]:
        """The size of the packed weights, and the start that writes them."""
        return pack_tiles(
            self.gather, self.each, self.parts, self.steps * self.inputs, self.outputs, self.last
        )

    def launch(self, epilogue: Epilogue, arrays: tuple[str, ...]) -> Launch:
        """The start of the kernel on arrays of these names: x, packed, bias, residual, y."""
        g = self.gather
        tiles = -(-g.groups // self.each) * self.parts
        channels = self.each * g.inputs
        size, _ = self.pack
        constants = (
            *g.window,
            *zip(("VT", "VH", "VW"), g.divisor, strict=True),
            ("GT", self.each),
            ("CG", g.inputs),
            ("KG", g.outputs),
            ("PARTS", self.parts),
            ("CI_BLOCKS", self.steps),
            ("BLOCK_P", self.pixels),
            ("BLOCK_CI", self.inputs),
            ("BLOCK_CO", self.outputs),
            ("LAST", self.last),
            ("PADDED", g.padded),
            ("FLAT", g.flat),
            ("RAGGED", g.groups % self.each != 0),
            ("ALIGN", gcd(g.in_channels, channels, 16)),
            ("ALIGN_Y", gcd(g.out_channels, 16)),
            ("PRECISION", self.precision),
            ("WIDE", g.wide or wide_packed(size)),
            *epilogue_constants(epilogue),
        )
        return Launch(
            grouped_tiles,
            tiles * -(-g.pixels // self.pixels),
            arrays,
            (*g.sizes, g.pixels, tiles),
            constants,
            self.warps,
            self.stages,
        )


def wide_packed(size: int) -> bool:
    """Whether packed weights alone need 64 bits."""
    return size > 2**30


@lru_cache(maxsize=4096)
def cut(
    gather: Gather, dtype: str, last: bool, precision: str, options: tuple[tuple[str, int], ...]
) -> Tiles:
    """The tiles of a gather; options: 'each', 'pixels', 'inputs', 'outputs', 'warps', 'stages'."""
    g, given = gather, dict(options)
    each = given.get("each") or groups_of_a_tile(g)
    # Contiguous, every element that is gathered has an address of its own in a register.
    gathers = not last and not g.flat
    usual = 64 >> (dtype == "float32") >> gathers
    inputs = given.get("inputs", usual)
    inputs = max(16, min(inputs, power_of_two(each * g.inputs)))
    outputs = max(16, min(given.get("outputs", 128), power_of_two(each * g.outputs)))
    pixels = given.get("pixels", 64 if gathers else 128)
    wanted = 1 if interpreted() else PROGRAMS  # the interpreter runs one after the other
    if "outputs" not in given:
        while outputs > 64 and _programs(g, each, pixels, outputs) < wanted:
            outputs //= 2
    if "pixels" not in given:
        while pixels > 32 and _programs(g, each, pixels, outputs) < wanted:
            pixels //= 2
    large = pixels * outputs >= 128 * (64 if dtype == "float32" else 128)
    if dtype == "float32" and pixels * outputs >= 128 * 128 and "inputs" not in given:
        inputs = 16  # three products at once: their operands fill the registers
    return Tiles(
        g,
        dtype,
        last,
        precision,
        each,
        -(-each * g.outputs // outputs),
        pixels,
        inputs,
        outputs,
        given.get("warps", 8 if large else 4),
        given.get("stages", 3),
    )


def groups_of_a_tile(g: Gather, channels: int = SHARED_CHANNELS) -> int:
    """Groups of at most so many inputs, a divisor of their number if that is not far."""
    most = max(1, min(channels // g.inputs, 4 * channels // g.outputs, g.groups))
    divisor = max(d for d in range(1, most + 1) if g.groups % d == 0)
    return divisor if 2 * divisor > most else most


def _programs(g: Gather, each: int, pixels: int, outputs: int) -> int:
    parts = -(-each * g.outputs // outputs)
    return -(-g.groups // each) * parts * -(-g.pixels // pixels)


def precision_of(plan: Any) -> str:
    """What a product of float32 tiles is made of."""
    if plan.dtype != "float32":
        return "ieee"
    if plan.precision == "tf32":
        return "tf32"
    return "ieee" if plan.options.get("ieee") else "tf32x3"
