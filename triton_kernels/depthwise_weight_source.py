"""The text of the kernel that sums the gradient of depthwise weights over a share of the outputs.

A program keeps one sum per lane and tap in registers. Its lanes are positions x channels; it goes
through its share of the blocks of positions, and in each along time as the forward pass does, with
a ring of the outputs' gradients instead of one of sums. A product whose input or output lies
outside along time is skipped, not multiplied by zero: zero times infinity would be NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from . import emit
from .depthwise_axes import Axis, Stream
from .depthwise_source import STRIDES, extents, within


@dataclass(frozen=True)
class Structure:
    """What the text depends on.

    kernel      taps that a program sums, per axis: all of them, or 1 where they are shared out
    dilation    of each axis, for those that are shared out
    vector      channels that a thread loads at once
    multiplied  several outputs per input channel
    ahead       a step's frames are loaded one step before their products
    wide        64-bit offsets
    """

    time: Stream
    height: Axis
    width: Axis
    kernel: tuple[int, int, int]
    dilation: tuple[int, int, int]
    vector: int
    channels_last: bool
    multiplied: bool = False
    ahead: bool = False
    wide: bool = False


INTEGERS = (
    *("units", "items", "splits", "chunks", "frames", "multiplier", "vectors", "blocks"),
    *("columns", "rows", "all_h", "all_w"),
    *("T", "H", "W", "OT", "OH", "OW"),
    *("in_t", "in_h", "in_w"),
    *STRIDES,
)


def source(s: Structure) -> str:
    """The kernel's text: partial[split, tap, k] in float32."""
    taps = [f"s{t}" for t in range(s.kernel[0] * s.kernel[1] * s.kernel[2])]
    unroll = s.time.ring + s.ahead  # frames of gradients that are kept
    steps = [line for step in range(unroll) for line in _step(s, step)]
    return "\n".join(
        [
            f"def depthwise_weight(x_ptr, gy_ptr, partial_ptr, {', '.join(INTEGERS)},",
            "    P: tl.constexpr, C: tl.constexpr):",
            emit.indented([*_program(s), *(f"{t} = tl.zeros([P, C], tl.float32)" for t in taps)]),
            "    for item in range(split, items, splits):",
            emit.indented([*_item(s), *_ring(s)], 2),
            f"        for base in range(0, count + {s.time.ring - 1}, {unroll}):",
            emit.indented(steps, 3),
            emit.indented(_finish(s, taps)),
            "",
        ]
    )


def _program(s: Structure) -> Iterator[str]:
    """Which channels, taps and share of the outputs the program has."""
    for name in STRIDES:
        if s.wide:
            yield f"{name} = tl.cast({name}, tl.int64)"
        if s.vector > 1:
            yield f"{name} = {name} * {s.vector}"
    yield "pid = tl.program_id(0)"
    yield "split = pid % splits"
    yield "rest = pid // splits"
    yield "block = rest % blocks"
    # Taps that are shared out: (kt * all_h + kh) * all_w + kw, each 0 where it is not.
    yield "shared = rest // blocks"
    yield f"dw = shared % all_w * {s.dilation[2]}"
    yield f"dh = shared // all_w % all_h * {s.dilation[1]}"
    yield f"dt = shared // all_w // all_h * {s.dilation[0]}"
    yield "k = block * C + tl.arange(0, C)[None, :]"
    yield f"channels = vectors * {s.vector}"
    yield "has_k = k < channels"
    yield "c = " + ("k // multiplier" if s.multiplied else "k")


def _item(s: Structure) -> Iterator[str]:
    """Which positions an item of the share has, and where they lie."""
    yield "chunk = item % chunks"
    yield "group = item // chunks" + (" + tl.zeros([1], tl.int64)" if s.wide else "")
    yield "unit = (group * P + tl.arange(0, P))[:, None]"
    yield "inside = (unit < units) & has_k"
    yield "column = unit % columns"
    yield "line = unit // columns"
    yield "row = line % rows"
    yield "n = line // rows"
    yield f"h = row * {s.height.in_step} + in_h + dh"
    yield f"w = column * {s.width.in_step} + in_w + dw"
    yield f"oh = row * {s.height.outs}"
    yield f"ow = column * {s.width.outs}"
    if s.channels_last:
        yield "read = n * xn + h * xh + w * xw + c"
        yield "given = n * yn + oh * yh + ow * yw + k"
    else:
        yield "read = n * xn + h * xh + w + c * xc"
        yield "given = n * yn + oh * yh + ow + k * yc"
    t = s.time
    yield f"first = chunk // {t.residues} * frames"
    yield f"f0 = first * {t.in_step} + chunk % {t.residues} + in_t + dt"
    yield f"t0 = first * {t.out_step} + chunk % {t.residues}"
    yield f"count = tl.minimum(frames, (OT - t0 + {t.out_step - 1}) // {t.out_step})"
    rows, columns = s.height.positions, s.width.positions
    yield from extents("h", rows, "H", "w", columns, "W", "(unit < units)")


