"""Kernel texts of the fully separable block: what is written out per taps, stride and tile."""

from __future__ import annotations

from functools import lru_cache

from ..transforms import Transform
from .emit import indented, transformed

MOST_POINTS = 6  # of F(m, r) in time: more, with their operands, do not fit into registers

_TEMPORAL = """\
def hfa_temporal_kernel(
    x_ptr, u_ptr, bias_ptr, z_ptr,
    rows, tiles, frames, out_frames, area, before, C, M, x_n, x_c, x_t, x_p,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
):
    pid = tl.program_id(0)
    if WIDE:
        pid, C, M = pid.to(tl.int64), tl.cast(C, tl.int64), tl.cast(M, tl.int64)
        area, x_t = tl.cast(area, tl.int64), tl.cast(x_t, tl.int64)
    blocks = tl.cdiv(M, BLOCK_CO)
    row = pid // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    co = pid % blocks * BLOCK_CO + tl.arange(0, BLOCK_CO)
    # A row is a pixel of a tile of {outputs} frames: rows (N, tiles, area).
    pixel = row % area
    tile = row // area % tiles
    n = row // area // tiles
    first = tile * {step} - before
    inside = row < rows
    x_row = n * x_n + first * x_t + pixel * x_p
    u_points = u_ptr + co[None, :] * C
{zeros}
    for c0 in range(0, C, BLOCK_CI):
        c = c0 + tl.arange(0, BLOCK_CI)
        x_at = x_ptr + x_row{rows} + c{columns} * x_c
        u_at = u_points + c[:, None]
        u_mask = (c < C)[:, None] & (co < M)[None, :]
{products}
    if HAS_BIAS:
        bias = tl.load(bias_ptr + co, mask=co < M, other=0.0).to(tl.float32)[None, :]
    else:
        bias = tl.zeros((1, BLOCK_CO), tl.float32)
    frame = tile * {outputs}
    z_at = z_ptr + ((n * out_frames + frame) * area + pixel)[:, None] * M + co[None, :]
    z_mask = inside[:, None] & (co < M)[None, :]
{results}
"""


@lru_cache(maxsize=256)
def temporal(t: Transform, outputs: int, taps: int, stride: int, last: bool, mode: str) -> str:
    """The temporal stage: per tile `outputs` frames, by F(m, r) per phase if t saves products.

    outputs  t.m, or any number of frames that share inputs where the stage is direct
    last     whether x is channels last
    mode     how products are made of float32 operands; see `parts`. Split, U comes as its large
             parts and, behind them, the small ones

    Frames are loaded once per tile and block of channels, transformed in float32, and multiplied
    by U; the products of all tiles stay in registers until the inverse transform.
    """
    rows, columns = ("[:, None]", "[None, :]") if last else ("[None, :]", "[:, None]")
    by_points = fast(t)
    names = [f"m{j}" for j in range(t.alpha if by_points else outputs)]
    products = (
        _fast_products(t, taps, stride, rows, columns, mode)
        if by_points
        else _direct_products(outputs, taps, stride, rows, columns, mode)
    )
    frames = [f"z{i}" for i in range(outputs)]
    results = (
        transformed(t.output_program, names, frames, "s")
        if by_points
        else [f"{z} = {m}" for z, m in zip(frames, names, strict=True)]
    )
    for i in range(outputs):
        results += [
            f"z{i} = activate(z{i} + bias, ACTIVATION).to(z_ptr.dtype.element_ty)",
            f"tl.store(z_at + {i} * area * M, z{i}, "
            f"mask=z_mask & (frame + {i} < out_frames)[:, None])",
        ]
    return _TEMPORAL.format(
        outputs=outputs,
        step=outputs * stride,
        rows=rows,
        columns=columns,
        zeros=indented([f"{name} = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)" for name in names]),
        products=indented(products, 2),
        results=indented(results),
    )


def fast(t: Transform) -> bool:
    """Whether the temporal stage runs as F(m, r) and not as a direct sum."""
    return t.m > 1 and t.r > 1 and t.alpha <= MOST_POINTS


def _frame(name: str, at: int, rows: str, columns: str) -> list[str]:
    """Load a frame of the tile as (BLOCK_P, BLOCK_CI), zero outside of x."""
    lines = [
        f"in_{name} = inside & (first + {at} >= 0) & (first + {at} < frames)",
        f"{name} = tl.load(x_at + {at} * x_t, mask=in_{name}{rows} & (c < C){columns}, other=0.0)",
    ]
    return lines if rows == "[:, None]" else [*lines, f"{name} = tl.trans({name})"]


