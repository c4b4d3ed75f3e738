"""How Winograd convolution in C is cut into blocks: everything that follows from a plan and the
vector length before there are arrays.
"""

from __future__ import annotations

from math import prod

from ..epilogue import Epilogue
from ..geometry import Geometry
from ..plan import Plan
from ..transforms import transform
from . import launch
from .panels import block_rows, panel_vectors

# What blocks are chosen by, measured on an AVX-512 server CPU with 1 MB of second-level cache per
# core: multiplications per lane, and bytes, per nanosecond. A core reads U from the third-level
# cache or shares the memory's rate; V and M cost their transforms, and more where they are far.
_PRODUCTS, _CACHE_BYTES, _MEMORY_BYTES, _TRANSFORM_BYTES = 7.6, 36.0, 40.0, 40.0
_NOT_NEAR = ((1 << 18, 170.0), (7 << 18, 36.0))  # bytes of V and M beyond so many: bytes per ns
_LARGE = 16 << 20  # bytes that do not stay in the third-level cache
_BLOCK_NS, _STAGE_NS = 300.0, 5000.0  # beginning a block; starting and joining all threads
_MOST_TILES = 112  # of a fused block
_THREAD_BYTES, _PHASED_BYTES = 16 << 20, 64 << 20  # V and M of a fused block, of a phased round
# As many as OpenMP had at import: schedules must not change between packing and running.
_CORES = max(1, int(launch.lib.fc_max_threads()))


class Schedule:
    """What follows from a plan and the vector length before there are arrays; sizes in floats.

    axes, transforms  axes of the lifted geometry, those of a single point first, with F(m, r)
    phases            rows of U per channel on those axes: the phases of a strided axis; all taps
                      where m is 1, for a product sums them sooner than F(1, r) would
    counts, total     tiles per axis, in that order, and of the whole batch
    vectors, width    registers and columns per panel of output channels
    phased, tiles     tiles per block; if phased, per round of all threads
    shared, each      workspace of all threads together and of every thread
    """

    def __init__(self, plan: Plan, lanes: int) -> None:
        assert isinstance(plan.geometry, Geometry)
        geometry = self.geometry = plan.geometry.lifted()
        one = transform(1, 1)
        lifted = [one] * (3 - len(plan.transforms)) + list(plan.transforms)
        # Neither m outputs of one tap nor one output of many taps gain by points; but one axis has
        # some.
        fast = any(t.r > 1 and t.m > 1 for t in lifted)
        lifted = [t if t.r > 1 and (t.m > 1 or not fast) else one for t in lifted]
        self.axes = sorted(range(3), key=lambda axis: lifted[axis].alpha > 1)
        self.transforms = [lifted[axis] for axis in self.axes]
        self.split = [
            geometry.stride[a] if t.r > 1 else geometry.kernel[a]
            for a, t in zip(self.axes, self.transforms, strict=True)
        ]
        kernel = [geometry.kernel[a] for a in self.axes]
        self.phases = list(map(min, self.split, kernel))
        self.counts = [
            -(-geometry.out_size[a] // t.m) for a, t in zip(self.axes, self.transforms, strict=True)
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
        products = max(self._products_ns(tiles), weights) + 0.02 * weights
        transforms = self._bytes(tiles, self.panels) / _TRANSFORM_BYTES
        far = sum(max(0, self._bytes(tiles, 1) - near) / rate for near, rate in _NOT_NEAR)
        return -(-blocks // _CORES) * (products + transforms + far + _BLOCK_NS)

    def _phased_ns(self, tiles: int) -> float:
        products = max(self._products_ns(tiles), self._weights_ns(1)) / _CORES
        v_m = self._bytes(tiles, self.panels)
        transforms = v_m / _TRANSFORM_BYTES * (1.5 if v_m < _LARGE else 2.0) / _CORES
        return -(-self.total // tiles) * (products + transforms + 3 * _STAGE_NS)

    def params(self, plan: Plan) -> dict[str, object]:
        """An initialiser of fc_winograd."""
        geometry = self.geometry
        assert isinstance(plan.epilogue, Epilogue)
        # Tile numbers run as memory does, the last axis of the geometry fastest.
        order = [self.axes.index(axis) for axis in (2, 1, 0)]
        divisor = 1
        axes: list[dict[str, int]] = [{}, {}, {}]
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
                "kernel": geometry.kernel[axis],
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