def _ring(s: Structure) -> Iterator[str]:
    """The ring of gradients, and the first step's frames if they are loaded ahead."""
    first = 1 if s.ahead else 0
    for slot in range(first, s.time.ring + first if s.time.ring > 1 else 0):
        yield from (
            f"{g} = tl.zeros([P, C], gy_ptr.dtype.element_ty)" for g in _gradients(s, slot).values()
        )
    if s.ahead:
        yield "base = 0"
        yield from _loads(s, 0)


def _gradients(s: Structure, slot: int) -> dict[tuple[int, int], str]:
    places = product(range(s.height.outs), range(s.width.outs))
    return {(i, j): f"g{slot}_{i}_{j}" for i, j in places}


def _step(s: Structure, step: int) -> Iterator[str]:
    """Add the products of a step's frames, and load those of this step or of the next."""
    slots = s.time.ring + s.ahead
    yield from _loads(s, step + s.ahead)
    for frame in range(len(s.time.frames)):
        for i, j in product(range(len(s.height.positions)), range(len(s.width.positions))):
            yield f"u{i}_{j} = v{step % slots}_{frame}_{i}_{j}.to(tl.float32)"
        yield f"done = base + {step}"
        yield f"frame = {_frame(s, frame)}"
        for which, age, _, kt in s.time.terms:
            if which == frame:
                exists = "(frame >= 0) & (frame < T)"
                yield f"if {exists} & (done >= {age}) & (done < count + {age}):"
                yield from ("    " + line for line in _products(s, kt, (step - age) % slots))


def _frame(s: Structure, frame: int) -> str:
    return f"f0 + done * {s.time.in_step} + {s.time.frames[frame]}"


def _loads(s: Structure, step: int) -> Iterator[str]:
    """Load a frame of gradients and the frames of inputs of a step."""
    slot = step % (s.time.ring + s.ahead)
    x_across, y_across = (" * xw", " * yw") if s.channels_last else ("", "")
    yield f"done = base + {step}"
    yield f"given_t = gy_ptr + (t0 + done * {s.time.out_step}) * yt"
    yield "has_t = inside & (done < count)"
    for (i, j), g in _gradients(s, slot).items():
        place = f"given_t + (given + ({i} * yh + {j}{y_across}))"
        yield f"{g} = tl.load({place}, mask=has_t, other=0.0)"
    for frame in range(len(s.time.frames)):
        yield f"frame = {_frame(s, frame)}"
        yield "has_f = (frame >= 0) & (frame < T)"
        yield "x_f = x_ptr + frame * xt"
        for i, row in enumerate(s.height.positions):
            yield f"x_r = x_f + (read + {row} * xh)"
            for j, column in enumerate(s.width.positions):
                mask = f"({within('h', i, 'w', j, 'has_f')}) & has_k"
                load = f"tl.load(x_r + {column}{x_across}, mask={mask}, other=0.0)"
                yield f"v{slot}_{frame}_{i}_{j} = {load}"


def _products(s: Structure, kt: int, slot: int) -> Iterator[str]:
    """One frame of inputs by one of gradients, summed into the taps at kt."""
    for (i, j), g in _gradients(s, slot).items():
        yield f"d = {g}.to(tl.float32)"
        for kh, kw in product(range(s.kernel[1]), range(s.kernel[2])):
            tap = (kt * s.kernel[1] + kh) * s.kernel[2] + kw
            row = s.height.positions.index(dict(s.height.reads[i])[kh])
            column = s.width.positions.index(dict(s.width.reads[j])[kw])
            yield f"s{tap} += u{row}_{column} * d"


def _finish(s: Structure, taps: list[str]) -> Iterator[str]:
    """Sum over the program's positions."""
    yield f"first_tap = shared * {len(taps)}"
    yield f"all_taps = tl.num_programs(0) // splits // blocks * {len(taps)}"
    yield "place = (split * all_taps + first_tap) * channels + block * C + tl.arange(0, C)"
    yield "has = block * C + tl.arange(0, C) < channels"
    for i, name in enumerate(taps):
        yield f"tl.store(partial_ptr + (place + {i} * channels), tl.sum({name}, 0), mask=has)"


SUM = """\
def depthwise_weight_sum(partial_ptr, gw_ptr, channels, taps, splits, B: tl.constexpr,
    S: tl.constexpr):
    place = tl.program_id(0) * B + tl.arange(0, B)
    has = place < channels * taps
    total = tl.zeros([B], tl.float32)
    for first in range(0, splits, S):
        split = first + tl.arange(0, S)[:, None]
        part = tl.load(
            partial_ptr + (split * (channels * taps) + place[None, :]),
            mask=(split < splits) & has[None, :], other=0.0,
        )
        total += tl.sum(part, 0)
    k = place % channels
    tap = place // channels
    tl.store(gw_ptr + (k * taps + tap), total.to(gw_ptr.dtype.element_ty), mask=has)
"""
