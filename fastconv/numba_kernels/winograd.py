"""Minimal filtering F(m, r) per axis, stride 1: transforms and products in vector registers.

Tiles go through three stages (Lavin and Gray 2016, section 4.1): V = BT d for every channel,
M = V U as one matrix product per point, y = AT M with the epilogue. A thread takes a block of few
tiles through all of them, V and M staying in its caches while U streams by ("fused"). Where there
are many threads for the tiles, or U is large for what memory gives to each, all threads go through
one stage after the other and share U ("phased").
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numba
import numpy as np

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from ..transforms import apply_along, transform
from . import winograd_stages as stages
from .gemm import block_rows, epilogue_words, panel_memory, panel_vectors
from .layout import Views, channels_last_views, pieces, pieces_size, views_size
from .simd import Kernel, address, kernel, parallel_for, threads, vector_width
from .tiles import spec_of

CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"tiles": 14},
    {"tiles": 28},
    {"tiles": 56},
    {"phased": 1},
)
DTYPES = ("float32", "float64")

_BLOCK_BYTES = 1 << 20  # V and M of a fused block, about a second-level cache
_PHASED_BYTES = 64 << 20  # V and M of all threads
_LARGE_U_BYTES = 16 << 20  # beyond what a third-level cache may hold beside V and M
_CORES_FED_BY_MEMORY = 4  # streaming U from memory, fused blocks of 14 rows take 36 GB/s per core
_FEW_TILES, _MANY_TILES = 14, 112  # of a fused block


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(DTYPES)}"
    if geometry.groups != 1:
        return f"winograd is for one group, not {geometry.groups}"
    if any(d != 1 for d in geometry.dilation):
        return f"winograd is for dilation 1, not {geometry.dilation}"
    if all(r == 1 for r in geometry.kernel):
        return f"no axis of kernel {geometry.kernel} has more than one tap"
    if any(s != 1 for s in geometry.stride):
        return (
            f"stride {geometry.stride} needs the polyphase split, which the numba backend does not "
            "have"
        )
    return None


class _Schedule:
    """What follows from a plan before there are arrays; sizes in elements.

    order, transforms  axes of the lifted geometry with their transforms, those with F(1, 1) first
    counts, total      tiles per axis of the lifted geometry, and of the whole batch
    vectors, width     registers and columns per panel of output channels
    depth              channels of a row of V, padded to registers
    phased, tiles      tiles per block; if phased, per round of all threads
    scratch            V and M of a thread; if phased, of all threads
    """

    def __init__(self, plan: Plan) -> None:
        geometry, lanes = plan.geometry.lifted(), vector_width(plan.dtype)
        lifted = (transform(1, 1),) * (3 - len(plan.transforms)) + plan.transforms
        self.order = tuple(sorted(range(3), key=lambda axis: lifted[axis].alpha > 1))
        self.transforms = tuple(lifted[axis] for axis in self.order)
        self.points = prod(t.alpha for t in lifted)
        self.counts = [-(-o // t.m) for o, t in zip(geometry.out_size, lifted, strict=True)]
        self.total = geometry.batch * prod(self.counts)
        self.vectors = panel_vectors(geometry.out_channels, plan.dtype)
        self.width = self.vectors * lanes
        self.panels = -(-geometry.out_channels // self.width)
        self.depth = -(-geometry.in_channels // lanes) * lanes
        item = np.dtype(plan.dtype).itemsize
        cores = numba.config.NUMBA_NUM_THREADS
        u_bytes = item * self.points * self.depth * self.width * self.panels
        few = self.total < cores * _FEW_TILES // 2
        large = u_bytes > _LARGE_U_BYTES and cores > _CORES_FED_BY_MEMORY
        self.phased = bool(plan.options.get("phased", few or large))
        m_panels = self.panels if self.phased else 1
        tile_bytes = item * self.points * (self.depth + m_panels * self.width)
        if self.phased:
            rounds = -(-self.total // max(_FEW_TILES, _PHASED_BYTES // tile_bytes))
            self.tiles = -(-self.total // max(rounds, 1))
        else:
            most = min(max(_BLOCK_BYTES // tile_bytes, _FEW_TILES), _MANY_TILES)
            self.tiles = plan.options.get(
                "tiles", self._tiles(most, cores, u_bytes > _LARGE_U_BYTES)
            )
        # A register more between points, so that they do not fall on the same cache set.
        self.v_point = self.tiles * self.depth + lanes
        self.m_point = self.tiles * self.width + lanes
        self.scratch = self.points * (self.v_point + m_panels * self.m_point)

    def _tiles(self, most: int, cores: int, large: bool) -> int:
        """Tiles per fused block, at most `most`, that keep all cores busy and row blocks full."""
        rows = block_rows(self.vectors)
        streaming = _FEW_TILES if large else 4  # tiles multiplied in the time that U streams by

        def duration(tiles: int) -> int:
            blocks = -(-self.total // tiles)
            full, rest = divmod(tiles, rows)
            products = full * rows + min(rows, rest + 2 * (rest > 0))
            return -(-blocks // cores) * (max(products, streaming) + 2)  # 2: calls and tails

        return min(range(1, most + 1), key=lambda tiles: (duration(tiles), tiles))


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch, with as many threads as now at most."""
    return views_size(plan) + pieces_size(_own_sizes(_Schedule(plan)), plan.dtype)


