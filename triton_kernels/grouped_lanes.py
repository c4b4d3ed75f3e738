"""Grouped convolution with few channels per group, on plain float32 arithmetic: nothing is wasted.

One thread holds several outputs, and what it loads serves all of them that reach it. Channels last,
a lane is an output channel, and a thread holds a tile of times and columns of it: an input is used
for every tap of time and width. Contiguous, a lane is a pixel, and a thread holds several channels
of its group at several times: an input is used for all of them. No value of another group is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..epilogue import Epilogue
from .emit import indented, kernel
from .grouped_gather import Gather, pack_lanes
from .launch import Launch, epilogue_constants

CHANNELS = 32  # lanes of a warp, channels last
_HEAD = """def {name}(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    in_t, in_h, in_w, out_t, out_h, out_w, before_t, before_h, before_w,
    in_channels, out_channels,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    CG: tl.constexpr, KG: tl.constexpr, CHANNELS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):
"""


@dataclass(frozen=True)
class Lanes:
    """How a gather of divisor 1 is cut.

    lanes    of a program: threads, times pixels of each if contiguous
    times    outputs of a thread along time
    columns  outputs of a thread along width (channels last), or its channels (contiguous)
    inputs   channels whose weights are held at a time (channels last)
    """

    gather: Gather
    last: bool
    lanes: int
    times: int
    columns: int
    inputs: int
    warps: int

    @property
    def parts(self) -> int:
        """Tiles of a group's channels; 0 where tiles do not care for groups."""
        return 0 if self.last else -(-self.gather.outputs // self.columns)

    @property
    def pack(self) -> tuple[int, Launch]:
        """The size of the packed weights, and the start that writes them."""
        return pack_lanes(self.gather, self.parts, CHANNELS if self.last else self.columns)

    @property
    def programs(self) -> int:
        g = self.gather
        times = g.batch * -(-g.out_size[0] // self.times)
        if not self.last:
            blocks = -(-g.out_size[1] * g.out_size[2] // self.lanes)
            return times * blocks * g.groups * self.parts
        rows = -(-g.out_size[1] // (self.lanes // CHANNELS))
        tiles = -(-g.out_channels // CHANNELS)
        return times * rows * -(-g.out_size[2] // self.columns) * tiles

    def launch(self, epilogue: Epilogue, arrays: tuple[str, ...]) -> Launch:
        """The start of the kernel on arrays of these names: x, packed, bias, residual, y."""
        g = self.gather
        constants = (
            *g.window,
            ("CG", g.inputs),
            ("KG", g.outputs),
            # Columns are then at constant distances: no address of theirs is in a register.
            ("CHANNELS", g.in_channels if self.last else 0),
            ("LANES", self.lanes),
            ("WIDE", g.wide),
            *epilogue_constants(epilogue),
        )
        source = channels_last(self) if self.last else contiguous(self)
        return Launch(kernel(source), self.programs, arrays, g.sizes, constants, self.warps)


def reached(outputs: int, kernel: int, stride: int, dilation: int) -> dict[int, list[tuple]]:
    """For every input that a row of outputs reaches, counted from the first: (output, tap)s."""
    users: dict[int, list[tuple]] = {}
    for o in range(outputs):
        for k in range(kernel):
            users.setdefault(o * stride + k * dilation, []).append((o, k))
    return dict(sorted(users.items()))


def channels_last(cut: Lanes) -> str:
    """The kernel with a lane per channel: `times` x `columns` sums of a thread have names."""
    g, step = cut.gather, cut.inputs
    (kt, _, kw), (st, _, sw), (dt, _, dw) = g.kernel, g.stride, g.dilation
    sums = [(t, w) for t in range(cut.times) for w in range(cut.columns)]
    lines = [
        f"tiles = (out_channels + {CHANNELS - 1}) // {CHANNELS}",
        f"wide_blocks = (out_w + {cut.columns - 1}) // {cut.columns}",
        f"ROWS: tl.constexpr = LANES // {CHANNELS}",
        "row_blocks = (out_h + ROWS - 1) // ROWS",
        f"time_blocks = (out_t + {cut.times - 1}) // {cut.times}",
        "at, lane = tl.program_id(0), tl.arange(0, LANES)",
        "tile, at = at % tiles, at // tiles",
        f"w, at = at % wide_blocks * {cut.columns}, at // wide_blocks",
        "h, at = at % row_blocks * ROWS, at // row_blocks",
        f"t, n = at % time_blocks * {cut.times}, at // time_blocks",
        "if WIDE:",
        "    n, tile = n.to(tl.int64), tile.to(tl.int64)",
        f"k = tile * {CHANNELS} + lane % {CHANNELS}",
        f"y_row = h + lane // {CHANNELS}",
        "inside = (k < out_channels) & (y_row < out_h)",
        "c, first_row = k // KG * CG, y_row * SH - before_h",
        "frame, column = t * ST - before_t, w * SW - before_w",
        f"w_at = w_ptr + tile * (KT * KH * KW * CG * {CHANNELS}) + lane % {CHANNELS}",
    ]
    lines += [f"z{t}_{w} = tl.zeros((LANES,), tl.float32)" for t, w in sums]
    body = [
        f"f{a}_{b}_{j} = tl.load(w_at + {((j * kt + a) * kw + b) * CHANNELS}).to(tl.float32)"
        for j in range(step)
        for a in range(kt)
        for b in range(kw)
    ]
    for f, times in reached(cut.times, kt, st, dt).items():
        body += [
            f"ok = row_ok & (frame + {f} >= 0) & (frame + {f} < in_t)",
            f"x_at = x_ptr + (((n * in_t + frame + {f}) * in_h + row) * in_w + column)"
            " * CHANNELS + (c + j0)",
        ]
        for p, columns in reached(cut.columns, kw, sw, dw).items():
            body.append(f"here = ok & (column + {p} >= 0) & (column + {p} < in_w)")
            for j in range(step):
                body.append(
                    f"x = tl.load(x_at + ({p} * CHANNELS + {j}), mask=here, other=0.0)"
                    ".to(tl.float32)"
                )
                body += [f"z{t}_{w} += x * f{a}_{b}_{j}" for t, a in times for w, b in columns]
    lines += [
        "for kh in range(KH):",
        "    row = first_row + kh * DH",
        "    row_ok = inside & (row >= 0) & (row < in_h)",
        f"    for j0 in range(0, CG, {step}):",
        *(f"        {line}" for line in body),
        f"        w_at += {step * kt * kw * CHANNELS}",
        "bias = 0.0",
        "if HAS_BIAS:",
        "    bias = tl.load(bias_ptr + k, mask=k < out_channels, other=0.0).to(tl.float32)",
        "y_at = ((n * out_t + t) * out_h + y_row) * out_w + w",
    ]
    for t, w in sums:
        lines += [
            f"here = inside & (t + {t} < out_t) & (w + {w} < out_w)",
            f"at = (y_at + ({t} * out_h * out_w + {w})) * out_channels + k",
            f"store(y_ptr, residual_ptr, at, z{t}_{w} + bias, here, ACTIVATION, HAS_RESIDUAL)",
        ]
    return _HEAD.format(name="grouped_channel_lanes") + indented(lines) + "\n"


def contiguous(cut: Lanes) -> str:
    """The kernel with a lane per pixel: `times` x `columns` channels of a thread have names."""
    g, count = cut.gather, cut.columns
    kt, st, dt = g.kernel[0], g.stride[0], g.dilation[0]
    sums = [(t, k) for t in range(cut.times) for k in range(count)]
    lines = [
        "blocks = (out_h * out_w + LANES - 1) // LANES",
        f"PARTS: tl.constexpr = (KG + {count - 1}) // {count}",
        f"time_blocks = (out_t + {cut.times - 1}) // {cut.times}",
        "tiles = out_channels // KG * PARTS",
        "at = tl.program_id(0)",
        "q, at = at % blocks * LANES + tl.arange(0, LANES), at // blocks",
        "tile, at = at % tiles, at // tiles",
        f"t, n = at % time_blocks * {cut.times}, at // time_blocks",
        "if WIDE:",
        "    n, tile = n.to(tl.int64), tile.to(tl.int64)",
        "group, part = tile // PARTS, tile % PARTS",
        "inside = q < out_h * out_w",
        "first_row, first_column = q // out_w * SH - before_h, q % out_w * SW - before_w",
        "frame = t * ST - before_t",
        f"w_at = w_ptr + tile * (KT * KH * KW * CG * {count})",
        "x_first = x_ptr + (n * in_channels + group * CG) * in_t * in_h * in_w",
    ]
    lines += [f"z{t}_{k} = tl.zeros((LANES,), tl.float32)" for t, k in sums]
    body = [
        f"f{a}_{k} = tl.load(w_row + {a * g.kernel[2] * count + k}).to(tl.float32)"
        for a in range(kt)
        for k in range(count)
    ]
    for f, times in reached(cut.times, kt, st, dt).items():
        body += [
            f"here = ok & (frame + {f} >= 0) & (frame + {f} < in_t)",
            f"x_at = x_first + (j * in_t + frame + {f}) * in_h * in_w",
            "x = tl.load(x_at + pixel, mask=here, other=0.0).to(tl.float32)",
        ]
        body += [f"z{t}_{k} += x * f{a}_{k}" for t, a in times for k in range(count)]
    lines += [
        "for tap in range(KH * KW):",
        "    row, column = first_row + tap // KW * DH, first_column + tap % KW * DW",
        "    ok = inside & (row >= 0) & (row < in_h) & (column >= 0) & (column < in_w)",
        "    pixel = row * in_w + column",
        "    for j in range(CG):",
        f"        w_row = w_at + ((tap // KW * CG + j) * (KT * KW) + tap % KW) * {count}",
        *(f"        {line}" for line in body),
        "y_first = (n * out_channels + group * KG) * out_t * out_h * out_w",
    ]
    for k in range(count):
        lines += [
            f"channel = part * {count} + {k}",
            "bias = 0.0",
            "if HAS_BIAS:",
            "    bias = tl.load(bias_ptr + (group * KG + channel), mask=channel < KG, other=0.0)"
            ".to(tl.float32)",
        ]
        for t in range(cut.times):
            lines += [
                f"here = inside & (channel < KG) & (t + {t} < out_t)",
                f"at = y_first + (channel * out_t + t + {t}) * out_h * out_w + q",
                f"store(y_ptr, residual_ptr, at, z{t}_{k} + bias, here, ACTIVATION, HAS_RESIDUAL)",
            ]
    return _HEAD.format(name="grouped_pixel_lanes") + indented(lines) + "\n"


@lru_cache(maxsize=4096)
def cut(gather: Gather, last: bool, options: tuple[tuple[str, int], ...]) -> Lanes:
    """The lanes of a gather; options: 'lanes', 'times', 'columns', 'held', 'warps'."""
    g, given = gather, dict(options)
    times = min(given.get("times", 4), g.out_size[0])
    if last:
        columns = min(given.get("columns", 4), g.out_size[2])
        most = given.get("held") or max(1, 36 // (g.kernel[0] * g.kernel[2]))
        held = max(d for d in range(1, min(most, g.inputs) + 1) if g.inputs % d == 0)
        warps = given.get("warps", 4)
        return Lanes(g, True, CHANNELS * warps, times, columns, held, warps)
    parts = -(-g.outputs // given.get("columns", 8))
    columns = -(-g.outputs // parts)
    lanes = given.get("lanes", 256)
    while lanes > 32 and lanes >= 2 * g.out_size[1] * g.out_size[2]:
        lanes //= 2
    warps = min(given.get("warps", 4), max(1, lanes // 32))
    return Lanes(g, False, lanes, times, columns, 1, warps)
