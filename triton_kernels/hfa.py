"""The fully separable block in two kernels: time, then space with the pointwise product.

The temporal stage, by F(m1, K), writes its activated output once, channels last, to the workspace.
The second kernel computes the depthwise stage on the fly as the operand of the pointwise product,
so that its output never is in memory: four activations move instead of six.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch

from ..epilogue import Epilogue
from ..geometry import SeparableGeometry
from ..plan import CHANNELS_LAST, Plan
from ..transforms import Transform
from . import hfa_source, launch
from .emit import kernel
from .launch import Launch, Tensor

# Of the temporal (t) and the spatial kernel (s): rows, that is pixels, output channels and input
# channels of a block, warps, stages, and outputs of a program that share inputs. Absent: by rule.
CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"t_outputs": 1, "t_rows": 128},
    {"t_outputs": 2},
    {"t_outputs": 4},
    {"t_ci": 32},
    {"s_outputs": 2},
    {"s_outputs": 2, "s_ci": 16},
    {"s_rows": 128},
    {"s_ci": 64},
    {"s_co": 64},
)
SHORT = 16  # channels of a sum that is made without tensor cores


def supports(
    geometry: SeparableGeometry, dtype: str, epilogue: tuple[Epilogue, Epilogue, Epilogue]
) -> str | None:
    """None, or the reason against."""
    return launch.refuse_dtype(dtype)


def refuses(plan: Plan) -> str | None:
    """None, or the reason against the transforms of a plan."""
    time, high, wide = plan.transforms
    if max(high.m, wide.m) > 1:
        return "the depthwise stage is computed directly on a GPU: tiles are (m, 1, 1)"
    most = hfa_source.MOST_POINTS
    if min(time.m, time.r) > 1 and time.alpha > most:
        return f"F({time.m}, {time.r}) has {time.alpha} points; up to {most} fit into registers"
    return None


def prepack(weights: tuple[Any, Any, Any], plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """U of the temporal weights, taps of the depthwise ones, and the pointwise ones.

    weights: (M, C, KT, 1, 1), (M, 1, 1, KH, KW) and (K, M, 1, 1, 1)
    Returns (points, M, C), (KH * KW, M), (1, K, M), points = phases * alpha; the first and the last
    with all small parts behind all large ones where the plan splits its products.
    """
    wt, wd, wp = (launch.on_device(w, plan) for w in weights)
    t, stride = plan.transforms[0], plan.geometry.temporal.stride[0]
    time = wt.flatten(2).double()
    fast = hfa_source.fast(t)
    u = _filter_transform(time, t, stride) if fast else time.permute(2, 0, 1)
    v = wp.flatten(1)[None].double()
    u, v = (_as_operand(a, plan).contiguous() for a in (u, v))
    return u, wd.flatten(1).t().contiguous(), v


def _filter_transform(w: Tensor, t: Transform, stride: int) -> Tensor:
    """U = G g of every phase: w (M, C, taps) -> (phases * alpha, M, C)."""
    g = torch.from_numpy(t.as_arrays(np.float64)[1]).to(w.device)
    phases = min(stride, w.shape[2])
    padded = torch.nn.functional.pad(w, (0, t.r * stride - w.shape[2]))
    by_phase = padded.reshape(*w.shape[:2], t.r, stride)[..., :phases]
    return torch.einsum("ar,mcrp->pamc", g, by_phase).reshape(-1, *w.shape[:2])


def _mode(plan: Plan) -> str:
    """How products are made: 'split' float32 is as good as IEEE, and on tensor cores.

    That is so in sums. A single split product is rounded to 22 bits, so short sums are 'exact'.
    """
    if plan.dtype != "float32":
        return "plain"
    if plan.precision == "tf32":
        return "rounded"
    first = plan.geometry.temporal
    return "split" if min(first.in_channels, first.out_channels) >= SHORT else "exact"


def _as_operand(u: Tensor, plan: Plan) -> Tensor:
    """U (points, ...) in float64, rounded as products want it: to TF32 where they are of TF32.

    Where they are split, what that misses is in another `points` behind.
    """
    mode = _mode(plan)
    if mode in ("plain", "exact"):
        return u.to(getattr(torch, plan.dtype))
    bits = u.float().view(torch.int32)
    large = torch.where(u.isfinite(), ((bits + 4096) & -8192).view(torch.float32), u.float())
    if mode == "rounded":
        return large
    return torch.cat((large, torch.where(u.isfinite(), u - large, 0.0).float()))


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch: the output of the temporal stage."""
    return prod(plan.geometry.temporal.y_shape) if prod(plan.geometry.y_shape) else 0