def _own_sizes(schedule: _Schedule) -> list[int]:
    """Pieces of the workspace: V and M of all threads, the padded bias."""
    copies = 1 if schedule.phased else threads()
    return [schedule.scratch * copies, schedule.panels * schedule.width]


@dataclass(frozen=True)
class Packed:
    """Transformed weights U (panels, points, channels, width), the compiled stages, and the
    parameter block but for addresses."""

    u: np.ndarray
    schedule: _Schedule
    input: Kernel
    multiply: Kernel
    output: Kernel
    fused: Kernel
    params: tuple[int, ...]


def prepack(weights: np.ndarray, plan: Plan) -> Packed:
    """U = G g along every axis, computed in float64 and rounded once; and the compiled stages."""
    schedule, channels = _Schedule(plan), plan.geometry.in_channels
    u = panel_memory(schedule.panels, schedule.points, channels, schedule.width, dtype=plan.dtype)
    w = np.reshape(weights, plan.geometry.lifted().w_shape)
    for panel in range(schedule.panels):
        part = w[panel * schedule.width : (panel + 1) * schedule.width]
        u[panel, :, :, : part.shape[0]] = _transformed(part, schedule)
    spec, vectors = spec_of(schedule.transforms), schedule.vectors
    words, rows = epilogue_words(plan.epilogue), block_rows(vectors)
    return Packed(
        u,
        schedule,
        kernel(stages.input_kernel, plan.dtype, spec, schedule.order.index(2)),
        kernel(stages.multiply_kernel, plan.dtype, rows, vectors, schedule.points),
        kernel(stages.output_kernel, plan.dtype, spec, words, vectors),
        kernel(stages.fused_kernel),
        tuple(_fixed_params(plan, schedule)),
    )


