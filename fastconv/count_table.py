"""`python -m fastconv count`: what networks and single layers cost, as a table, CSV or JSON."""

from __future__ import annotations

import csv
import inspect
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from typing import Any

from .counts import (
    MAX_TAPS,
    Number,
    Row,
    algorithm_name,
    count,
    fewest_multiplications,
    network_counts,
    taps_per_phase,
    winograd_refusal,
)
from .errors import BackendError, GeometryError, UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .transforms import Transform, transform

FORMS = ("table", "csv", "json")
HELP = """\
NETWORK is a name of fastconv.zoo, counted for the clip of its paper, or for another one:
  x3d_m      c3d@64x112x112      (frames x height x width)

LAYER is CONV:CHANNELS:KERNEL@SIZE, then in any order the options s stride, p padding (default 0),
d dilation, g groups, n batch (default 1); one number serves every axis:
  conv3d:64-128:3x3x3@16x56x56:p1              64 to 128 channels on 16 frames of 56 x 56
  conv3d:54-54:3x3x3@16x112x112:s1x2x2:p1:g54  depthwise, strided in space
  conv2d:16-32:3x3@56x56:psame                 padding by name: psame, pvalid
  conv1d:8-8:4@100:p1+2                        one zero in front, two behind
  separable:64-64-128:3x3x3@16x56x56           temporal, depthwise, pointwise (default psame)

A layer of a network is counted under the tiles with the fewest multiplications, whole tiles as they
are executed; a single layer under each algorithm. Columns: MACs, the multiplications of the direct
algorithm; mults, those of the chosen one; t.add, t.shift and t.mult, additions, multiplications by
powers of two and by other constants in the input and output transforms; weights, as transformed;
ops/byte, 2 * mults per byte of weights and activations, each moved once."""

_LAYER = re.compile(r"(conv[123]d|separable):(\d+(?:-\d+)+):([\dx]+)@([\dx]+)((?::[spdgn][^:]+)*)")
_EXAMPLE = "conv3d:64-128:3x3x3@16x56x56:p1"
_COLUMNS = ("layer", "convolution", "algorithm", "params", "MACs", "mults", "saved",
            "t.add", "t.shift", "t.mult", "weights", "activ.", "ops/byte")  # fmt: skip
_TEXT_COLUMNS = 3


@dataclass(frozen=True)
class Report:
    """One target's rows; `note` says what was counted."""

    target: str
    note: str
    rows: list[Row]


def run(targets: Sequence[str], form: str, tiles: tuple[int, ...]) -> str:
    """Count networks and layers and write them in one of FORMS.

    Raises GeometryError or UnsupportedError for a target that is neither, BackendError for a
    network without PyTorch.
    """
    reports = [report(target, tiles) for target in targets]
    if form == "json":
        return json.dumps(
            [
                {"target": r.target, "note": r.note, "rows": [_record(row) for row in r.rows]}
                for r in reports
            ],
            indent=1,
        )
    if form == "csv":
        return _csv(reports)
    return "\n\n".join(_table(r) for r in reports)


def report(target: str, tiles: tuple[int, ...]) -> Report:
    """The counts of one network or layer."""
    from .zoo import NETWORKS

    name = target.split("@")[0]
    if name in NETWORKS:
        return _network(target, tiles)
    if ":" in target:
        geometry = parse_layer(target)
        return Report(target, "under each algorithm", _algorithms(geometry, tiles))
    raise UnsupportedError(
        f"count: {target!r} is neither a network nor a layer. Networks: "
        f"{', '.join(sorted(NETWORKS))}; a layer is written like {_EXAMPLE}"
    )


