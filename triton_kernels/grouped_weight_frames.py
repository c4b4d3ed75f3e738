"""The weight gradient of a grouped convolution with few channels per group: loads shared by taps.

A program of one warp multiplies gy (outputs, pixels) by x (pixels, channels) for all taps of time,
and often of width, over its share of the planes: each frame of x serves every frame of gy that the
taps of time reach from it. The shares are added by `grouped_weights`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from .emit import indented, kernel
from .grouped_gather import Gather
from .grouped_lanes import reached
from .grouped_tiles import groups_of_a_tile
from .grouped_weights import LONGEST, total
from .launch import Launch, power_of_two, wide

PROGRAMS = 132 * 16  # wanted, of one warp each
MOST_SUMS = 9  # taps whose sums a warp holds
_HEAD = """def grouped_weight_frames(
    x_ptr, gy_ptr, sums_ptr,
    in_t, in_h, in_w, out_t, out_h, out_w, before_t, before_h, before_w,
    in_channels, out_channels, batch, tiles, share,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    GT: tl.constexpr, CG: tl.constexpr, KG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    LAST: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):
"""
_BEGIN = """blocks = (out_h * out_w + BLOCK_P - 1) // BLOCK_P
time_blocks = (out_t + {times} - 1) // {times}
at = tl.program_id(0)
kh, at = at % KH, at // KH
kw, at = at % (KW // {columns}) * {columns}, at // (KW // {columns})
tile, part = at % tiles, at // tiles
if WIDE:
    tile, part = tile.to(tl.int64), part.to(tl.int64)
row, co = tl.arange(0, BLOCK_CI), tl.arange(0, BLOCK_CO)
first, k = tile * (GT * CG), tile * (GT * KG) + co
real_k = (co < GT * KG) & (k < out_channels)
real_c = (row < GT * CG) & (first + row < in_channels)
in_plane, out_plane = in_h * in_w, out_h * out_w
inputs = in_channels // ALIGN_X * ALIGN_X
outputs = out_channels // ALIGN_Y * ALIGN_Y""".splitlines()
_BLOCK = """item = part * share + block
q, item = item % blocks * BLOCK_P + tl.arange(0, BLOCK_P), item // blocks
t, n = item % time_blocks * {times}, item // time_blocks
inside = (q < out_plane) & (n < batch)
frame = t * ST - before_t
h, w = q // out_w * SH - before_h + kh * DH, q % out_w * SW - before_w
in_rows = inside & (h >= 0) & (h < in_h)
if LAST:
    y_at = gy_ptr + (n * out_t + t) * out_plane * outputs
    next_y, y_offset = out_plane * outputs, (q * outputs)[None, :] + k[:, None]
    x_at = x_ptr + ((n * in_t + frame) * in_plane * inputs + first)
    next_x = in_plane * inputs
else:
    y_at = gy_ptr + (n * out_channels * out_t + t) * out_plane
    next_y, y_offset = out_plane, q[None, :] + (k * (out_t * out_plane))[:, None]
    x_at = x_ptr + ((n * in_channels + first) * in_t + frame) * in_plane
    next_x = in_plane""".splitlines()
_GRADIENT = """y{t} = tl.load(y_at + {t} * next_y + y_offset, mask=real_k[:, None]
             & (inside & (t + {t} < out_t))[None, :], other=0.0)""".splitlines()
_COLUMN = """column = w + (kw + {b}) * DW
ok = in_rows & (column >= 0) & (column < in_w)
pixel = h * in_w + column
if LAST:
    offset = (pixel * inputs)[:, None] + row[None, :]
else:
    offset = pixel[None, :] + (row * (in_t * in_plane))[:, None]""".splitlines()
_INPUT = """here = ok & (frame + {f} >= 0) & (frame + {f} < in_t)
if LAST:
    mask = here[:, None] & real_c[None, :]
    x = tl.load(x_at + {f} * next_x + offset, mask=mask, other=0.0)
else:
    mask = real_c[:, None] & here[None, :]
    x = tl.trans(tl.load(x_at + {f} * next_x + offset, mask=mask, other=0.0))""".splitlines()
_END = """j = row[None, :] - (co // KG * CG)[:, None]
own = real_k[:, None] & real_c[None, :] & (j >= 0) & (j < CG)
taps: tl.constexpr = KT * KH * KW
target = sums_ptr + part * out_channels * (CG * taps) + (k[:, None] * CG + j) * taps""".splitlines()


@lru_cache(maxsize=1024)
def source(times: int, taps: int, columns: int, stride: int, dilation: int) -> str:
    """The kernel for `times` frames of gy and `columns` taps of width at once.

    taps, stride, dilation: those of time
    """
    lines = [line.format(times=times, columns=columns) for line in _BEGIN]
    sums = [(a, b) for a in range(taps) for b in range(columns)]
    lines += [f"z{a}_{b} = tl.zeros((BLOCK_CO, BLOCK_CI), tl.float32)" for a, b in sums]
    body = [line.format(times=times) for line in _BLOCK]
    body += [line.format(t=t) for t in range(times) for line in _GRADIENT]
    for b in range(columns):
        body += [line.format(b=b) for line in _COLUMN]
        for f, users in reached(times, taps, stride, dilation).items():
            body += [line.format(f=f) for line in _INPUT]
            body += [
                f"z{a}_{b} = tl.dot(y{t}, x, z{a}_{b}, input_precision=PRECISION)" for t, a in users
            ]
    lines += ["for block in range(share):", *(f"    {line}" for line in body), *_END]
    lines += [
        f"tl.store(target + (({a} * KH + kh) * KW + kw + {b}), z{a}_{b}, mask=own)" for a, b in sums
    ]
    return _HEAD + indented(lines) + "\n"


@dataclass(frozen=True)
class WeightFrames:
    """How the weight gradient is cut; `share`: blocks of `times` frames of a program."""

    gather: Gather
    dtype: str
    last: bool
    precision: str
    each: int
    times: int
    columns: int
    pixels: int
    share: int

    @property
    def items(self) -> int:
        """Blocks of pixels, `times` frames deep."""
        g = self.gather
        return (
            g.batch * -(-g.out_size[0] // self.times)
            * -(-g.out_size[1] * g.out_size[2] // self.pixels)
        )  # fmt: skip

    @property
    def shares(self) -> int:
        return max(1, -(-self.items // self.share))

    @property
    def size(self) -> int:
        """Elements of gw."""
        return self.gather.out_channels * self.gather.inputs * self.gather.taps

    @property
    def launches(self) -> tuple[Launch, Launch]:
        """On arrays x, gy, gw and sums, which is float32 with `shares * size` elements."""
        g = self.gather
        tiles = -(-g.groups // self.each)
        constants = (
            *g.window,
            ("GT", self.each),
            ("CG", g.inputs),
            ("KG", g.outputs),
            ("BLOCK_P", self.pixels),
            ("BLOCK_CI", max(16, power_of_two(self.each * g.inputs))),
            ("BLOCK_CO", max(16, power_of_two(self.each * g.outputs))),
            ("LAST", self.last),
            ("ALIGN_X", gcd(g.in_channels, self.each * g.inputs, 16)),
            ("ALIGN_Y", gcd(g.out_channels, self.each * g.outputs, 16)),
            ("PRECISION", self.precision),
            ("WIDE", g.wide or wide(self.shares * self.size)),
        )
        text = source(self.times, g.kernel[0], self.columns, g.stride[0], g.dilation[0])
        sums = Launch(
            kernel(text),
            tiles * g.kernel[1] * (g.kernel[2] // self.columns) * self.shares,
            ("x", "gy", "sums"),
            (*g.sizes, g.batch, tiles, self.share),
            constants,
            1,
            1,
        )
        return sums, total(self.size, self.shares)


@lru_cache(maxsize=4096)
def cut(
    gather: Gather, dtype: str, last: bool, precision: str, options: tuple[tuple[str, int], ...]
) -> WeightFrames:
    """The frames of a weight gradient; options: 'weight_times', 'weight_pixels'."""
    given = dict(options)
    times = min(given.get("weight_times", 2 if dtype == "float32" else 4), gather.out_size[0])
    pixels = given.get("weight_pixels", 16)
    each = groups_of_a_tile(gather)
    taps, rows, columns = gather.kernel
    if dtype == "float32" or taps * columns > MOST_SUMS:
        rows, columns = rows * columns, 1
    whole = WeightFrames(gather, dtype, last, precision, each, times, columns, pixels, 1)
    programs = -(-gather.groups // each) * rows
    shares = max(1, min(-(-PROGRAMS // programs), 2 * LONGEST, whole.items))
    share = max(1, -(-whole.items // shares))
    return replace(whole, share=share)
