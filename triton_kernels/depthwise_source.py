"""The text of a depthwise kernel: taps, tile and ring of sums are written out in it.

A program's lanes are tiles: `rows x columns` outputs of `vector` channels each, numbered with
what lies next to each other in memory first, so that no lane idles at the end of a row. A program
walks along time (see `depthwise_axes.Stream`) and keeps the frames of sums in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from . import emit
from .depthwise_axes import Axis, Stream

SEVERAL_OUTPUTS = "several outputs"  # of one input channel
SEVERAL_INPUTS = "several inputs"  # summed to one output channel, as in its gradient
LIVE = 64  # elements per thread that are loaded before their first use


@dataclass(frozen=True)
class Structure:
    """What the text depends on.

    kernel    taps (KT, KH, KW)
    vector    channels of a lane
    channels  "", SEVERAL_OUTPUTS or SEVERAL_INPUTS
    backward  the gradient of the input: x is that of the outputs
    hold      weights stay in registers; otherwise they are loaded at every step
    unroll    steps written out: the ring's length, so that sums need not move, or 1
    ahead     the frames of all steps written out are loaded before the first one's sums
    wide      64-bit offsets
    """

    time: Stream
    height: Axis
    width: Axis
    kernel: tuple[int, int, int]
    vector: int
    channels_last: bool
    channels: str = ""
    backward: bool = False
    hold: bool = True
    unroll: int = 1
    ahead: bool = False
    wide: bool = False
    bias: bool = False
    residual: bool = False

    @property
    def taps(self) -> list[int]:
        kt, kh, kw = self.kernel
        return list(range(kt * kh * kw))

    def tap(self, kt: int, kh: int, kw: int) -> int:
        return (kt * self.kernel[1] + kh) * self.kernel[2] + kw

    def age(self, age: int, step: int) -> int:
        """The place in the ring of the sums of an age at an unrolled step."""
        return (step - age) % self.time.ring if self.unroll > 1 else age


INTEGERS = tuple(
    "units chunks frames multiplier vectors columns rows T H W OT OH OW "
    "in_t in_h in_w out_t out_h out_w xn xc xt xh xw yn yc yt yh yw".split()
)


def source(s: Structure) -> str:
    """The kernel's text.

    Its integers (INTEGERS) are extents in tiles, lanes and elements, offsets, and strides, which
    count vectors so that the compiler knows that all vectors are aligned. The weights are
    (K, taps), for channels-last arrays (taps, K).
    """
    before = [*_strides(s), *_coordinates(s), *_edges(s)]
    if s.hold:
        before += _weights(s)
    if s.bias:
        before += ["bias = tl.load(bias_ptr + k).to(tl.float32)"]
    before += _start(s)
    steps = []
    if s.ahead:
        steps += [line for step in range(s.unroll) for line in _frames(s, step)]
    steps += [line for step in range(s.unroll) for line in _step(s, step)]
    return "\n".join(
        [
            f"def depthwise(x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, {', '.join(INTEGERS)},",
            "    G: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,",
            "    HAS_RESIDUAL: tl.constexpr):",
            emit.indented(before),
            f"    for base in range(0, count + {s.time.ring - 1}, {s.unroll}):",
            emit.indented(steps, 2),
            "",
        ]
    )


def _strides(s: Structure) -> Iterator[str]:
    """Strides in elements."""
    for name in "xn xc xt xh xw yn yc yt yh yw".split():
        if s.wide:
            yield f"{name} = tl.cast({name}, tl.int64)"
        if s.vector > 1:
            yield f"{name} = {name} * {s.vector}"


def _coordinates(s: Structure) -> Iterator[str]:
    """Which outputs the lanes and the walk are, and where they lie."""
    yield "pid = tl.program_id(0)"
    yield "chunk = pid % chunks"
    yield "block = pid // chunks"
    if s.wide:
        yield "block = block.to(tl.int64)"
    yield "unit = block * G + tl.arange(0, G)[:, None]"
    yield "inside = unit < units"
    if s.channels_last:
        yield f"k = unit % vectors * {s.vector} + tl.arange(0, {s.vector})[None, :]"
        yield "rest = unit // vectors"
        yield "column = rest % columns"
        yield "rest = rest // columns"
        yield "row = rest % rows"
        yield "n = rest // rows"
    else:
        yield "column = unit % columns"
        yield "rest = unit // columns"
        yield "row = rest % rows"
        yield "rest = rest // rows"
        yield "k = rest % vectors"
        yield "n = rest // vectors"
    c = {SEVERAL_OUTPUTS: "k // multiplier", SEVERAL_INPUTS: "k * multiplier"}.get(s.channels, "k")
    yield f"c = {c}"
    yield f"weight = {'c' if s.channels == SEVERAL_INPUTS else 'k'}" + (
        "" if s.channels_last else f" * {len(s.taps)}"
    )
    yield f"h = row * {s.height.in_step} + in_h"
    yield f"w = column * {s.width.in_step} + in_w"
    yield f"oh = row * {s.height.outs} + out_h"
    yield f"ow = column * {s.width.outs} + out_w"
    if s.channels_last:
        yield "read = n * xn + h * xh + w * xw + c"
        yield "written = n * yn + oh * yh + ow * yw + k"
    else:
        yield "read = n * xn + h * xh + w + c * xc"
        yield "written = n * yn + oh * yh + ow + k * yc"
    residues, t = s.time.residues, s.time
    yield f"first = chunk // {residues} * frames"
    yield f"f0 = first * {t.in_step} + chunk % {residues} + in_t"
    yield f"t0 = first * {t.out_step} + chunk % {residues} + out_t"
    yield f"count = tl.minimum(frames, (OT - t0 + {t.out_step - 1}) // {t.out_step})"


def _edges(s: Structure) -> Iterator[str]:
    """Which rows and columns of a tile exist."""
    for name, axis, extent in (("h", s.height, "H"), ("w", s.width, "W")):
        for i, p in enumerate(axis.positions):
            yield f"has_{name}{i} = ({name} + {p} >= 0) & ({name} + {p} < {extent})"
    for name, axis, extent in (("oh", s.height, "OH"), ("ow", s.width, "OW")):
        for i in range(axis.outs):
            low = f"({name} + {i} >= 0) & " if s.backward else ""
            yield f"has_{name}{i} = {low}({name} + {i} < {extent})"
    for i in range(len(s.height.positions)):
        yield f"has_h{i} = has_h{i} & inside"
    for i in range(s.height.outs):
        yield f"has_oh{i} = has_oh{i} & inside"


def _weights(s: Structure) -> list[str]:
    channel, tap = ("1", "yw") if s.channels_last else (str(len(s.taps)), "1")
    if s.backward and s.channels_last:
        tap = "xw"  # as many channels as the weights
    m = f" + m * {channel}" if s.channels == SEVERAL_INPUTS else ""
    return [f"w{t} = tl.load(w_ptr + (weight{m} + {t} * {tap})).to(tl.float32)" for t in s.taps]


def _sums(s: Structure, slot: int, out: int) -> list[str]:
    return [f"z{slot}_{out}_{i}_{j}" for i in range(s.height.outs) for j in range(s.width.outs)]


def _zero(s: Structure, name: str) -> str:
    return f"{name} = tl.zeros([G, {s.vector}], tl.float32)"


def _start(s: Structure) -> list[str]:
    """Sums that are carried from step to step begin at zero."""
    if s.time.ring == 1:
        return []
    return [_zero(s, name) for slot in range(s.time.ring) for name in _sums(s, slot, 0)]


def _step(s: Structure, step: int) -> Iterator[str]:
    newest = s.age(0, step)
    if s.channels == SEVERAL_INPUTS:
        # The loop over inputs is inside of the walk: their sums are the same.
        yield from (_zero(s, z) for out in range(s.time.outs) for z in _sums(s, newest, out))
        yield "for m in range(multiplier):"
        body = [] if s.hold else _weights(s)
        body += _products(s, step, {z for o in range(s.time.outs) for z in _sums(s, newest, o)})
        yield from ("    " + line for line in body)
    else:
        if not s.hold:
            yield from _weights(s)
        yield from _products(s, step, set())
    yield from _store(s, step)
    if s.unroll == 1:
        for slot in range(s.time.ring - 1, 0, -1):
            older, newer = _sums(s, slot, 0), _sums(s, slot - 1, 0)
            yield from (f"{a} = {b}" for a, b in zip(older, newer, strict=True))


def _frames(s: Structure, step: int) -> list[str]:
    """Loads of all frames of a step."""
    rows = range(len(s.height.positions))
    return [
        line
        for frame in range(len(s.time.frames))
        for line in _frame(s, step, frame) + [l for i in rows for l in _row(s, step, frame, i)]
    ]


def _frame(s: Structure, step: int, frame: int) -> list[str]:
    """Where a frame lies, and whether it exists."""
    m = " + m" if s.channels_last else " + m * xc"
    return [
        f"frame = f0 + (base + {step}) * {s.time.in_step} + {s.time.frames[frame]}",
        "has_f = (frame >= 0) & (frame < T)",
        f"x_f = x_ptr + frame * xt{m if s.channels == SEVERAL_INPUTS else ''}",
    ]


def _row(s: Structure, step: int, frame: int, row: int) -> list[str]:
    """Loads of one row of a frame."""
    across = " * xw" if s.channels_last else ""
    lines = [f"x_r = x_f + (read + {s.height.positions[row]} * xh)"]
    for j, column in enumerate(s.width.positions):
        mask = f"has_h{row} & has_w{j} & has_f"
        load = f"tl.load(x_r + {column}{across}, mask={mask}, other=0.0).to(tl.float32)"
        lines.append(f"{_value(step, frame, row, j)} = {load}")
    return lines


def _value(step: int, frame: int, row: int, column: int) -> str:
    return f"v{step}_{frame}_{row}_{column}"


def _products(s: Structure, step: int, begun: set[str]) -> list[str]:
    """What a step's frames add to the sums, of which `begun` have a value already."""
    lines: list[str] = []
    rows = range(len(s.height.positions))
    by_row = len(rows) * len(s.width.positions) * s.vector > LIVE
    for frame in range(len(s.time.frames)):
        if not s.ahead:
            lines += _frame(s, step, frame)
            if not by_row:
                lines += [line for i in rows for line in _row(s, step, frame, i)]
        for i in rows:
            if by_row and not s.ahead:
                lines += _row(s, step, frame, i)
            lines += _row_products(s, step, frame, i, begun)
    newest = s.age(0, step)
    for out in range(s.time.outs):
        lines += [_zero(s, z) for z in _sums(s, newest, out) if z not in begun]
    return lines