@lru_cache(maxsize=1024)
def launches(plan: Plan) -> tuple[Launch, ...]:
    """The kernels that `run` starts, in order."""
    if not prod(plan.geometry.y_shape):
        return ()
    return _temporal(plan), _spatial(plan)


def _temporal(plan: Plan) -> Launch:
    g, t = plan.geometry.temporal, plan.transforms[0]
    fast = hfa_source.fast(t)
    last = plan.layout == CHANNELS_LAST
    area, out_frames = g.in_size[1] * g.in_size[2], g.out_size[0]
    outputs = (
        t.m
        if fast
        else min(plan.options.get("t_outputs", 1 if _mode(plan) == "split" else 2), out_frames)
    )
    tiles = -(-out_frames // outputs)
    rows = g.batch * tiles * area
    block = _temporal_block(plan, t.alpha if fast else outputs)
    x_n, channel = g.in_channels * g.in_size[0] * area, g.in_size[0] * area
    x_c, x_t, x_p = (1, area * g.in_channels, g.in_channels) if last else (channel, area, 1)
    padded = g.batch * g.in_channels * (g.in_size[0] + sum(g.padding[0]) + t.alpha) * area
    written = g.batch * g.out_channels * tiles * outputs * area
    weights = 2 * (t.alpha * g.stride[0] + 1) * g.in_channels * g.out_channels
    return Launch(
        kernel(hfa_source.temporal(t, outputs, g.kernel[0], g.stride[0], last, _mode(plan))),
        -(-rows // block["BLOCK_P"]) * -(-g.out_channels // block["BLOCK_CO"]),
        ("x", "packed0", "bias0", "workspace"),
        (
            rows, tiles, g.in_size[0], out_frames, area, g.padding[0][0],
            g.in_channels, g.out_channels, x_n, x_c, x_t, x_p,
        ),
        (
            ("HAS_BIAS", plan.epilogue[0].bias),
            ("ACTIVATION", plan.epilogue[0].activation),
            ("WIDE", launch.wide(padded, written, weights)),
            *((name, n) for name, n in block.items() if name.startswith("BLOCK")),
        ),
        warps=block["warps"],
        stages=block["stages"],
    )  # fmt: skip


def _spatial(plan: Plan) -> Launch:
    _, g, p = plan.geometry.stages
    last = plan.layout == CHANNELS_LAST
    outputs = min(plan.options.get("s_outputs", 1), g.out_size[1])
    bands = -(-g.out_size[1] // outputs)
    images = g.batch * g.out_size[0]
    rows = images * bands * g.out_size[2]
    block = _spatial_block(plan)
    inner = plan.epilogue[1]
    below = bands * outputs * g.stride[1] + g.kernel[1]
    padded = images * g.in_channels * (g.padded_size[1] + below) * g.padded_size[2]
    written = outputs * (rows + block["BLOCK_P"]) * p.out_channels
    weights = 2 * p.in_channels * (p.out_channels + block["BLOCK_CO"]) + g.taps * g.in_channels
    return Launch(
        kernel(hfa_source.spatial(g.kernel[1:], g.stride[1:], outputs, last, _mode(plan))),
        -(-rows // block["BLOCK_P"]) * -(-p.out_channels // block["BLOCK_CO"]),
        ("workspace", "packed1", "packed2", "bias1", "bias2", "residual", "y"),
        (
            rows, bands, *p.out_size[1:], *g.in_size[1:], g.padding[1][0], g.padding[2][0],
            p.in_channels, p.out_channels, p.out_size[0],
        ),
        (
            ("HAS_INNER", inner.bias),
            ("INNER", inner.activation),
            *launch.epilogue_constants(plan.epilogue[2]),
            ("WIDE", launch.wide(padded, written, weights)),
            *((name, n) for name, n in block.items() if name.startswith("BLOCK")),
        ),
        warps=block["warps"],
        stages=block["stages"],
    )  # fmt: skip


def _temporal_block(plan: Plan, points: int) -> dict[str, int]:
    """Blocks of rows x output channels whose accumulators, `points` of them, fit into registers.

    A warp multiplies 16 rows, so that no operand has to be in the registers of two.
    """
    options, temporal = plan.options, plan.geometry.temporal
    block_p = options.get("t_rows", 64)
    warps = options.get("t_warps", max(4, block_p // 16))
    block_co = min(64, max(16, launch.power_of_two(temporal.out_channels)))
    while points * block_p * block_co > 64 * 32 * warps and block_co > 16:
        block_co //= 2
    deep = options.get("t_ci", _step(plan, temporal.in_channels))
    return {
        "BLOCK_P": block_p,
        "BLOCK_CI": min(deep, max(16, launch.power_of_two(temporal.in_channels))),
        "BLOCK_CO": options.get("t_co", block_co),
        "warps": warps,
        "stages": options.get("t_stages", 2),
    }


def _step(plan: Plan, channels: int) -> int:
    """Input channels at a time; fewer where every element is loaded by an address of its own."""
    return 16 if plan.dtype == "float32" or channels % 16 else 32


def _spatial_block(plan: Plan) -> dict[str, int]:
    """As many output channels in a block as registers hold: the depthwise stage runs per block."""
    options, pointwise = plan.options, plan.geometry.pointwise
    most = 128 if plan.dtype == "float32" else 256
    if plan.layout != CHANNELS_LAST or pointwise.in_channels % 16:
        most = 64  # addresses take registers too
    most = options.get("s_co", most)
    block_co = min(most, max(16, launch.power_of_two(pointwise.out_channels)))
    block_p = options.get("s_rows", 128 if block_co == 256 else 64)
    deep = options.get("s_ci", 16 if pointwise.in_channels % 16 else 32)
    return {
        "BLOCK_P": block_p,
        "BLOCK_CI": min(deep, max(16, launch.power_of_two(pointwise.in_channels))),
        "BLOCK_CO": block_co,
        "warps": options.get("s_warps", 8 if block_p * block_co > 64 * 128 else 4),
        "stages": 1,
    }


def run(plan, x, packed, biases, residual, y, workspace) -> None:
    """Write the block of x, each stage with its epilogue, to y.

    x         (N, C, T, H, W)
    packed    what `prepack` returned for the same plan
    biases    three entries, (M,), (M,), (K,) or None
    residual  (N, K, OT, OH, OW) or None, added in the last epilogue
    y         (N, K, OT, OH, OW), written
    workspace `workspace_size(plan)` elements, overwritten

    Equivalent to conv3d (M, C, KT, 1, 1), conv3d (M, 1, 1, KH, KW) with groups = M,
    conv3d (K, M, 1, 1, 1) in sequence.
    """
    arrays: dict[str, Any] = {"x": x, "residual": residual, "y": y, "workspace": workspace}
    for i, (weights, bias) in enumerate(zip(packed, biases, strict=True)):
        arrays[f"packed{i}"], arrays[f"bias{i}"] = weights, bias
    with launch.device_of(x):
        for start in launches(plan):
            start(arrays)
