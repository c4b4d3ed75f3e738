"""The text of a depthwise kernel: taps, tile and ring of sums are written out in it.

A program's lanes are tiles: `rows x columns` outputs of `vector` channels each, numbered with
what lies next to each other in memory first, so that no lane idles at the end of a row. A program
walks along time (see `depthwise_axes.Stream`) and keeps the frames of sums in registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from . import emit
from .depthwise_axes import Axis, Stream

SEVERAL_OUTPUTS = "several outputs"  # of one input channel
SEVERAL_INPUTS = "several inputs"  # summed to one output channel, as in its gradient


@dataclass(frozen=True)
class Structure:
    """What the text depends on.

    kernel    taps (KT, KH, KW)
    vector    channels of a lane
    channels  "", SEVERAL_OUTPUTS or SEVERAL_INPUTS
    backward  the gradient of the input: x is that of the outputs
    hold      weights stay in registers; otherwise each is loaded where it is used
    unroll    steps written out: the ring's length, so that sums need not move, or 1
    ahead     rows of a tile's input that are loaded before they are used
    wide      64-bit offsets
    loops     None, or (stride, dilation) of each axis: too many taps to write out, a loop goes
              through them; then the axes are those of a single tap
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
    ahead: int = 0
    wide: bool = False
    bias: bool = False
    residual: bool = False
    loops: tuple[tuple[int, int], ...] | None = None

    @property
    def taps(self) -> list[int]:
        kt, kh, kw = self.kernel
        return list(range(kt * kh * kw))

    def tap(self, kt: int, kh: int, kw: int) -> int:
        return (kt * self.kernel[1] + kh) * self.kernel[2] + kw

    def age(self, age: int, step: int) -> int:
        """The place in the ring of the sums of an age at an unrolled step."""
        return (step - age) % self.time.ring if self.unroll > 1 else age


STRIDES = ("xn", "xc", "xt", "xh", "xw", "yn", "yc", "yt", "yh", "yw")
INTEGERS = (
    *("units", "chunks", "frames", "multiplier", "vectors", "columns", "rows"),
    *("T", "H", "W", "OT", "OH", "OW"),
    *("in_t", "in_h", "in_w", "out_t", "out_h", "out_w"),
    *STRIDES,
)


def source(s: Structure) -> str:
    """The kernel's text.

    Its integers (INTEGERS) are extents in tiles, lanes and elements, offsets, and strides, which
    count vectors so that the compiler knows that all vectors are aligned. The weights are
    (K, taps), for channels-last arrays (taps, K).
    """
    before = [*_strides(s), *_coordinates(s), *_edges(s)]
    if s.hold:
        before += _weights(s, s.taps)
    if s.bias:
        before += ["bias = tl.load(bias_ptr + k).to(tl.float32)"]
    before += _start(s)
    return "\n".join(
        [
            f"def depthwise(x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, {', '.join(INTEGERS)},",
            "    G: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,",
            "    HAS_RESIDUAL: tl.constexpr):",
            emit.indented(before),
            f"    for base in range(0, count + {s.time.ring - 1}, {s.unroll}):",
            emit.indented(list(_walk(s)), 2),
            "",
        ]
    )


def _strides(s: Structure) -> Iterator[str]:
    """Strides in elements."""
    for name in STRIDES:
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
    # Without vectors the blocks have one axis: of two, Triton would lay them out in several ways.
    yield "unit = block * G + tl.arange(0, G)" + ("[:, None]" if s.vector > 1 else "")
    yield "inside = unit < units"
    if s.channels_last:
        lane = f" * {s.vector} + tl.arange(0, {s.vector})[None, :]" if s.vector > 1 else ""
        yield f"k = unit % vectors{lane}"
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
    """Columns, and how many of them a row of the tile has: all, or none if it does not exist.

    One comparison is then all that a load needs, and no register has to keep its result.
    """
    yield from extents("h", s.height.positions, "H", "w", s.width.positions, "W", "inside")
    outs = range(s.height.outs), range(s.width.outs)
    yield from extents("oh", outs[0], "OH", "ow", outs[1], "OW", "inside")