def _transformed(w: np.ndarray, schedule: _Schedule) -> np.ndarray:
    """w (K, C, T, H, W) -> U (points, C, K) in float64."""
    u = w.astype(np.float64).transpose(1, 0, *(2 + axis for axis in schedule.order))
    for axis, t in enumerate(schedule.transforms, 2):
        u = apply_along(t.filter_program, u, axis)
    return u.reshape(*u.shape[:2], -1).transpose(2, 0, 1)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x by F(m, r) on every axis, and its epilogue, to y.

    x (N, C, *in_size), packed from `prepack` for the same plan, bias (K,) or None,
    residual (N, K, *out_size) or None, y (N, K, *out_size) written; memory as plan.layout says.

    Equivalent to `F.conv3d(x, w, bias, 1, padding)`.
    """
    if not y.size:
        return
    views = channels_last_views(plan, x, residual, y, workspace)
    params = _params(plan, packed, views, bias)
    if packed.schedule.phased:
        _run_phased(params, packed)
    else:
        parallel_for(packed.fused, params, -(-packed.schedule.total // packed.schedule.tiles))
    views.finish()


def _run_phased(params: list[int], packed: Packed) -> None:
    """All threads transform, then multiply, then transform back, a round of tiles at a time."""
    total, tiles = packed.schedule.total, packed.schedule.tiles
    for first in range(0, total, tiles):
        count = min(tiles, total - first)
        each = -(-count // (4 * threads()))
        blocks = -(-count // each)
        params[stages.FIRST_TILE], params[stages.TILES] = first, first + count
        params[stages.TILES_PER_ITEM] = params[stages.ROW_STEP] = each
        parallel_for(packed.input, params, blocks)
        params[stages.TILES_PER_ITEM] = count
        parallel_for(packed.multiply, params, packed.schedule.panels * packed.schedule.points)
        params[stages.TILES_PER_ITEM] = each
        parallel_for(packed.output, params, packed.schedule.panels * blocks)


def _params(plan: Plan, packed: Packed, views: Views, bias: np.ndarray | None) -> list[int]:
    """The parameter block of one call."""
    schedule, params = packed.schedule, list(packed.params)
    scratch, shift, _ = pieces(views.workspace, _own_sizes(schedule))
    if bias is not None:
        shift[: bias.size] = bias
        shift[bias.size :] = 0
    params[stages.X], params[stages.Y] = address(views.x), address(views.y)
    params[stages.RESIDUAL] = address(views.residual)
    params[stages.BIAS] = address(shift)
    params[stages.U] = address(packed.u)
    params[stages.V] = address(scratch)
    params[stages.M] = params[stages.V] + scratch.itemsize * schedule.points * schedule.v_point
    params[stages.INPUT_STAGE] = packed.input.address
    params[stages.MULTIPLY_STAGE] = packed.multiply.address
    params[stages.OUTPUT_STAGE] = packed.output.address
    return params


def _fixed_params(plan: Plan, schedule: _Schedule) -> list[int]:
    """The parameter block with what does not change from call to call."""
    geometry, item = plan.geometry.lifted(), np.dtype(plan.dtype).itemsize
    phased = schedule.phased
    params = [0] * (stages.AXES + 3 * stages.AXIS_FIELDS)
    params[stages.CHANNELS] = geometry.in_channels
    params[stages.OUT_CHANNELS] = geometry.out_channels
    params[stages.PANELS] = schedule.panels
    params[stages.TILES] = schedule.total
    params[stages.TILES_PER_ITEM] = schedule.tiles
    params[stages.TILES_PER_IMAGE] = prod(schedule.counts)
    params[stages.THREAD_STEP] = 0 if phased else item * schedule.scratch
    params[stages.V_STRIDE] = schedule.depth
    params[stages.V_POINT], params[stages.M_POINT] = schedule.v_point, schedule.m_point
    params[stages.M_PANEL] = schedule.points * schedule.m_point if phased else 0
    params[stages.POINT_GROUPS] = schedule.points if phased else 1
    params[stages.X_IMAGE] = geometry.in_channels * prod(geometry.in_size)
    params[stages.Y_IMAGE] = geometry.out_channels * prod(geometry.out_size)
    for i, axis in enumerate(schedule.order):
        after = slice(axis + 1, 3)
        fields = {
            stages.DIVISOR: prod(schedule.counts[after]),
            stages.COUNT: schedule.counts[axis],
            stages.PAD: geometry.padding[axis][0],
            stages.SIZE: geometry.in_size[axis],
            stages.OUT: geometry.out_size[axis],
            stages.X_STEP: geometry.in_channels * prod(geometry.in_size[after]),
            stages.Y_STEP: geometry.out_channels * prod(geometry.out_size[after]),
        }
        for field, value in fields.items():
            params[stages.AXES + i * stages.AXIS_FIELDS + field] = value
    return params
