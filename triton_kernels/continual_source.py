"""The Triton code of a stream's step as text, made once per structure: taps, strides, blocks.

A program makes a tile of one stream's column: block_p output pixels by block_k output channels.
With few input channels per group it multiplies element by element, otherwise by tl.dot.

Letters: t frames seen, p output pixels, k output channels, c input channels per group. Channels
last, a tile is (pixels, channels), else (channels, pixels); that of tl.dot is always the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from .emit import indented

MOST_UNROLLED = 64  # terms of a sum that are written out


@dataclass(frozen=True)
class Structure:
    """What the text depends on; axes are time, height, width.

    depth, outs  input and output channels per group
    last         channels last
    block_c      input channels of a tl.dot; 0: element by element
    cols         neighbouring outputs of a row that share what they read; 1 but element by element
    wide         offsets within a stream need 64 bits
    """

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    padding: tuple[int, int]
    depth: int
    outs: int
    last: bool
    replicate: bool
    update: bool
    block_p: int
    block_k: int
    block_c: int
    cols: int
    precision: str
    wide: bool

    @property
    def ring(self) -> int:
        return self.dilation[0] * (self.kernel[0] - 1)

    @property
    def pixels_first(self) -> bool:
        return self.last or bool(self.block_c)

    @property
    def tile(self) -> str:
        """The shape of a tile."""
        p, k = self.block_p, self.block_k
        return f"({p}, {k})" if self.pixels_first else f"({k}, {p})"

    def of_pixels(self, name: str) -> str:
        return f"{name}[:, None]" if self.pixels_first else f"{name}[None, :]"

    def of_channels(self, name: str) -> str:
        return f"{name}[None, :]" if self.pixels_first else f"{name}[:, None]"


ARGUMENTS = "height, width, out_width, pixels, channels, outs, p_blocks, k_blocks"


def _tile(s: Structure) -> list[str]:
    """The stream and the tile of a program: n, p, k, group, and where a column's elements are."""
    wide = ".to(tl.int64)" if s.wide else ""
    lines = [
        "pid = tl.program_id(0)",
        "n = (pid // (p_blocks * k_blocks)).to(tl.int64)",
        *_pixels(s),
        "t = tl.load(steps + n)",
        "frame = height * width",
    ]
    block = "pid // p_blocks % k_blocks"
    if s.block_c:
        per_group = -(-s.outs // s.block_k)
        lines += [
            f"group = {block} // {per_group}",
            f"o = {block} % {per_group} * {s.block_k} + tl.arange(0, {s.block_k})",
            f"k = group * {s.outs} + o",
            f"valid = (p < pixels)[:, None] & (o < {s.outs})[None, :]",
        ]
    else:
        lines += [
            f"k = {block} * {s.block_k} + tl.arange(0, {s.block_k})",
            f"valid = {s.of_pixels('(p < pixels)')} & {s.of_channels('(k < outs)')}",
        ]
    step = "outs" if s.last else "1"
    channel = "k" if s.last else f"k{wide} * pixels"
    return [
        *lines,
        f"at = {s.of_pixels(f'(p{wide} * {step})')} + {s.of_channels(f'({channel})')}",
        "of_y = n * outs * pixels",
    ]


def _pixels(s: Structure) -> list[str]:
    """p, the first output of each run of `cols`, and where its input begins."""
    lines = [f"p = pid % p_blocks * {s.block_p} + tl.arange(0, {s.block_p})"]
    if s.cols > 1:
        lines += [
            f"runs = (out_width + {s.cols - 1}) // {s.cols}",
            f"column = p % runs * {s.cols}",
            "p = p // runs * out_width + column",
        ]
    return [
        *lines,
        f"top = p // out_width * {s.stride[1]} - {s.padding[0]}",
        f"left = p % out_width * {s.stride[2]} - {s.padding[1]}",
    ]


def _guard() -> list[str]:
    """Programs of streams that are not active end."""
    return ["if active is not None:", "    if tl.load(active + n) == 0:", "        return"]


def _is_column(s: Structure, time: str) -> str:
    """t - L divisible by s; t may be less than L, but 0 has no sign."""
    return f"({time} - {s.ring}) % {s.stride[0]} == 0"


def _frame(s: Structure, slot: str | None) -> list[str]:
    """The new frame, or that of a slot, of the program's stream."""
    if slot is None:
        return ["frames = x + n * channels * frame", f"c_step = {'1' if s.last else 'frame'}"]
    size = "channels * frame" if s.last else "frame"
    return [
        f"frames = state + n * {s.ring} * channels * frame + {slot} * {size}",
        f"c_step = {'1' if s.last else f'{s.ring} * frame'}",
    ]


def _product(s: Structure, acc: str, tap: int, slot: str | None) -> list[str]:
    """acc += a frame under the spatial taps of temporal tap `tap`; slot None: the new frame."""
    taps, lines = s.kernel[1] * s.kernel[2], _frame(s, slot)
    either = slot is not None and s.replicate
    body = _dot if s.block_c else _elementwise
    terms = taps * (-(-s.depth // s.block_c) if s.block_c else s.depth)
    if not s.block_c and terms <= MOST_UNROLLED:
        for term in range(terms):
            lines += body(s, acc, tap, str(term), either)
        return lines
    return [*lines, f"for s in range({terms}):", *_indented(body(s, acc, tap, "s", either))]


def _indented(lines: list[str]) -> list[str]:
    return indented(lines).split("\n")


def _shared(s: Structure, tap: int, slot: str | None) -> list[str]:
    """z0, z1, ..: the outputs of a run += a frame under the spatial taps of a temporal tap; every
    input is read once.
    """
    lines, either = _frame(s, slot), slot is not None and s.replicate
    wide = ".to(tl.int64)" if s.wide else ""
    (_, kh, kw), (_, dh, dw), d = s.kernel, s.dilation, s.depth
    for i in range(kh):
        lines.append(f"h = top + {i * dh}")
        for term in range(d):
            lines.append(f"c = k // {s.outs} * {d} + {term}")
            for j in range(kw):
                row = ((tap * kh + i) * kw + j) * d + term
                lines += [
                    f"b = tl.load(packed + {row} * outs + k, mask=k < outs, other=0.0)",
                    f"b{j} = {s.of_channels('b')}.to(tl.float32)",
                ]
            readers: dict[int, list[tuple[int, int]]] = {}
            for u in range(s.cols):
                for j in range(kw):
                    readers.setdefault(u * s.stride[2] + j * dw, []).append((u, j))
            for offset, pairs in sorted(readers.items()):
                pixel = "w + h * width"
                if s.last:
                    pixel = f"({pixel}){wide} * channels"
                lines += [
                    f"w = left + {offset}",
                    "inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)",
                    *_inputs(
                        s,
                        s.of_pixels(f"({pixel})"),
                        s.of_channels(f"c{wide}"),
                        f"valid & {s.of_pixels('inside')}",
                        either,
                    ),
                    "a = a.to(tl.float32)",
                    *(f"z{u} += a * b{j}" for u, j in pairs),
                ]
    return lines


def _inputs(s: Structure, at: str, channel: str, mask: str, either: bool) -> list[str]:
    """a = the inputs at a pixel offset and of a channel.

    either: in front of a stream stands its first frame, which may be the new one
    """
    step = "1" if s.last else "frame"
    if not either:
        return [f"a = tl.load(frames + {at} + {channel} * c_step, mask={mask}, other=0.0)"]
    return [
        f"a = tl.load(frames + {at} + {channel} * c_step, mask={mask} & (t != 0), other=0.0)",
        f"a += tl.load(x + n * channels * frame + {at} + {channel} * {step}, "
        f"mask={mask} & (t == 0), other=0.0)",
    ]


def _elementwise(s: Structure, acc: str, tap: int, term: str, either: bool) -> list[str]:
    """One term of the sum over (KH, KW, C / G); weights (KT, KH, KW, C / G, K)."""
    kw, d = s.kernel[2], s.depth
    wide = ".to(tl.int64)" if s.wide else ""
    pixel = "w + h * width"
    if s.last:
        pixel = f"({pixel}){wide} * channels"
    first = tap * s.kernel[1] * kw * d
    return [
        f"h = top + {term} // {kw * d} * {s.dilation[1]}",
        f"w = left + {term} // {d} % {kw} * {s.dilation[2]}",
        "inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)",
        f"c = k // {s.outs} * {d} + {term} % {d}",
        *_inputs(
            s,
            s.of_pixels(f"({pixel})"),
            s.of_channels(f"c{wide}"),
            f"valid & {s.of_pixels('inside')}",
            either,
        ),
        f"b = tl.load(packed + ({first} + {term}) * outs + k, mask=k < outs, other=0.0)",
        f"{acc} += a.to(tl.float32) * {s.of_channels('b')}.to(tl.float32)",
    ]


def _dot(s: Structure, acc: str, tap: int, term: str, either: bool) -> list[str]:
    """One block of channels under one tap; weights (G, KT, KH, KW, C / G, K / G)."""
    blocks, kw = -(-s.depth // s.block_c), s.kernel[2]
    taps = s.kernel[1] * kw
    wide = ".to(tl.int64)" if s.wide else ""
    pixel = "w + h * width"
    if s.last:
        pixel = f"({pixel}){wide} * channels"
    lines = [
        f"c = {term} % {blocks} * {s.block_c} + tl.arange(0, {s.block_c})",
        f"h = top + {term} // {blocks * kw} * {s.dilation[1]}",
        f"w = left + {term} // {blocks} % {kw} * {s.dilation[2]}",
        "inside = (p < pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)",
        f"of_c = c < {s.depth}",
        f"row = ((group * {s.kernel[0]} + {tap}) * {taps} + {term} // {blocks}) * {s.depth} + c",
        f"b = tl.load(packed + row[:, None] * {s.outs} + o[None, :], "
        f"mask=of_c[:, None] & (o < {s.outs})[None, :], other=0.0)",
    ]
    channel = f"(group * {s.depth} + c){wide}"
    # Along the axis that lies in consecutive memory threads follow each other.
    of_p, of_k = ("[:, None]", "[None, :]") if s.last else ("[None, :]", "[:, None]")
    lines += _inputs(
        s, f"({pixel}){of_p}", f"{channel}{of_k}", f"inside{of_p} & of_c{of_k}", either
    )
    a = "a" if s.last else "tl.trans(a)"
    return [*lines, f"{acc} = tl.dot({a}, b, {acc}, input_precision='{s.precision}')"]


def _finish(s: Structure, acc: str = "z", output: int = 0) -> list[str]:
    """Bias, residual, activation and store of a sum, that of an output of the run."""
    bias = s.of_channels("tl.load(bias + k, mask=k < outs, other=0.0)")
    at, valid = "at", "valid"
    if s.cols > 1:
        at = f"at + {output if not s.last else f'{output} * outs'}"
        valid = f"valid & {s.of_pixels(f'(column + {output} < out_width)')}"
    return [
        "if HAS_BIAS:",
        f"    {acc} += {bias}.to(tl.float32)",
        "store(y + of_y, residual if residual is None else residual + of_y, "
        f"{at}, {acc}, {valid}, ACTIVATION, HAS_RESIDUAL)",
    ]


def ring(s: Structure) -> str:
    """A column from the frames that its taps read; leaves the streams' times in `seen`."""
    lines = _tile(s)
    if s.ring:
        lines += ["if pid % (p_blocks * k_blocks) == 0:", "    tl.store(seen + n, t)"]
    lines += _guard()
    if s.stride[0] > 1:
        lines += [f"if {_is_column(s, 't')}:", "    pass", "else:", "    return"]
    sums = ["z"] if s.cols == 1 else [f"z{u}" for u in range(s.cols)]
    lines += [f"{z} = tl.zeros({s.tile}, tl.float32)" for z in sums]

    def product(tap: int, slot: str | None) -> list[str]:
        return _product(s, "z", tap, slot) if s.cols == 1 else _shared(s, tap, slot)

    for tap in range(s.kernel[0] - 1):
        # Time t - L + tap * dilation, L later to keep it positive.
        time = f"t + {tap * s.dilation[0]}"
        if s.replicate:
            lines.append(f"time = tl.maximum({time}, {s.ring})")
            time = "time"
        lines += product(tap, f"(({time}) % {s.ring})")
    lines += product(s.kernel[0] - 1, None)
    for output, z in enumerate(sums):
        lines += _finish(s, z, output)
    head = (
        f"x, state, steps, active, packed, bias, residual, y, {'seen, ' * (s.ring > 0)}"
        f"{ARGUMENTS}, "
        "HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr"
    )
    return f"def continual_ring_kernel({head}):\n{indented(lines)}\n"


def sums(s: Structure) -> str:
    """A column from what was added up, and the frame under the other taps added to later ones."""
    taps, d = s.kernel[0], s.dilation[0]
    lines = [*_tile(s), *_guard(), f"of_sums = n * {s.ring} * outs * pixels"]
    # Of a slot: channels last (N, L, *out_frame, K), else (N, K, L, *out_frame)
    if s.last:
        lines += ["slot_size = outs * pixels", "at_sum = at"]
    else:
        wide = ".to(tl.int64)" if s.wide else ""
        channel = s.of_channels(f"(k{wide} * {s.ring} * pixels)")
        lines += ["slot_size = pixels", f"at_sum = {s.of_pixels(f'p{wide}')} + {channel}"]
    if s.ring:
        lines += [
            f"slot = state + of_sums + t % {s.ring} * slot_size + at_sum",
            "before = tl.load(slot, mask=valid, other=0.0)",
        ]
        if s.replicate:
            lines += ["if t == 0:", *_indented(_begin(s))]
    else:
        lines.append(f"before = tl.zeros({s.tile}, tl.float32)")
    column = ["z = before", *_product(s, "z", taps - 1, None), *_finish(s)]
    if s.stride[0] > 1:
        column = [f"if {_is_column(s, 't')}:", *_indented(column)]
    lines += column
    if s.update and s.ring:
        lines.append("tl.debug_barrier()")  # the slot that was read is written below
        for tap in range(taps - 1):
            time = f"(t + {(taps - 1 - tap) * d})"
            body = [
                f"slot = state + of_sums + {time} % {s.ring} * slot_size + at_sum",
                f"part = tl.zeros({s.tile}, tl.float32)",
                *_product(s, "part", tap, None),
            ]
            if tap:
                body.append("part += tl.load(slot, mask=valid, other=0.0)")
            body.append("tl.store(slot, part, mask=valid)")
            if s.stride[0] > 1:
                body = [f"if {_is_column(s, time)}:", *_indented(body)]
            lines += body
    head = (
        f"x, state, steps, active, packed, bias, residual, y, {ARGUMENTS}, "
        "HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr"
    )
    return f"def continual_sums_kernel({head}):\n{indented(lines)}\n"


def _begin(s: Structure) -> list[str]:
    """What the frames in front of a stream have added, all of them its first: to the slots, and in
    `before` for this column."""
    lines = [f"before = tl.zeros({s.tile}, tl.float32)"]
    for tap in range(s.kernel[0] - 1):
        lines += _product(s, "before", tap, None)
        first = (s.kernel[0] - 2 - tap) * s.dilation[0]
        for slot in range(first, first + s.dilation[0]) if s.update else ():
            lines.append(
                f"tl.store(state + of_sums + {slot} * slot_size + at_sum, before, mask=valid)"
            )
    return lines


def keep(last: bool, ring: int, block: int) -> str:
    """The new frame takes the slot of the oldest, and a stream has seen one more.

    A launch of its own: every program of `ring` has read that slot, and `seen` does not change.
    """
    lines = [
        "pid = tl.program_id(0)",
        "n = (pid // blocks).to(tl.int64)",
        "t = tl.load(seen + n)",
        *_guard(),
        "if pid % blocks == 0:",
        "    tl.store(steps + n, t + 1)",
        f"e = (pid % blocks).to(tl.int64) * {block} + tl.arange(0, {block})",
        "size = channels * frame",
        "value = tl.load(x + n * size + e, mask=e < size)",
        f"slot = t % {ring}",
        f"at = n * {ring} * size + slot * size + e"
        if last
        else f"at = (n * channels + e // frame) * {ring} * frame + slot * frame + e % frame",
        "tl.store(state + at, value, mask=e < size)",
    ]
    return (
        "def continual_keep_kernel(x, state, steps, active, seen, channels, frame, blocks):\n"
        f"{indented(lines)}\n"
    )


def count() -> str:
    """Active streams have seen one frame more: behind all that read how many."""
    lines = [
        "n = tl.program_id(0)",
        *_guard(),
        "tl.store(steps + n, tl.load(steps + n) + 1)",
    ]
    return f"def continual_count_kernel(steps, active):\n{indented(lines)}\n"
