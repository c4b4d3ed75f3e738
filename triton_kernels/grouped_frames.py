"""Grouped convolution with few channels per group on tensor cores: products shared along time.

A program makes a tile of pixels of one plane x the outputs of a few groups, for several output
frames at once: what it loads of an input frame serves every output frame that the taps of time
reach from it. Groups share a tile as in `grouped_tiles`; a tile that comes out with NaN is made
again group by group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import triton
import triton.language as tl

from ..epilogue import Epilogue
from . import finish
from .emit import indented, kernel
from .grouped_gather import Gather, pack_tiles
from .grouped_lanes import reached
from .grouped_tiles import groups_of_a_tile, sum_of_products, wide_packed
from .launch import Launch, epilogue_constants, power_of_two


@triton.jit
def finish_frame(
    bias_ptr, residual_ptr, y_ptr, z, n, t, q, k, mask_q, mask_k,
    out_t, out_h, out_w, out_channels, LAST: tl.constexpr, ALIGN_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Bias, epilogue and store of frame t: z (pixels, outputs) if LAST, else (outputs, pixels)."""
    plane = out_h * out_w
    if LAST:
        if HAS_BIAS:
            z += tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        pixel = (n * out_t + t) * plane + q
        offsets = (pixel * (out_channels // ALIGN_Y * ALIGN_Y))[:, None] + k[None, :]
        mask = mask_q[:, None] & mask_k[None, :]
    else:
        if HAS_BIAS:
            z += tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[:, None]
        offsets = (((n * out_channels + k) * out_t + t) * plane)[:, None] + q[None, :]
        mask = mask_k[:, None] & mask_q[None, :]
    finish.store(y_ptr, residual_ptr, offsets, z, mask & (t < out_t), ACTIVATION, HAS_RESIDUAL)


_HEAD = """def grouped_frames(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    in_t, in_h, in_w, out_t, out_h, out_w, before_t, before_h, before_w,
    in_channels, out_channels, tiles,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    GT: tl.constexpr, CG: tl.constexpr, KG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    LAST: tl.constexpr, RAGGED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):
"""
_BEGIN = """blocks = (out_h * out_w + BLOCK_P - 1) // BLOCK_P
time_blocks = (out_t + {times} - 1) // {times}
at = tl.program_id(0)
tile, at = at % tiles, at // tiles
q, at = at % blocks * BLOCK_P + tl.arange(0, BLOCK_P), at // blocks
t, n = at % time_blocks * {times}, at // time_blocks
if WIDE:
    n, tile, q = n.to(tl.int64), tile.to(tl.int64), q.to(tl.int64)
inside = q < out_h * out_w
h, w, frame = q // out_w * SH - before_h, q % out_w * SW - before_w, t * ST - before_t
first, row, co = tile * (GT * CG), tl.arange(0, BLOCK_CI), tl.arange(0, BLOCK_CO)
k = tile * (GT * KG) + co
real_k = (co < GT * KG) & (k < out_channels)
real_c = row < GT * CG
if RAGGED:
    real_c = real_c & (first + row < in_channels)
w_at = w_ptr + tile * (KT * KH * KW * BLOCK_CI * BLOCK_CO)
plane = in_h * in_w
channels = in_channels // ALIGN * ALIGN
if LAST:
    x_at = x_ptr + (n * in_t * plane * channels + first)
    next_frame = plane * channels
    f_at = row[:, None] * BLOCK_CO + co[None, :]
else:
    x_at = x_ptr + (n * in_channels + first) * in_t * plane
    next_frame = plane
    f_at = co[:, None] * BLOCK_CI + row[None, :]""".splitlines()
_TAP = """dh, dw = tap // KW * DH, tap % KW * DW
ok = inside & (h >= -dh) & (h < in_h - dh) & (w >= -dw) & (w < in_w - dw)
pixel = (h + dh) * in_w + (w + dw)
if LAST:
    offset = (pixel * channels)[:, None] + row[None, :]
else:
    offset = pixel[None, :] + (row * (in_t * plane))[:, None]""".splitlines()
_LOAD = """here = ok & (frame + {f} >= 0) & (frame + {f} < in_t)
if LAST and GT * CG == BLOCK_CI and not RAGGED:
    x = tl.load(x_at + (frame + {f}) * next_frame + offset, mask=here[:, None], other=0.0)
elif LAST:
    mask = here[:, None] & real_c[None, :]
    x = tl.load(x_at + (frame + {f}) * next_frame + offset, mask=mask, other=0.0)
else:
    mask = real_c[:, None] & here[None, :]
    x = tl.load(x_at + (frame + {f}) * next_frame + offset, mask=mask, other=0.0)""".splitlines()
_AGAIN = """bad = {bad}
if GT > 1 and tl.max(bad.to(tl.int32)) > 0:
    for i in range({times}):
        z = z0
        for group in range(GT):
            own = sum_of_products(
                x_ptr, w_at, n + q * 0, frame + i * ST + q * 0, h, w, inside, group, first,
                in_t, in_h, in_w, in_channels, KT, KH, KW, DT, DH, DW, 1, 1, 1, GT, CG, 1, True,
                BLOCK_P, BLOCK_CI, BLOCK_CO, LAST, True, False, RAGGED, ALIGN, PRECISION)
            if LAST:
                z = tl.where((co // KG == group)[None, :], own, z)
            else:
                z = tl.where((co // KG == group)[:, None], own, z)
        finish_frame(bias_ptr, residual_ptr, y_ptr, z, n, t + i, q, k, inside, real_k,
                     out_t, out_h, out_w, out_channels, LAST, ALIGN_Y,
                     HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
else:""".splitlines()
_FINISH = """finish_frame(bias_ptr, residual_ptr, y_ptr, z{t}, n, t + {t}, q, k, inside, real_k,
             out_t, out_h, out_w, out_channels, LAST, ALIGN_Y,
             HAS_BIAS, HAS_RESIDUAL, ACTIVATION)""".splitlines()


@lru_cache(maxsize=1024)
def source(times: int, taps: int, stride: int, dilation: int) -> str:
    """The kernel for `times` frames at once; taps, stride and dilation are those of time."""
    frames = range(times)
    lines = [line.format(times=times) for line in _BEGIN]
    shape = "(BLOCK_P, BLOCK_CO) if LAST else (BLOCK_CO, BLOCK_P)"
    lines += [f"z{t} = tl.zeros({shape}, tl.float32)" for t in frames]
    body = list(_TAP)
    for a in range(taps):
        at = f"({a} * KH * KW + tap) * (BLOCK_CI * BLOCK_CO)"
        body.append(f"f{a} = tl.load(w_at + {at} + f_at)")
    for f, users in reached(times, taps, stride, dilation).items():
        body += [line.format(f=f) for line in _LOAD]
        for last, sides in (("if LAST:", "x, f{}"), ("else:", "f{}, x")):
            body.append(last)
            body += [
                f"    z{t} = tl.dot({sides.format(a)}, z{t}, input_precision=PRECISION)"
                for t, a in users
            ]
    lines += ["for tap in range(KH * KW):", *(f"    {line}" for line in body)]
    bad = " | ".join(f"(z{t} != z{t})" for t in frames)
    lines += [line.format(bad=bad, times=times) for line in _AGAIN]
    lines += [f"    {line.format(t=t)}" for t in frames for line in _FINISH]
    return _HEAD + indented(lines) + "\n"


@dataclass(frozen=True)
class Frames:
    """How a gather of divisor 1 is cut: groups of a tile, frames and pixels of a program."""

    gather: Gather
    dtype: str
    last: bool
    precision: str
    each: int
    times: int
    pixels: int
    warps: int
    stages: int

    @property
    def inputs(self) -> int:
        """Rows of a block of weights."""
        return max(16, power_of_two(self.each * self.gather.inputs))

    @property
    def outputs(self) -> int:
        """Columns of a block of weights."""
        return max(16, power_of_two(self.each * self.gather.outputs))

    @property
    def pack(self) -> tuple[int, Launch]:
        """The size of the packed weights, and the start that writes them."""
        return pack_tiles(self.gather, self.each, 1, self.inputs, self.outputs, self.last)

    def launch(self, epilogue: Epilogue, arrays: tuple[str, ...]) -> Launch:
        """The start of the kernel on arrays of these names: x, packed, bias, residual, y."""
        g = self.gather
        tiles = -(-g.groups // self.each)
        blocks = -(-g.out_size[1] * g.out_size[2] // self.pixels)
        constants = (
            *g.window,
            ("GT", self.each),
            ("CG", g.inputs),
            ("KG", g.outputs),
            ("BLOCK_P", self.pixels),
            ("BLOCK_CI", self.inputs),
            ("BLOCK_CO", self.outputs),
            ("LAST", self.last),
            ("RAGGED", g.groups % self.each != 0),
            ("ALIGN", gcd(g.in_channels, self.each * g.inputs, 16)),
            ("ALIGN_Y", gcd(g.out_channels, 16)),
            ("PRECISION", self.precision),
            ("WIDE", g.wide or wide_packed(self.pack[0])),
            *epilogue_constants(epilogue),
        )
        text = source(self.times, g.kernel[0], g.stride[0], g.dilation[0])
        return Launch(
            kernel(text, sum_of_products, finish_frame),
            g.batch * -(-g.out_size[0] // self.times) * blocks * tiles,
            arrays,
            (*g.sizes, tiles),
            constants,
            self.warps,
            self.stages,
        )


@lru_cache(maxsize=4096)
def cut(
    gather: Gather, dtype: str, last: bool, precision: str, options: tuple[tuple[str, int], ...]
) -> Frames:
    """The frames of a gather; options: 'each', 'times', 'pixels', 'warps', 'stages'."""
    given = dict(options)
    times = min(given.get("times", 4), gather.out_size[0])
    pixels = given.get("pixels", 64 if last else 32)
    while pixels > 32 and pixels >= 2 * gather.out_size[1] * gather.out_size[2]:
        pixels //= 2
    # A pixel of 32 channels costs the cache what one of 16 does: measured on an H200.
    each = given.get("each") or groups_of_a_tile(gather, 32 if last else 16)
    warps, stages = given.get("warps", 4), given.get("stages", 2)
    return Frames(gather, dtype, last, precision, each, times, pixels, warps, stages)
