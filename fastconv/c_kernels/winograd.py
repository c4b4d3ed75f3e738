"""Minimal filtering F(m, r) per axis in C; a strided axis by the polyphase split.

Tiles go through three stages (Lavin and Gray 2016, section 4.1): V = BT d for every channel,
M = V U as one matrix product per point, y = AT M with the epilogue. A thread takes a block of few
tiles through all of them ("fused"), or all threads go through one stage after the other ("phased");
csrc/winograd.c. What follows from the plan is worked out here.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np

from ..epilogue import Epilogue
from ..errors import UnsupportedError
from ..geometry import Geometry
from ..plan import Plan
from ..transforms import Transform, apply_along, transform
from . import launch
from .panels import block_rows, panel_vectors

CONFIGS: tuple[dict[str, int], ...] = (
    {},
    {"tiles": 14},
    {"tiles": 28},
    {"tiles": 56},
    {"phased": 1},
)

# Of the compiled programs: F(m, r) in csrc/programs.h.
MOST_OUTPUTS, MOST_TAPS = 6, 7

# What blocks are chosen by, per core and nanosecond: multiplications per lane, bytes of the third
# cache level, and bytes of memory that all cores share; measured on an AVX-512 server CPU.
_PRODUCTS, _CACHE_BYTES, _MEMORY_BYTES = 7.6, 36.0, 40.0
_TRANSFORM_BYTES = 40.0  # of V and M, there and back
_SECOND_LEVEL, _LARGE = 1 << 20, 16 << 20  # bytes that stay in a core's cache, and in the shared one
_BLOCK_NS, _STAGE_NS = 1000.0, 5000.0  # beginning a block; starting and joining all threads
_MOST_TILES = 112  # of a fused block
_THREAD_BYTES, _PHASED_BYTES = 16 << 20, 64 << 20  # V and M of a fused block, of a phased round
# As many as OpenMP had at import: schedules must not change between packing and running.
_CORES = max(1, int(launch.lib.fc_max_threads()))


def supports(geometry: Geometry, dtype: str, epilogue: Epilogue) -> str | None:
    """None, or the reason against."""
    if geometry.groups != 1:
        return f"winograd is for one group, not {geometry.groups}"
    if any(d != 1 for d in geometry.dilation):
        return f"winograd is for dilation 1, not {geometry.dilation}"
    taps = _taps(geometry)
    if max(taps) == 1:
        return f"no axis of kernel {geometry.kernel} has more than one tap per phase"
    if max(taps) > MOST_TAPS:
        return (
            f"kernel {geometry.kernel} has more than {MOST_TAPS} taps per phase on an axis, for "
            "which no transform is compiled"
        )
    return launch.refuse_dtype(dtype)


def _taps(geometry: Geometry) -> list[int]:
    """Taps per phase of the polyphase split."""
    return [-(-k // s) for k, s in zip(geometry.kernel, geometry.stride, strict=True)]


def _check_compiled(transforms: tuple[Transform, ...]) -> None:
    for t in transforms:
        if t.r == 1:
            continue
        if t.m > MOST_OUTPUTS or t.r > MOST_TAPS:
            raise UnsupportedError(
                f"winograd on the C backend: F({t.m}, {t.r}) is not compiled; it has F(m, r) for "
                f"m up to {MOST_OUTPUTS} and r up to {MOST_TAPS}"
            )
        if t != transform(t.m, t.r):
            points = ", ".join(map(str, t.points))
            raise UnsupportedError(
                f"winograd on the C backend: F({t.m}, {t.r}) is compiled for the default points "
                f"only, not for {points}"
            )


class _Schedule:
    """What follows from a plan and the vector length before there are arrays; sizes in floats.

    axes, transforms  axes of the lifted geometry, those of a single point first, with F(m, r)
    counts, total     tiles per axis, in that order, and of the whole batch
    vectors, width    registers and columns per panel of output channels
    phased, tiles     tiles per block; if phased, per round of all threads
    shared, each      workspace of all threads together and of every thread
    """

    def __init__(self, plan: Plan, lanes: int) -> None:
        geometry = self.geometry = plan.geometry.lifted()
        one = transform(1, 1)
        lifted = [one] * (3 - len(plan.transforms)) + list(plan.transforms)
        lifted = [t if t.r > 1 else one for t in lifted]  # m outputs of one tap are m tiles
        self.axes = sorted(range(3), key=lambda axis: lifted[axis].alpha > 1)
        self.transforms = [lifted[axis] for axis in self.axes]
        self.phases = [min(geometry.stride[a], geometry.kernel[a]) for a in self.axes]
        self.counts = [
            -(-geometry.out_size[a] // t.m)
            for a, t in zip(self.axes, self.transforms, strict=True)
        ]
        self.points = prod(t.alpha for t in lifted)
        self.total = geometry.batch * prod(self.counts)
        self.vectors = panel_vectors(geometry.out_channels)
        self.width = self.vectors * lanes
        self.panels = -(-geometry.out_channels // self.width)
        self.depth = prod(self.phases) * geometry.in_channels
        # A tile's last vector of channels may reach over the end of its row.
        whole = -(-geometry.in_channels // lanes) * lanes
        self.v_row = launch.lines(self.depth - geometry.in_channels + whole)
        passes = sum(t.alpha > 1 for t in lifted)
        self.at_once = (16, 4, 1)[passes - 1]
        self.lines = launch.lines((self.points * max(self.at_once, self.vectors) + 1) * lanes)
        self._choose_tiles(plan.options)
        # A cache line more between points, so that they do not fall on the same cache set.
        self.v_point = self.tiles * self.v_row + launch.LINE
        self.m_point = launch.lines(self.tiles * self.width) + launch.LINE
        self.m_panel = self.points * self.m_point if self.phased else 0
        product = self.depth * self.width
        self.u_point = product * (self.panels if self.phased else 1)
        self.u_panel = product * (1 if self.phased else self.points)
        self.v_size = self.points * self.v_point
        self.m_size = self.points * self.m_point * (self.panels if self.phased else 1)
        both = self.v_size + self.m_size
        self.shared, self.each = (both, self.lines) if self.phased else (0, both + self.lines)

    def _choose_tiles(self, options: dict[str, int]) -> None:
        """Fused or phased, and tiles per block: what should take the shortest time."""
        if options.get("phased") or not self.total:
            fused: list[int] = []
        elif "tiles" in options:
            fused = [options["tiles"]]
        else:
            most = max(1, min(_THREAD_BYTES // self._bytes(1, 1), _MOST_TILES, self.total))
            fused = list(range(1, most + 1))
        best = min(fused, key=lambda tiles: (self._fused_ns(tiles), tiles), default=0)
        rounds = -(-self.total * self._bytes(1, self.panels) // _PHASED_BYTES)
        each = max(1, -(-self.total // max(rounds, 1)))
        if "tiles" in options or "phased" in options:
            self.phased = not best
        else:
            self.phased = not best or self._phased_ns(each) < self._fused_ns(best)
        self.tiles = each if self.phased else best
        self.group = max(1, min(8, -(-self.tiles // (4 * _CORES))))

    def _bytes(self, tiles: int, panels: int) -> int:
        """Of V and M."""
        return 4 * self.points * tiles * (self.v_row + panels * self.width)

    def _products_ns(self, tiles: int) -> float:
        """A core's time for the products of some tiles: in blocks of equal height, of which low
        ones wait for their weights, and all have their beginning and end."""
        blocks = -(-tiles // block_rows(self.vectors))
        rows = blocks * (max(-(-tiles // blocks), 5) + 1)
        return rows * self.points * self.depth * self.panels * self.vectors / _PRODUCTS

    def _weights_ns(self, sharing: int) -> float:
        """Time for reading U once while so many cores read theirs."""
        u_bytes = 4 * self.points * self.depth * self.width * self.panels
        return u_bytes * sharing / _MEMORY_BYTES if u_bytes > _LARGE else u_bytes / _CACHE_BYTES

    def _fused_ns(self, tiles: int) -> float:
        blocks = -(-self.total // tiles)
        weights = self._weights_ns(min(blocks, _CORES))
        products = max(self._products_ns(tiles), weights) + 0.1 * weights
        transforms = self._bytes(tiles, self.panels) / _TRANSFORM_BYTES
        spilt = max(0, self._bytes(tiles, 1) - _SECOND_LEVEL) / _CACHE_BYTES
        return -(-blocks // _CORES) * (products + transforms + spilt + _BLOCK_NS)

    def _phased_ns(self, tiles: int) -> float:
        products = max(self._products_ns(tiles), self._weights_ns(1)) / _CORES
        v_m = self._bytes(tiles, self.panels)
        transforms = v_m / _TRANSFORM_BYTES * (1.5 if v_m < _LARGE else 2.0) / _CORES
        return -(-self.total // tiles) * (products + transforms + 3 * _STAGE_NS)

    def params(self, plan: Plan) -> dict[str, object]:
        """An initialiser of fc_winograd."""
        geometry = self.geometry
        # Tile numbers run as memory does, the last axis of the geometry fastest.
        order = [self.axes.index(axis) for axis in (2, 1, 0)]
        divisor, axes = 1, [{} for _ in range(3)]
        for i in order:
            axis, t = self.axes[i], self.transforms[i]
            axes[i] = {
                "m": t.m,
                "r": t.r,
                "alpha": t.alpha,
                "tiles": self.counts[i],
                "divisor": divisor,
                "in_size": geometry.in_size[axis],
                "out_size": geometry.out_size[axis],
                "in_step": geometry.in_channels * prod(geometry.in_size[axis + 1 :]),
                "out_step": geometry.out_channels * prod(geometry.out_size[axis + 1 :]),
                "stride": geometry.stride[axis],
                "pad": geometry.padding[axis][0],
                "phases": self.phases[i],
            }
            divisor *= self.counts[i]
        return {
            "axis": axes,
            "order": order,
            "phased": self.phased,
            "activation": launch.activation_of(plan.epilogue),
            "vectors": self.vectors,
            "channels": geometry.in_channels,
            "out_channels": geometry.out_channels,
            "depth": self.depth,
            "points": self.points,
            "panels": self.panels,
            "in_image": geometry.in_channels * prod(geometry.in_size),
            "out_image": geometry.out_channels * prod(geometry.out_size),
            "tiles": self.total,
            "block": self.tiles,
            "group": self.group,
            "at_once": self.at_once,
            "v_row": self.v_row,
            "v_point": self.v_point,
            "m_point": self.m_point,
            "m_panel": self.m_panel,
            "u_point": self.u_point,
            "u_panel": self.u_panel,
            "v_size": self.v_size,
            "m_size": self.m_size,
            "lines": self.lines,
        }


@lru_cache(maxsize=4096)
def _sizes(plan: Plan, lanes: int) -> tuple[int, int]:
    schedule = _Schedule(plan, lanes)
    return schedule.shared, schedule.each


def workspace_size(plan: Plan) -> int:
    """Elements of plan.dtype that `run` needs as scratch, with as many threads as now at most."""
    return launch.workspace_elements(plan, *_sizes(plan, launch.lanes()))


def prepack(weights: np.ndarray, plan: Plan) -> launch.Packed:
    """U = G g along every axis, computed in float64 and rounded once: (panels, points,
    phases * channels, width), or with points first if phased.

    Raises UnsupportedError for transforms that are not compiled: other than the default points, or
    more outputs or taps than the largest.
    """
    _check_compiled(plan.transforms)
    schedule = _Schedule(plan, launch.lanes())
    w = np.reshape(weights, schedule.geometry.lifted().w_shape)
    # A product more behind the last: products ask for what follows the one they use.
    outer = (schedule.points, schedule.panels) if schedule.phased else (schedule.panels, schedule.points)
    chunk = schedule.depth * schedule.width
    store = launch.aligned((prod(outer) + 1) * chunk)
    u = store[:-chunk].reshape(*outer, schedule.depth, schedule.width)
    by_panel = u.swapaxes(0, 1) if schedule.phased else u
    for panel in range(schedule.panels):
        part = w[panel * schedule.width : (panel + 1) * schedule.width]
        by_panel[panel, :, :, : part.shape[0]] = _transformed(part, schedule)
    params = launch.ffi.new("fc_winograd *", schedule.params(plan))
    return launch.Packed(plan, store, params, schedule.shared, schedule.each)


def _transformed(w: np.ndarray, schedule: _Schedule) -> np.ndarray:
    """w (K, C, T, H, W) -> U (points, phases * C, K) in float64, phases in the order of the axes."""
    w = w.astype(np.float64).transpose(1, 0, *(2 + axis for axis in schedule.axes))
    strides = [schedule.geometry.stride[axis] for axis in schedule.axes]
    found = []
    for phase in np.ndindex(*schedule.phases):
        part = w[(..., *(slice(p, None, s) for p, s in zip(phase, strides, strict=True)))]
        for axis, t in enumerate(schedule.transforms, 2):
            missing = [(0, 0)] * 5
            missing[axis] = (0, t.r - part.shape[axis])
            part = apply_along(t.filter_program, np.pad(part, missing), axis)
        found.append(part.reshape(*part.shape[:2], -1).transpose(2, 0, 1))
    return np.concatenate(found, axis=1)


def run(plan, x, packed, bias, residual, y, workspace) -> None:
    """Write the convolution of x by F(m, r) on every axis, and its epilogue, to y.

    x (N, C, *in_size), packed from `prepack` for the same plan, bias (K,) or None,
    residual (N, K, *out_size) or None, y (N, K, *out_size) written; memory as plan.layout says.
    plan.transforms has one F(m, ceil(kernel / stride)) per axis.

    Equivalent to `F.conv3d(x, w, bias, stride, padding)`.
    """
    packed.run(x, bias, residual, y, workspace)