def _weights(point: int, name: str = "u") -> str:
    return f"{name} = tl.load(u_at + {point} * M * C, mask=u_mask, other=0.0)"


def parts(name: str, mode: str) -> list[str]:
    """What `product` reads of an operand, a block named `name`.

    rounded  the operand to the nearest TF32; tensor cores would cut it
    split    its large part, the 10 bits behind the leading one that TF32 has, and the small rest;
             infinities go into one product alone: in the others they could meet the other sign
    """
    if mode == "rounded":
        bits = f"({name}.to(tl.int32, bitcast=True) + 4096) & -8192"
        return [
            f"{name} = tl.where(tl.abs({name}) < float('inf'), "
            f"({bits}).to(tl.float32, bitcast=True), {name})"
        ]
    if mode == "split":
        bits = f"({name}.to(tl.int32, bitcast=True) & -8192)"
        return [
            f"{name}_large = {bits}.to(tl.float32, bitcast=True)",
            f"{name}_bounded = tl.where(tl.abs({name}) == float('inf'), 0.0, {name}_large)",
            f"{name}_small = tl.where(tl.abs({name}) == float('inf'), 0.0, {name} - {name}_large)",
        ]
    return []


def product(total: str, operand: str, weights: str, mode: str, outside: bool = True) -> list[str]:
    """total += operand weights; split, as three products of all parts but both small ones.

    outside  Tensor cores cut where they add, by up to a bit of the total; so a long sum of split
             products is added outside of them, where additions round. That takes registers for
             one more block.
    """
    precision = f"input_precision='{'ieee' if mode == 'exact' else 'tf32'}'"
    if mode != "split":
        return [f"{total} = tl.dot({operand}, {weights}, {total}, {precision})"]
    first, rest = (f"{operand}_small, {weights}", f"{operand}_bounded, small_{weights}")
    if not outside:
        terms = (first, rest, f"{operand}_large, {weights}")
        return [f"{total} = tl.dot({term}, {total}, {precision})" for term in terms]
    return [
        f"part = tl.dot({first}, {precision})",
        f"part = tl.dot({rest}, part, {precision})",
        f"{total} += tl.dot({operand}_large, {weights}, part, {precision})",
    ]


def _fast_products(
    t: Transform, taps: int, stride: int, rows: str, columns: str, mode: str
) -> list[str]:
    """M += V U for every point; phases of a strided stage are further channels."""
    phases = min(stride, taps)
    lines = []
    for phase in range(phases):
        frames = [f"d{j}" for j in range(t.alpha)]
        for j, name in enumerate(frames):
            lines += _frame(name, j * stride + phase, rows, columns)
            lines.append(f"{name} = {name}.to(tl.float32)")
        points = [f"v{j}" for j in range(t.alpha)]
        lines += transformed(t.input_program, frames, points, "t")
        for j in range(t.alpha):
            point = phase * t.alpha + j
            lines += [f"v = v{j}.to(x_ptr.dtype.element_ty)", _weights(point)]
            if mode == "split":
                lines += [_weights(phases * t.alpha + point, "small_u")]
            lines += [*parts("v", mode), *product(f"m{j}", "v", "u", mode, False)]
    return lines


def _direct_products(
    outputs: int, taps: int, stride: int, rows: str, columns: str, mode: str
) -> list[str]:
    """Every tap's weights once, for all outputs of the tile."""
    lines = []
    for at in sorted({i * stride + k for i in range(outputs) for k in range(taps)}):
        lines += _frame(f"d{at}", at, rows, columns)
        lines += parts(f"d{at}", mode)
    for k in range(taps):
        lines.append(_weights(k))
        lines += [_weights(taps + k, "small_u")] if mode == "split" else []
        for i in range(outputs):
            lines += product(f"m{i}", f"d{i * stride + k}", "u", mode)
    return lines


