"""`python -m fastconv count`: what networks and single layers cost, as a table, CSV or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from . import notation
from .algorithms import compare
from .count_forms import Line, Report, total_choices, write
from .counts import (
    MAX_TAPS,
    OTHER,
    TILES,
    Counts,
    Row,
    algorithm_name,
    count,
    fewest_multiplications,
    network_counts,
    taps_per_phase,
    winograd_refusal,
)
from .errors import UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .notation import layer_text, parse_layer
from .targets import Target, is_factory, load
from .transforms import Transform, transform

if TYPE_CHECKING:
    from .nn.trace import Layer

__all__ = ["HELP", "RULES", "Options", "layer_text", "parse_layer", "report", "run"]

# The rules of fastconv.nn.rules, which needs PyTorch.
RULES = ("thop", "thop-2019", "ptflops", "mfnet")
HELP = f"""\
NETWORK is a name of fastconv.zoo, counted for the clip of its paper, or for another one:
  x3d_m      c3d@64x112x112      (frames x height x width)
Any model of PyTorch is counted that PACKAGE.MODULE:FACTORY makes without arguments, or is:
  package.module:factory@3x16x224x224              (channels x frames x height x width)

{notation.HELP}
A layer of a network is counted under the tiles with the fewest multiplications, whole tiles as they
are executed; a single layer under each algorithm. Columns: MACs, the multiplications of the direct
algorithm; mults, those of the chosen one; t.add, t.shift and t.mult, additions, multiplications by
powers of two and by other constants in the input and output transforms; weights, as transformed;
ops/byte, 2 * mults per byte of weights and activations, each moved once. Then the multiplications
if all layers were transformed alike, where that changes them: winograd over time (1D), space (2D)
or both (3D), and hfa, the hybrid fast algorithm of arXiv 1905.13388.

Rules are what published tables were counted with; they count more than multiplications, by hooking
modules: thop and thop-2019 (before a correction) Kopuklu et al., ptflops Hedegaard and Iosifidis,
mfnet Chen et al."""


@dataclass(frozen=True)
class Options:
    """How to count.

    tiles        outputs per tile allowed on an axis
    whole_tiles  False: the last tile of an axis counts as the fraction used, as papers do
    per_frame    one step of a stream, in which every layer has one frame of output
    rule         one of RULES besides, or ''
    """

    tiles: tuple[int, ...] = TILES
    whole_tiles: bool = True
    per_frame: bool = False
    rule: str = ""


def run(targets: Sequence[str], form: str, options: Options = Options()) -> str:
    """Count networks and layers and write them in one of count_forms.FORMS.

    Raises GeometryError or UnsupportedError for a target that is neither, BackendError for a
    network without PyTorch.
    """
    return write([report(target, options) for target in targets], form)


def report(target: str, options: Options = Options()) -> Report:
    """The counts of one network or layer."""
    from .zoo import NETWORKS

    if is_factory(target) or target.split("@")[0] in NETWORKS:
        return of_network(target, load(target), options)
    if ":" in target:
        if options.rule:
            raise UnsupportedError(f"count: rules are for networks, not for {target!r}")
        geometry = parse_layer(target)
        rows = _algorithms(geometry, options)
        return Report(target, "under each algorithm", [Line(row) for row in rows])
    raise UnsupportedError(
        f"count: {target!r} is neither a network nor a layer. Networks: "
        f"{', '.join(sorted(NETWORKS))}; a layer is written like {notation.EXAMPLE}"
    )


def of_network(title: str, target: Target, options: Options) -> Report:
    """The counts of a model, layer by layer, and their total.

    Raises UnsupportedError for one step of a network that cannot be continual.
    """
    layers: Sequence[Layer] = target.layers()
    note = f"{target.note}, float32"
    if options.per_frame:
        from .nn.trace import one_step

        _check_continual(target)
        layers, note = [one_step(layer) for layer in layers], f"{note}, one step of a stream"
    *rows, total = network_counts(
        layers, options.tiles, None, "float32", options.whole_tiles, target.parameters
    )
    of_layers, rest = _operations(target, options)
    lines = []
    for row in rows:
        if row.name == OTHER:
            lines.append(Line(row, {}, rest))
            continue
        direct = row.counts if row.geometry is None else count(row.geometry)
        choices = compare(row.geometry, direct, options.tiles, "float32", options.whole_tiles)
        lines.append(Line(row, choices, next(of_layers, 0)))
    if rest and rows[-1].name != OTHER:
        lines.append(Line(Row(OTHER, "other", None, (), "", 0, Counts()), {}, rest))
    whole = sum(line.operations for line in lines)
    return Report(title, note, [*lines, Line(total, total_choices(lines), whole)], options.rule)


def _check_continual(target: Target) -> None:
    """Raises UnsupportedError for a network for clips that cannot take them frame by frame."""
    if target.x.dim() != 5:
        return
    from .nn.to_continual import to_continual

    try:
        to_continual(target.model, target.x)
    except UnsupportedError as error:
        raise UnsupportedError(f"count: {target.name} has no step of a stream: {error}") from error


def _operations(target: Target, options: Options) -> tuple[Iterator[int], int]:
    """By the rule: of each call of a layer in order, and of everything else together."""
    if not options.rule:
        return iter(()), 0
    from .nn.rules import calls, operations, step_operations

    if not options.per_frame:
        counted = operations(calls(target.model, target.x), options.rule, target.exceptions)
    elif options.rule == "ptflops":
        counted = step_operations(calls(target.model, target.x), target.exceptions)
    else:
        raise UnsupportedError(f"count: only rule ptflops counts steps, not {options.rule}")
    of_layers = [number for call, number in counted if call.is_layer]
    return iter(of_layers), sum(number for _, number in counted) - sum(of_layers)


def _algorithms(geometry: Geometry | SeparableGeometry, options: Options) -> list[Row]:
    """The direct algorithm, each tile alike on all axes, and the fewest multiplications."""
    choices: list[tuple[Transform, ...]] = []
    stages: tuple[Geometry, ...]
    tiles, whole = options.tiles, options.whole_tiles
    if isinstance(geometry, SeparableGeometry):
        fast, plain, stages = "hfa", None, geometry.stages
        (time, _, _), (_, *space) = map(taps_per_phase, stages[:2])
        choices = [(*_tile(m1, [time]), *_tile(m2, space)) for m1, m2 in product(tiles, repeat=2)]
    else:
        fast, plain, stages = "winograd", geometry, (geometry,)
        if winograd_refusal(geometry) is None:
            choices = [_tile(m, taps_per_phase(geometry)) for m in tiles]
            choices.append(fewest_multiplications(geometry, tiles, whole))
    faster = [transforms for transforms in choices if any(t.m > 1 for t in transforms)]
    parameters = sum(prod(stage.w_shape) for stage in stages)
    rows = []
    for transforms in dict.fromkeys([(), *faster]):
        counts = count(geometry, fast if transforms else "direct", transforms, whole_tiles=whole)
        name = algorithm_name(geometry, transforms)
        rows.append(Row("", "conv", plain, (), name, parameters, counts))
    return rows


def _tile(m: int, taps: Sequence[int]) -> tuple[Transform, ...]:
    """F(m, r) on every axis that can have it, F(1, r) on the others."""
    return tuple(transform(m if 1 < r <= MAX_TAPS else 1, r) for r in taps)
