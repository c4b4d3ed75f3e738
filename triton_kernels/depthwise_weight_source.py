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


@dataclass(frozen=True)
class Structure:
    """What the text depends on.

    kernel      taps that a program sums, per axis: all of them, or 1 where they are shared out
    dilation    of each axis, for those that are shared out
    vector      channels that a thread loads at once
    multiplied  several outputs per input channel
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
    wide: bool = False


INTEGERS = tuple(
    "units items splits chunks frames multiplier vectors blocks columns rows all_h all_w "
    "T H W OT OH OW in_t in_h in_w xn xc xt xh xw yn yc yt yh yw".split()
)


def source(s: Structure) -> str:
    """The kernel's text: partial[split, tap, k] in float32."""
    taps = [f"s{t}" for t in range(s.kernel[0] * s.kernel[1] * s.kernel[2])]
    steps = [line for step in range(s.time.ring) for line in _step(s, step)]
    return "\n".join(
        [
            f"def depthwise_weight(x_ptr, gy_ptr, partial_ptr, {', '.join(INTEGERS)},",
            "    P: tl.constexpr, C: tl.constexpr):",
            emit.indented([*_program(s), *(f"{t} = tl.zeros([P, C], tl.float32)" for t in taps)]),
            "    for item in range(split, items, splits):",
            emit.indented([*_item(s), *_ring(s)], 2),
            f"        for base in range(0, count + {s.time.ring - 1}, {s.time.ring}):",
            emit.indented(steps, 3),
            emit.indented(_finish(s, taps)),
            "",
        ]
    )


def _program(s: Structure) -> Iterator[str]:
    """Which channels, taps and share of the outputs the program has."""
    for name in "xn xc xt xh xw yn yc yt yh yw".split():
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
    for name, axis, extent in (("h", s.height, "H"), ("w", s.width, "W")):
        for i, p in enumerate(axis.positions):
            yield f"has_{name}{i} = ({name} + {p} >= 0) & ({name} + {p} < {extent})"


def _ring(s: Structure) -> Iterator[str]:
    if s.time.ring > 1:
        for slot, i, j in product(range(s.time.ring), range(s.height.outs), range(s.width.outs)):
            yield f"g{slot}_{i}_{j} = tl.zeros([P, C], tl.float32)"


def _step(s: Structure, step: int) -> Iterator[str]:
    """Load a frame of gradients and the frames of inputs of a step, and add their products."""
    ring, time = s.time.ring, s.time
    across = " * xw" if s.channels_last else ""
    yield f"done = base + {step}"
    yield f"given_t = gy_ptr + (t0 + done * {time.out_step}) * yt"
    yield "has_t = inside & (done < count)"
    for i, j in product(range(s.height.outs), range(s.width.outs)):
        place = f"given + ({i} * yh + {j}{' * yw' if s.channels_last else ''})"
        load = f"tl.load(given_t + ({place}), mask=has_t, other=0.0)"
        yield f"g{step % ring}_{i}_{j} = {load}.to(tl.float32)"
    for frame, place in enumerate(time.frames):
        yield f"frame = f0 + done * {time.in_step} + {place}"
        yield "has_f = (frame >= 0) & (frame < T)"
        yield "x_f = x_ptr + frame * xt"
        for i, row in enumerate(s.height.positions):
            yield f"x_r = x_f + (read + {row} * xh)"
            for j, column in enumerate(s.width.positions):
                mask = f"has_h{i} & has_w{j} & has_f & inside"
                load = f"tl.load(x_r + {column}{across}, mask={mask}, other=0.0)"
                yield f"v{i}_{j} = {load}.to(tl.float32)"
        for which, age, _, kt in time.terms:
            if which == frame:
                yield f"if has_f & (done >= {age}) & (done < count + {age}):"
                yield from ("    " + line for line in _products(s, kt, (step - age) % ring))


def _products(s: Structure, kt: int, slot: int) -> Iterator[str]:
    """One frame of inputs by one of gradients, summed into the taps at kt."""
    for kh, kw in product(range(s.kernel[1]), range(s.kernel[2])):
        tap = (kt * s.kernel[1] + kh) * s.kernel[2] + kw
        for i, j in product(range(s.height.outs), range(s.width.outs)):
            row = s.height.positions.index(dict(s.height.reads[i])[kh])
            column = s.width.positions.index(dict(s.width.reads[j])[kw])
            yield f"s{tap} += v{row}_{column} * g{slot}_{i}_{j}"


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
