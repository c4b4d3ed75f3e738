"""The arithmetic of a convolution under an algorithm, from its geometry alone; nothing is run.

`multiplications` are those of the element-wise stage, which the papers compare; what the transforms
cost stands beside them. Taps on padding are counted, as the papers do. Bias, activation and
residual addition are not: they are the same under every algorithm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import prod
from typing import Protocol

from .errors import GeometryError, UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .plan import Plan
from .programs import Program
from .transforms import Transform, transform

DIRECT = ("direct", "grouped", "depthwise", "continual")  # a multiplication per multiply-accumulate
ALGORITHMS = (*DIRECT, "winograd", "hfa")
TILES = (2, 4)  # the m that float32 bears on three axes at once, see `transforms.amplification`
OTHER = "(other)"  # the row of what no listed layer holds
MAX_TAPS = 7  # axes with more taps per phase stay untransformed, m = 1
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
Number = int | Fraction  # a Fraction only where tiles are counted as fractions


@dataclass(frozen=True)
class Counts:
    """Operations and bytes of one run; counts add up with `+` and `sum`.

    macs                multiply-accumulates of the direct algorithm
    multiplications     of the element-wise stage (direct: equal to macs)
    transform_*         input and output transforms: multiplications by constants, additions and
                        subtractions, and shifts (multiplications by powers of two)
    filter_transform_*  the same for the filter transform, done once per weight, not in every run
    weight_bytes        the weights as the run reads them: transformed, for a fast algorithm
    activation_bytes    input, output and residual, each moved once
    """

    macs: int = 0
    multiplications: Number = 0
    transform_multiplications: Number = 0
    transform_additions: Number = 0
    transform_shifts: Number = 0
    filter_transform_multiplications: int = 0
    filter_transform_additions: int = 0
    filter_transform_shifts: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    @property
    def saving(self) -> Fraction:
        """1 - multiplications / macs: (m K - m - K + 1) / (m K) for F(m, K) on one axis.

        0 where there is nothing to do.
        """
        return 1 - Fraction(self.multiplications) / self.macs if self.macs else Fraction(0)

    @property
    def arithmetic_intensity(self) -> float:
        """2 * multiplications (each with its addition) per byte of weights and activations."""
        return float(2 * self.multiplications / (self.weight_bytes + self.activation_bytes or 1))

    def __add__(self, other: Counts) -> Counts:
        if not isinstance(other, Counts):
            return NotImplemented
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Counts(*(_whole(a + b) for a, b in pairs))  # type: ignore[arg-type]  # ints stay int

    def __radd__(self, zero: int) -> Counts:
        return self if zero == 0 else NotImplemented  # where sum() starts


def count(
    geometry: Geometry | SeparableGeometry,
    algorithm: str = "direct",
    transforms: Sequence[Transform] = (),
    dtype: str = "float32",
    whole_tiles: bool = True,
    residual: bool = False,
) -> Counts:
    """The counts of one run of a convolution or of a fully separable block.

    algorithm    'direct', 'grouped', 'depthwise' and 'continual' (geometry: the window of one
                 output column) multiply once per multiply-accumulate; 'winograd' is for a Geometry,
                 'hfa' for a SeparableGeometry
    transforms   winograd: F(m, ceil(kernel / stride)) per axis; continual: the same, with m = 1 in
                 time, or empty; hfa: (temporal, height, width); else empty
    dtype        of weights and activations, for the bytes
    whole_tiles  True: the last tile of an axis counts whole, as it is executed; False: as the
                 fraction that is used, the ideal of the papers
    residual     whether an array like the output is read and added

    A separable block under 'direct' runs as three convolutions, which write and read the
    activations between them; under 'hfa' these are never moved.

    Raises GeometryError for transforms that do not fit, UnsupportedError for what is not counted.
    """
    if dtype not in ELEMENT_BYTES:
        raise UnsupportedError(f"count: dtype {dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
    if algorithm not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise UnsupportedError(f"count: unknown algorithm {algorithm!r}. Known: {known}")
    stages = geometry.stages if isinstance(geometry, SeparableGeometry) else (geometry,)
    moved: Sequence[Geometry | SeparableGeometry] = stages if algorithm in DIRECT else (geometry,)
    per_stage = _stage_transforms(stages, algorithm, tuple(transforms))
    parts = [
        _fast(stage, chosen, dtype, whole_tiles) if chosen else _direct(stage, dtype)
        for stage, chosen in zip(stages, per_stage, strict=True)
    ]
    elements = sum(prod(g.x_shape) + prod(g.y_shape) for g in moved)
    elements += residual * prod(geometry.y_shape)
    return replace(sum(parts, Counts()), activation_bytes=elements * ELEMENT_BYTES[dtype])


def of_plan(plan: Plan) -> Counts:
    """The counts of one run of a plan: whole tiles, and the residual if its epilogue adds one."""
    last = plan.epilogue[-1] if isinstance(plan.epilogue, tuple) else plan.epilogue
    g = plan.geometry
    if plan.family == "winograd" and isinstance(g, Geometry) and g.groups > 1:
        counts = fast_counts(g, plan.transforms, plan.dtype, whole_tiles=True)
        added = last.residual * prod(g.y_shape) * ELEMENT_BYTES[plan.dtype]
        return replace(counts, activation_bytes=counts.activation_bytes + added)
    return count(plan.geometry, plan.family, plan.transforms, plan.dtype, residual=last.residual)


def taps_per_phase(geometry: Geometry) -> tuple[int, ...]:
    """The r of each axis's F(m, r): ceil(kernel / stride), as a strided axis is split in phases."""
    return tuple(-(-k // s) for k, s in zip(geometry.kernel, geometry.stride, strict=True))


def winograd_refusal(geometry: Geometry) -> str | None:
    """None, or why Winograd's algorithm does not serve a geometry."""
    if geometry.groups != 1:
        return f"winograd is for one group, not {geometry.groups}"
    if any(d != 1 for d in geometry.dilation):
        return f"winograd is for dilation 1, not {geometry.dilation}"
    return None


def _stage_transforms(
    stages: tuple[Geometry, ...], algorithm: str, transforms: tuple[Transform, ...]
) -> list[tuple[Transform, ...]]:
    """Transforms per stage, checked against the geometry; () for a stage that stays direct."""
    if algorithm in DIRECT and not (algorithm == "continual" and transforms):
        if transforms:
            raise GeometryError(
                f"count: algorithm {algorithm!r} takes no transforms, got {len(transforms)}"
            )
        return [()] * len(stages)
    if (algorithm == "hfa") != (len(stages) == 3):
        raise UnsupportedError("count: 'hfa' is for a SeparableGeometry, 'winograd' for a Geometry")
    reason = winograd_refusal(stages[0])
    if reason:
        raise UnsupportedError(f"count: {reason}")
    needed = taps_per_phase(stages[0])
    if algorithm == "hfa":
        needed = (needed[0], *taps_per_phase(stages[1])[1:])
    got = tuple(t.r for t in transforms)
    if got != needed:
        raise GeometryError(
            f"count: {algorithm} needs transforms F(m, r) with r = {needed}, got r = {got}"
        )
    if algorithm != "hfa":
        return [transforms]
    one = transform(1, 1)
    return [(transforms[0], one, one), (one, *transforms[1:]), ()]


def fast_counts(
    geometry: Geometry, transforms: Sequence[Transform], dtype: str, whole_tiles: bool
) -> Counts:
    """F(m, r) nested over the axes, any number of groups: arithmetic that may have no kernel.

    transforms  F(m, ceil(kernel / stride)) per axis
    """
    counts = _fast(geometry, tuple(transforms), dtype, whole_tiles)
    moved = prod(geometry.x_shape) + prod(geometry.y_shape)
    return replace(counts, activation_bytes=moved * ELEMENT_BYTES[dtype])


def _direct(geometry: Geometry, dtype: str) -> Counts:
    return Counts(
        macs=geometry.macs,
        multiplications=geometry.macs,
        weight_bytes=prod(geometry.w_shape) * ELEMENT_BYTES[dtype],
    )


def _fast(
    geometry: Geometry, transforms: tuple[Transform, ...], dtype: str, whole_tiles: bool
) -> Counts:
    """F(m, r) nested over the axes, any number of groups.

    The phases of strided axes are summed before the output transform; a phase without taps
    (stride > kernel) does not exist.
    """
    phases = prod(map(min, geometry.stride, geometry.kernel))
    tiles = geometry.batch * prod(
        -(-o // t.m) if whole_tiles else Fraction(o, t.m)
        for o, t in zip(geometry.out_size, transforms, strict=True)
    )
    points = prod(t.alpha for t in transforms)
    filters = phases * prod(geometry.w_shape[:2])
    inputs, outputs = phases * geometry.in_channels, geometry.out_channels
    multiplications, additions, shifts = (
        _whole(tiles * (inputs * into + outputs * out))
        for into, out in zip(
            _nested([t.input_program for t in transforms]),
            _nested([t.output_program for t in transforms]),
            strict=True,
        )
    )
    per_filter = _nested([t.filter_program for t in transforms])
    return Counts(
        macs=geometry.macs,
        multiplications=_whole(tiles * filters * points),
        transform_multiplications=multiplications,
        transform_additions=additions,
        transform_shifts=shifts,
        filter_transform_multiplications=filters * per_filter[0],
        filter_transform_additions=filters * per_filter[1],
        filter_transform_shifts=filters * per_filter[2],
        weight_bytes=filters * points * ELEMENT_BYTES[dtype],
    )


def _nested(programs: Sequence[Program]) -> list[int]:
    """Multiplications, additions and shifts of one program per axis in turn, on one tile."""
    extent = [p.inputs for p in programs]
    total = [0, 0, 0]
    for axis, p in enumerate(programs):
        extent[axis] = len(p.results)
        runs = prod(extent[:axis] + extent[axis + 1 :])
        cost = (p.multiplications, p.additions, p.shifts)
        total = [t + runs * c for t, c in zip(total, cost, strict=True)]
    return total


def _whole(number: Number) -> Number:
    """An int wherever the value is one."""
    return number.numerator if number.denominator == 1 else number


class Layer(Protocol):
    """What is read of a `fastconv.nn.trace.Layer`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def x_shape(self) -> tuple[int, ...]: ...
    @property
    def w_shape(self) -> tuple[int, ...]: ...
    @property
    def y_shape(self) -> tuple[int, ...]: ...
    @property
    def bias(self) -> bool: ...
    @property
    def macs(self) -> int: ...
    @property
    def geometry(self) -> Geometry | None: ...


@dataclass(frozen=True)
class Row:
    """One call of a layer of a network, or the sum of all.

    geometry    None for a linear layer, a convolution that no algorithm here serves, and sums
    algorithm   what `counts` are of; the direct algorithm has `counts.macs` multiplications
    parameters  weights and biases; 0 for a layer that was called before
    """

    name: str
    kind: str
    geometry: Geometry | None
    w_shape: tuple[int, ...]
    algorithm: str
    parameters: int
    counts: Counts


def network_counts(
    layers: Iterable[Layer],
    tiles: Sequence[int] = TILES,
    plans: Mapping[str, Plan] | None = None,
    dtype: str = "float32",
    whole_tiles: bool = True,
    parameters: int | None = None,
) -> list[Row]:
    """A row per layer call, in order, and last the row 'total'.

    layers      what `fastconv.nn.trace.trace` lists
    tiles       the m allowed on an axis, besides 1; () keeps every layer direct
    plans       by layer name, the plan that runs it; other layers get `fewest_multiplications`
    parameters  of the whole model: what no listed layer holds (batch norms, say) becomes the row
                OTHER
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for layer in layers:
        plan = (plans or {}).get(layer.name)
        if plan is not None:
            algorithm, counts = plan.algorithm, of_plan(plan)
        elif layer.geometry is not None:
            transforms = fewest_multiplications(layer.geometry, tuple(tiles), whole_tiles)
            family = "winograd" if transforms else "direct"
            algorithm = algorithm_name(layer.geometry, transforms)
            counts = count(layer.geometry, family, transforms, dtype, whole_tiles)
        else:
            algorithm, counts = "direct", _without_geometry(layer, dtype)
        held = 0 if layer.name in seen else _parameters(layer)
        seen.add(layer.name)
        rows.append(
            Row(layer.name, layer.kind, layer.geometry, layer.w_shape, algorithm, held, counts)
        )
    held = sum(row.parameters for row in rows)
    if parameters is not None and parameters != held:
        rows.append(Row(OTHER, "other", None, (), "", parameters - held, Counts()))
        held = parameters
    whole = sum((row.counts for row in rows), Counts())
    return [*rows, Row("total", "total", None, (), "", held, whole)]


@lru_cache(maxsize=1024)
def fewest_multiplications(
    geometry: Geometry, tiles: tuple[int, ...] = TILES, whole_tiles: bool = True
) -> tuple[Transform, ...]:
    """The F(m, r) per axis, m = 1 or one of `tiles`, with which Winograd multiplies least.

    Multiplications of the input and output transforms included; among equals the fewest additions
    and shifts. () where none takes fewer than the direct algorithm.
    """
    if winograd_refusal(geometry):
        return ()
    best: tuple[Transform, ...] = ()
    least: tuple[Number, Number] = (geometry.macs, 0)
    taps = taps_per_phase(geometry)
    for ms in product(*((1, *tiles) if 1 < r <= MAX_TAPS else (1,) for r in taps)):
        transforms = tuple(map(transform, ms, taps))
        c = count(geometry, "winograd", transforms, whole_tiles=whole_tiles)
        cost = (
            c.multiplications + c.transform_multiplications,
            c.transform_additions + c.transform_shifts,
        )
        if cost < least:
            best, least = transforms, cost
    return best


def algorithm_name(
    geometry: Geometry | SeparableGeometry, transforms: tuple[Transform, ...]
) -> str:
    """As `Plan.algorithm` writes it: 'direct' without transforms, else e.g. 'winograd F(2, 3)'."""
    fast = "hfa" if isinstance(geometry, SeparableGeometry) else "winograd"
    family = fast if transforms else "direct"
    return Plan(family, "reference", geometry, transforms=transforms).algorithm


def _parameters(layer: Layer) -> int:
    outputs = layer.w_shape[0] if layer.kind == "linear" else layer.y_shape[1]
    return prod(layer.w_shape) + layer.bias * outputs


def _without_geometry(layer: Layer, dtype: str) -> Counts:
    moved = prod(layer.x_shape) + prod(layer.y_shape)
    return Counts(
        macs=layer.macs,
        multiplications=layer.macs,
        weight_bytes=prod(layer.w_shape) * ELEMENT_BYTES[dtype],
        activation_bytes=moved * ELEMENT_BYTES[dtype],
    )