_SPATIAL = """\
def hfa_spatial_kernel(
    z_ptr, w_ptr, v_ptr, inner_ptr, bias_ptr, residual_ptr, y_ptr,
    rows, bands, out_height, out_width, height, width, above, left, M, K, frames,
    HAS_INNER: tl.constexpr, INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
):
    pid = tl.program_id(0)
    if WIDE:
        pid, M, K = pid.to(tl.int64), tl.cast(M, tl.int64), tl.cast(K, tl.int64)
        width, out_width = tl.cast(width, tl.int64), tl.cast(out_width, tl.int64)
    blocks = tl.cdiv(K, BLOCK_CO)
    row = pid // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    co = pid % blocks * BLOCK_CO + tl.arange(0, BLOCK_CO)
    # A row is a column of {outputs} output pixels: rows (N * T, bands, OW); z is (N, T, H, W, M).
    column = row % out_width
    first = row // out_width % bands * {outputs}
    image = row // out_width // bands
    inside = row < rows
    top = first * {down} - above
    west = column * {across} - left
    z_row = ((image * height + top) * width + west) * M
{zeros}
    for c0 in range(0, M, BLOCK_CI):
        c = c0 + tl.arange(0, BLOCK_CI)
        in_c = (c < M)[None, :]
        z_at = z_ptr + z_row[:, None] + c[None, :]
        w_at = w_ptr + c[None, :]
        inner = tl.zeros((BLOCK_P, BLOCK_CI), tl.float32)
        if HAS_INNER:
            inner += tl.load(inner_ptr + c, mask=c < M, other=0.0).to(tl.float32)[None, :]
{starts}
        # A loop at run time, of few steps: Triton would move the change of layout for the product
        # in front of an unrolled sum, and send every tap through shared memory.
        for s in range({wide}):
            in_column = inside & (west + s >= 0) & (west + s < width)
{taps}
        v_mask = (c < M)[:, None] & (co < K)[None, :]
        v_at = v_ptr + c[:, None] + co[None, :] * M
        v = tl.load(v_at, mask=v_mask, other=0.0)
{products}
    if HAS_BIAS:
        bias = tl.load(bias_ptr + co, mask=co < K, other=0.0).to(tl.float32)[None, :]
    else:
        bias = tl.zeros((1, BLOCK_CO), tl.float32)
{place}
{results}
"""

# y in the order of its pixels, or with its channels apart: (N, K, T, OH, OW).
_CHANNELS_LAST = """\
    y_row = (image * out_height + first) * out_width + column
    y_at = y_row[:, None] * K + co[None, :]
    y_step = out_width * K"""
_CONTIGUOUS = """\
    y_row = (image // frames * K * frames + image % frames) * out_height + first
    y_at = (y_row * out_width + column)[None, :] + co[:, None] * (frames * out_height * out_width)
    y_step = out_width"""


@lru_cache(maxsize=256)
def spatial(
    taps: tuple[int, int], stride: tuple[int, int], outputs: int, last: bool, mode: str
) -> str:
    """The depthwise stage, computed as the operand of the pointwise product.

    outputs  that share inputs, below each other
    last     whether y is channels last
    mode     as for `temporal`
    """
    lines = []
    for r in range(taps[0]):
        at = f"w_at + ({r} * {taps[1]} + s) * M"
        lines.append(f"w{r} = tl.load({at}, mask=in_c, other=0.0).to(tl.float32)")
    for i in range((outputs - 1) * stride[0] + taps[0]):
        uses = [(o, i - o * stride[0]) for o in range(outputs)]
        uses = [(o, r) for o, r in uses if 0 <= r < taps[0]]
        if not uses:
            continue
        lines += [
            f"in_z = in_column & (top + {i} >= 0) & (top + {i} < height)",
            f"z = tl.load(z_at + ({i} * width + s) * M, mask=in_z[:, None] & in_c, other=0.0)",
            "z = z.to(tl.float32)",
            *(f"a{o} += z * w{r}" for o, r in uses),
        ]
    products = []
    if mode == "split":
        products.append("small_v = tl.load(v_at + K * M, mask=v_mask, other=0.0)")
    results = []
    for o in range(outputs):
        products.append(f"a{o} = activate(a{o}, INNER).to(z_ptr.dtype.element_ty)")
        products += [*parts(f"a{o}", mode), *product(f"y{o}", f"a{o}", "v", mode)]
        mask = f"(inside & (first + {o} < out_height))"
        mask = (
            f"{mask}[:, None] & (co < K)[None, :]"
            if last
            else f"{mask}[None, :] & (co < K)[:, None]"
        )
        total = f"y{o} + bias" if last else f"tl.trans(y{o} + bias)"
        results.append(
            f"store(y_ptr, residual_ptr, y_at + {o} * y_step, {total}, {mask}, "
            "ACTIVATION, HAS_RESIDUAL)"
        )
    names = [f"y{o}" for o in range(outputs)]
    return _SPATIAL.format(
        outputs=outputs,
        down=stride[0],
        across=stride[1],
        wide=taps[1],
        zeros=indented([f"{name} = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)" for name in names]),
        starts=indented([f"a{o} = inner" for o in range(outputs)], 2),
        taps=indented(lines, 3),
        products=indented(products, 2),
        place=_CHANNELS_LAST if last else _CONTIGUOUS,
        results=indented(results),
    )