def extents(
    row: str,
    rows: Sequence[int],
    height: str,
    column: str,
    columns: Sequence[int],
    width: str,
    inside: str,
) -> Iterator[str]:
    """`at_column0`, ...: a tile's columns without sign; `of_row0`, ...: how many its rows have."""
    for j, place in enumerate(columns):
        yield f"at_{column}{j} = ({column} + {place}).to(tl.uint32)"
    for i, place in enumerate(rows):
        exists = f"({row} + {place} >= 0) & ({row} + {place} < {height}) & {inside}"
        yield f"of_{row}{i} = tl.where({exists}, {width}, 0).to(tl.uint32)"


def within(row: str, i: int, column: str, j: int, condition: str) -> str:
    """Whether an element of a tile exists under a scalar condition."""
    return f"at_{column}{j} < tl.where({condition}, of_{row}{i}, 0).to(tl.uint32)"


def _weights(s: Structure, taps: Sequence[int | str]) -> list[str]:
    channel, tap = ("1", "yw") if s.channels_last else (str(len(s.taps)), "1")
    if s.backward and s.channels_last:
        tap = "xw"  # as many channels as the weights
    m = f" + m * {channel}" if s.channels == SEVERAL_INPUTS else ""
    return [f"w{t} = tl.load(w_ptr + (weight{m} + {t} * {tap})).to(tl.float32)" for t in taps]


def _sums(s: Structure, slot: int, out: int) -> list[str]:
    return [f"z{slot}_{out}_{i}_{j}" for i in range(s.height.outs) for j in range(s.width.outs)]


def _zero(s: Structure, name: str) -> str:
    return f"{name} = tl.zeros([G{f', {s.vector}' if s.vector > 1 else ''}], tl.float32)"


def _start(s: Structure) -> list[str]:
    """Sums that are carried from step to step begin at zero; the first rows are loaded."""
    lines = []
    if s.time.ring > 1:
        lines += [_zero(s, name) for slot in range(s.time.ring) for name in _sums(s, slot, 0)]
    rows = _order(s)[: s.ahead]
    if rows:
        lines += ["base = 0", *(line for q in range(len(rows)) for line in _load(s, q))]
    return lines


def _order(s: Structure) -> list[tuple[int, int, int]]:
    """(step, frame of it, row of the tile's input) in the order of their use."""
    return list(product(range(s.unroll), range(len(s.time.frames)), range(len(s.height.positions))))


def _walk(s: Structure) -> Iterator[str]:
    """The steps written out: rows are loaded `ahead` of their use, as many as the order has."""
    if s.loops:
        yield from _loop_of_taps(s)
        return
    if s.channels == SEVERAL_INPUTS:
        yield from _sum_of_inputs(s)
        return
    order = _order(s)
    begun: set[Any] = set()
    for q, (step, frame, row) in enumerate(order):
        later = q + s.ahead
        load = list(_load(s, later, first=q == 0))
        if s.ahead < len(order):
            yield from load
        yield from _products(s, step, frame, row, begun)
        if s.ahead == len(order):
            yield from load
        if (frame, row) == order[-1][1:]:
            yield from _complete(s, step, begun)
            begun = set()


def _sum_of_inputs(s: Structure) -> Iterator[str]:
    """One step; the loop over input channels is inside of the walk, for they share the sums."""
    begun = {z for out in range(s.time.outs) for z in _sums(s, 0, out)}
    yield from (_zero(s, z) for z in sorted(begun))
    yield "for m in range(multiplier):"
    for q, (step, frame, row) in enumerate(_order(s)):
        lines = [*_load(s, q), *_products(s, step, frame, row, begun)]
        yield from ("    " + line for line in lines)
    yield from _complete(s, 0, begun)