def _row_products(s: Structure, step: int, frame: int, row: int, begun: set[str]) -> list[str]:
    """What one row of a frame adds."""
    lines = []
    row_reads = _readers(s.height, s.height.positions[row])
    for j, column in enumerate(s.width.positions):
        for (oi, kh), (oj, kw) in product(row_reads, _readers(s.width, column)):
            for which, age, out, kt in s.time.terms:
                if which != frame:
                    continue
                z = f"z{s.age(age, step)}_{out}_{oi}_{oj}"
                fresh = age == 0 and z not in begun
                if fresh:
                    begun.add(z)
                v = _value(step, frame, row, j)
                lines.append(f"{z} {'=' if fresh else '+='} {v} * w{s.tap(kt, kh, kw)}")
    return lines


def _readers(axis: Axis, position: int) -> list[tuple[int, int]]:
    """(output of the tile, tap) of all that read a position."""
    return [(i, k) for i, pairs in enumerate(axis.reads) for k, p in pairs if p == position]


def _store(s: Structure, step: int) -> Iterator[str]:
    """Write the frames that are complete."""
    oldest, across = s.age(s.time.ring - 1, step), " * yw" if s.channels_last else ""
    yield f"done = base + {step - (s.time.ring - 1)}"
    for out in range(s.time.outs):
        yield f"t = t0 + done * {s.time.out_step} + {out}"
        yield "has_t = (done >= 0) & (done < count) & (t >= 0) & (t < OT)"
        yield "y_t = y_ptr + t * yt"
        yield "residual_t = residual_ptr" + (" + t * yt" if s.residual else "")
        for i, j in product(range(s.height.outs), range(s.width.outs)):
            z = f"z{oldest}_{out}_{i}_{j}" + (" + bias" if s.bias else "")
            yield (
                f"store(y_t, residual_t, written + ({i} * yh + {j}{across}), {z}, "
                f"has_oh{i} & has_ow{j} & has_t, ACTIVATION, HAS_RESIDUAL)"
            )