def parse_layer(text: str) -> Geometry | SeparableGeometry:
    """The geometry that a LAYER (see HELP) stands for. Raises GeometryError."""
    match = _LAYER.fullmatch(text)
    if match is None:
        raise GeometryError(f"count: layer {text!r} is not written like {_EXAMPLE} (see --help)")
    kind, channels, kernel, size, rest = match.groups()
    options = [option for option in rest.split(":") if option]
    given = {option[0]: _option(text, option) for option in options}
    if len(given) != len(options):
        raise GeometryError(f"count: layer {text!r} has an option twice")
    cs, ks, extent = _integers(text, channels, "-"), _integers(text, kernel), _integers(text, size)
    separable = kind == "separable"
    n, widths = (3, 3) if separable else (int(kind[4]), 2)
    if (len(ks), len(extent), len(cs)) != (n, n, widths):
        raise GeometryError(f"count: {kind} needs {widths} channels and {n} extents, got {text!r}")
    if separable and not given.keys().isdisjoint("dg"):
        raise GeometryError(f"count: separable takes no dilation and no groups, got {text!r}")
    (groups,), (batch,) = given.get("g", (1,)), given.get("n", (1,))
    stride, padding = given.get("s", 1), given.get("p", "same" if separable else 0)
    x_shape = (batch, cs[0], *extent)
    if separable:
        wt, wd = (cs[1], cs[0], ks[0], 1, 1), (cs[1], 1, 1, *ks[1:])
        return SeparableGeometry.of(x_shape, wt, wd, (cs[2], cs[1], 1, 1, 1), stride, padding)
    w_shape = (cs[1], cs[0] // max(groups, 1), *ks)
    if isinstance(padding, tuple) and len(padding) == 1:
        padding *= n  # one (before, after) serves every axis
    return Geometry.of(x_shape, w_shape, stride, padding, given.get("d", 1), groups)


def layer_text(geometry: Geometry) -> str:
    """The LAYER that `parse_layer` reads as this geometry."""

    def option(letter: str, values: Sequence[Any], default: Any) -> str:
        if all(value == default for value in values):
            return ""
        return f":{letter}{_by_x(values[:1] if len(set(values)) == 1 else values)}"

    g = geometry
    padding = [
        str(before) if before == after else f"{before}+{after}" for before, after in g.padding
    ]
    parts = (
        f"conv{g.n}d:{g.in_channels}-{g.out_channels}:{_by_x(g.kernel)}@{_by_x(g.in_size)}",
        option("s", g.stride, 1),
        option("p", padding, "0"),
        option("d", g.dilation, 1),
        option("g", [g.groups], 1),
        option("n", [g.batch], 1),
    )
    return "".join(parts)


def _by_x(values: Sequence[Any]) -> str:
    return "x".join(map(str, values))


def _integers(text: str, values: str, separator: str = "x") -> tuple[int, ...]:
    parts = values.split(separator)
    if not all(part.isdecimal() for part in parts):
        raise GeometryError(
            f"count: expected whole numbers joined by {separator!r}, got {values!r} in {text!r}"
        )
    return tuple(map(int, parts))


def _option(text: str, option: str) -> Any:
    letter, value = option[0], option[1:]
    if letter == "p" and value in ("same", "valid"):
        return value
    if letter == "p" and "+" in value:
        pairs = [_integers(text, part, "+") for part in value.split("x")]
        if max(map(len, pairs)) > 2:
            raise GeometryError(
                f"count: expected padding BEFORE+AFTER per axis, got {option!r} in {text!r}"
            )
        return tuple((pair[0], pair[-1]) for pair in pairs)
    numbers = _integers(text, value)
    if letter in "gn" and len(numbers) != 1:
        raise GeometryError(f"count: expected one whole number, got {option!r} in {text!r}")
    return numbers


def _network(target: str, tiles: tuple[int, ...]) -> Report:
    """A network of the zoo, counted under the tiles with the fewest multiplications."""
    model, layers, size = traced(target)
    parameters = sum(p.numel() for p in model.parameters())
    rows = network_counts(layers, tiles, parameters=parameters)
    return Report(target, f"input 1x{_by_x(size)}, float32", rows)


def traced(target: str) -> tuple[Any, list[Any], tuple[int, ...]]:
    """A network of the zoo, its layers and its (C, T, H, W), all on the `meta` device.

    target: NETWORK or NETWORK@FRAMESxHEIGHTxWIDTH; nothing is computed

    Raises BackendError without PyTorch, GeometryError for a clip that the network does not take.
    """
    try:
        import torch

        from .nn.trace import trace
        from .zoo import NETWORKS
    except ImportError as error:
        raise BackendError(
            f"count: {target} needs PyTorch, which is not installed: pip install 'fastconv[torch]'"
        ) from error

    name, _, size = target.partition("@")
    network = NETWORKS[name]
    channels, *clip = network.input_shape
    if size:
        clip = list(_integers(target, size))
        if len(clip) != 3 or min(clip) < 1:
            raise GeometryError(f"count: expected {name}@FRAMESxHEIGHTxWIDTH, got {target!r}")
    takes_clip = "clip" in inspect.signature(network.builder).parameters
    try:
        with torch.device("meta"):
            model = network.builder(**({"clip": tuple(clip)} if takes_clip else {}))
            layers = trace(model, torch.empty(1, channels, *clip))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise GeometryError(f"count: {name} does not take {_by_x(clip)}: {reason}") from error
    return model, layers, (channels, *clip)


def _algorithms(geometry: Geometry | SeparableGeometry, tiles: tuple[int, ...]) -> list[Row]:
    """The direct algorithm, each tile alike on all axes, and the fewest multiplications."""
    choices: list[tuple[Transform, ...]] = []
    stages: tuple[Geometry, ...]
    if isinstance(geometry, SeparableGeometry):
        fast, plain, stages = "hfa", None, geometry.stages
        (time, _, _), (_, *space) = map(taps_per_phase, stages[:2])
        choices = [(*_tile(m1, [time]), *_tile(m2, space)) for m1, m2 in product(tiles, repeat=2)]
    else:
        fast, plain, stages = "winograd", geometry, (geometry,)
        if winograd_refusal(geometry) is None:
            choices = [_tile(m, taps_per_phase(geometry)) for m in tiles]
            choices.append(fewest_multiplications(geometry, tiles))
    faster = [transforms for transforms in choices if any(t.m > 1 for t in transforms)]
    parameters = sum(prod(stage.w_shape) for stage in stages)
    rows = []
    for transforms in dict.fromkeys([(), *faster]):
        counts = count(geometry, fast if transforms else "direct", transforms)
        name = algorithm_name(geometry, transforms)
        rows.append(Row("", "conv", plain, (), name, parameters, counts))
    return rows


def _tile(m: int, taps: Sequence[int]) -> tuple[Transform, ...]:
    """F(m, r) on every axis that can have it, F(1, r) on the others."""
    return tuple(transform(m if 1 < r <= MAX_TAPS else 1, r) for r in taps)


def _record(row: Row) -> dict[str, Any]:
    return {
        "layer": row.name,
        "kind": row.kind,
        "convolution": _convolution(row),
        "algorithm": row.algorithm,
        "parameters": row.parameters,
        **asdict(row.counts),
        "saving": float(row.counts.saving),
        "arithmetic_intensity": row.counts.arithmetic_intensity,
    }


def _csv(reports: Sequence[Report]) -> str:
    records = [{"target": r.target, **_record(row)} for r in reports for row in r.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().rstrip("\n")


def _convolution(row: Row) -> str:
    if row.geometry is not None:
        return layer_text(row.geometry)
    if row.kind == "linear":
        return f"linear {row.w_shape[1]}-{row.w_shape[0]}"
    return _by_x(row.w_shape)


def _table(report: Report) -> str:
    lines = [_COLUMNS, *map(_cells, report.rows)]
    of_network = report.rows[-1].kind == "total"
    columns = [
        _aligned(column, left=number < _TEXT_COLUMNS)
        for number, column in enumerate(zip(*lines, strict=True))
        # The rows of a single layer are all the same convolution.
        if any(column[1:]) and (of_network or column[0] != "convolution")
    ]
    text = [f"{report.target}: {report.note}"]
    text += ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    if of_network:
        text += ["", *_summary(report.rows[-1])]
    return "\n".join(text)


def _aligned(column: Sequence[str], left: bool) -> list[str]:
    width = max(map(len, column))
    return [cell.ljust(width) if left else cell.rjust(width) for cell in column]


def _cells(row: Row) -> tuple[str, ...]:
    c = row.counts
    return (
        row.name,
        _convolution(row),
        row.algorithm,
        _short(row.parameters),
        _short(c.macs),
        _short(c.multiplications),
        f"{float(c.saving):.1%}" if c.multiplications != c.macs else "",
        _short(c.transform_additions),
        _short(c.transform_shifts),
        _short(c.transform_multiplications),
        _short(c.weight_bytes, "B"),
        _short(c.activation_bytes, "B"),
        f"{c.arithmetic_intensity:.1f}" if c.macs else "",
    )


def _summary(total: Row) -> list[str]:
    """The total, exactly."""
    c = total.counts
    once = (
        c.filter_transform_additions,
        c.filter_transform_shifts,
        c.filter_transform_multiplications,
    )
    values = {
        "parameters": total.parameters,
        "multiply-accumulates (direct)": c.macs,
        "multiplications": c.multiplications,
        "transform additions": c.transform_additions,
        "transform shifts": c.transform_shifts,
        "transform multiplications": c.transform_multiplications,
        "filter transforms, once": sum(once),
        "weight bytes": c.weight_bytes,
        "activation bytes": c.activation_bytes,
    }
    numbers = _aligned([f"{value:,}" for value in values.values()], left=False)
    return [f"{title:<31}{number}" for title, number in zip(values, numbers, strict=True)]


def _short(value: Number, unit: str = "") -> str:
    """Three digits and a prefix; nothing for 0."""
    if not value:
        return ""
    number, prefixes = float(value), iter(("k", "M", "G", "T", "P"))
    prefix = ""
    while number >= 999.5:
        number, prefix = number / 1000, next(prefixes, "E")
    digits = 0 if not prefix or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{prefix}{unit}"