def _loop_of_taps(s: Structure) -> Iterator[str]:
    """One step; every tap finds its input, in a gradient only where the stride divides."""
    assert s.loops is not None
    several, (_, height, width) = s.channels == SEVERAL_INPUTS, s.kernel
    taps = (f"tap // {height * width}", f"tap // {width} % {height}", f"tap % {width}")
    begins = (f"f0 + base * {s.time.in_step}", "h", "w")
    yield _zero(s, "z0_0_0_0")
    yield f"for tap in range({len(s.taps)}):"
    exists = []
    for place, begin, tap, extent, (stride, dilation) in zip(
        ("frame", "r", "q"), begins, taps, "THW", s.loops, strict=True
    ):
        yield f"    {place} = {begin} {'-' if s.backward else '+'} {tap} * {dilation}"
        exists.append(f"({place} >= 0)")
        if s.backward and stride > 1:
            exists.append(f"({place} % {stride} == 0)")
            exists.append(f"({place} // {stride} < {extent})")
            yield f"    {place}_of = {place} // {stride}"
        else:
            exists.append(f"({place} < {extent})")
            yield f"    {place}_of = {place}"
    yield f"    mask = {' & '.join(exists)} & inside"
    across = " * xw" if s.channels_last else ""
    yield f"    place = n * xn + r_of * xh + q_of{across} + c{'' if s.channels_last else ' * xc'}"
    indent = "    "
    if several:
        yield "    for m in range(multiplier):"
        indent = "        "
    m = (" + m" if s.channels_last else " + m * xc") if several else ""
    load = f"tl.load(x_ptr + frame_of * xt + (place{m}), mask=mask, other=0.0)"
    yield f"{indent}v = {load}.to(tl.float32)"
    yield from (indent + line for line in _weights(s, ["tap"]))
    yield f"{indent}z0_0_0_0 += v * wtap"
    yield from _store(s, 0)


def _load(s: Structure, q: int, first: bool = False) -> Iterator[str]:
    """Load the q-th row in order, counted on into the next steps.

    first: nothing is known yet about the row's frame
    """
    order = _order(s)
    step, frame, row = order[q % len(order)]
    if row == 0 or first:
        steps = step + q // len(order) * s.unroll
        m = " + m" if s.channels_last else " + m * xc"
        yield f"frame = f0 + (base + {steps}) * {s.time.in_step} + {s.time.frames[frame]}"
        yield "has_f = (frame >= 0) & (frame < T)"
        yield f"x_f = x_ptr + frame * xt{m if s.channels == SEVERAL_INPUTS else ''}"
    across = " * xw" if s.channels_last else ""
    # The scalar sum first: one register with the lane's offset then serves all rows.
    yield f"x_r = x_f + {s.height.positions[row]} * xh + read"
    for j, column in enumerate(s.width.positions):
        mask = within("h", row, "w", j, "has_f")
        load = f"tl.load(x_r + {column}{across}, mask={mask}, other=0.0)"
        yield f"{_value(step, frame, row, j)} = {load}"


def _value(step: int, frame: int, row: int, column: int) -> str:
    return f"v{step}_{frame}_{row}_{column}"


def _products(s: Structure, step: int, frame: int, row: int, begun: set[str]) -> Iterator[str]:
    """What a row adds to the sums, of which `begun` have a value already."""
    columns = range(len(s.width.positions))
    for j in columns:
        yield f"u{j} = {_value(step, frame, row, j)}.to(tl.float32)"
    row_reads = _readers(s.height, s.height.positions[row])
    loaded: set[int] = set()
    for which, age, out, kt in s.time.terms:
        if which != frame:
            continue
        for j in columns:
            reads = product(row_reads, _readers(s.width, s.width.positions[j]))
            for (oi, kh), (oj, kw) in reads:
                tap = s.tap(kt, kh, kw)
                if not s.hold and tap not in loaded:
                    loaded.add(tap)
                    yield from _weights(s, [tap])
                z = f"z{s.age(age, step)}_{out}_{oi}_{oj}"
                fresh = age == 0 and z not in begun
                if fresh:
                    begun.add(z)
                yield f"{z} {'=' if fresh else '+='} u{j} * w{tap}"


def _complete(s: Structure, step: int, begun: set[str]) -> Iterator[str]:
    """The end of a step: sums that nothing was added to, what is complete, and the next ages."""
    newest = s.age(0, step)
    for out in range(s.time.outs):
        yield from (_zero(s, z) for z in _sums(s, newest, out) if z not in begun)
    yield from _store(s, step)
    if s.unroll == 1:
        for slot in range(s.time.ring - 1, 0, -1):
            older, newer = _sums(s, slot, 0), _sums(s, slot - 1, 0)
            yield from (f"{a} = {b}" for a, b in zip(older, newer, strict=True))


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
        for i, j in product(range(s.height.outs), range(s.width.outs)):
            z = f"z{oldest}_{out}_{i}_{j}" + (" + bias" if s.bias else "")
            yield f"place = t * yt + {i} * yh + {j}{across}"
            residual = "residual_ptr" + (" + place" if s.residual else "")
            yield (
                f"store(y_ptr + place, {residual}, written, {z}, "
                f"{within('oh', i, 'ow', j, 'has_t')}, ACTIVATION, HAS_RESIDUAL)"
            )
