"""What `explore` found, as text, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .count_forms import short
from .counts import Counts, algorithm_name
from .errors import UnsupportedError
from .explore import DIRECT, Design, Space, explore
from .notation import layer_text
from .targets import load

FORMS = ("table", "csv", "json")
TILES = (1, 2, 3, 4, 5, 6)
LIMIT = 4.0
HELP = """\
Every pair of tiles F(m1, K) over time and F(m2 x m2, R x R) over space is counted for the whole
network, a layer staying direct where its tiles would not multiply less. error is a bound: the rms
error of the worst layer's outputs over that of plain sums in the same precision, 1 for direct; bits
is how much longer stored transformed operands must be for the same error. The front is of pairs
that no other pair beats in both; the mixed plan lets every layer have its own pair. Strided axes
are split into phases, and layers of several groups are transformed too: that is arithmetic for
hardware, the kernels of this library do less."""


def run(
    target: str,
    form: str = "table",
    tiles: tuple[int, ...] = TILES,
    limit: float = LIMIT,
    whole_tiles: bool = True,
    plot: str | None = None,
) -> str:
    """Explore a network, write the plot if asked for, and answer in one of FORMS.

    Raises what `fastconv.targets.load` raises, UnsupportedError for a plot that cannot be made.
    """
    if plot:
        _check_plot(plot)
    title, space, names = of_network(target, tiles, whole_tiles)
    if plot:
        draw(title, space, limit, plot)
    if form == "table":
        return "\n".join(_text(title, space, names, limit))
    records = [_record("uniform", d) for d in space.uniform]
    records += [_record("mixed", d) for d in space.frontier]
    if form == "json":
        return json.dumps({"target": title, "limit": limit, "designs": records}, indent=1)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().rstrip("\n")


def of_network(
    target: str, tiles: tuple[int, ...], whole_tiles: bool
) -> tuple[str, Space, list[str]]:
    """What was explored, its designs, and the names of its convolutions."""
    from .counts import network_counts
    from .zoo import NETWORKS

    if "@" not in target and target not in NETWORKS:
        raise UnsupportedError(
            f"explore: {target!r} is no network. Networks: {', '.join(sorted(NETWORKS))}; any "
            "other model is written package.module:factory@3x16x224x224"
        )
    loaded = load(target)
    layers = loaded.layers()
    convolved = [layer for layer in layers if layer.geometry is not None]
    geometries = [layer.geometry for layer in convolved if layer.geometry is not None]
    others = [layer for layer in layers if layer.geometry is None]
    rest = network_counts(others, ())[-1].counts if others else Counts()
    space = explore(geometries, rest, tiles, whole_tiles)
    tile_kind = "whole" if whole_tiles else "ideal"
    title = f"{target}: {loaded.note}, {tile_kind} tiles"
    return title, space, [layer.name for layer in convolved]


def _record(kind: str, design: Design) -> dict[str, Any]:
    c = design.counts
    time, space = design.tiles or ("", "")
    return {
        "kind": kind,
        "m1": time,
        "m2": space,
        "error": design.error,
        "bits": design.bits,
        "multiplications": _plain(c.multiplications),
        "macs": c.macs,
        "transform_multiplications": _plain(c.transform_multiplications),
        "transform_additions": _plain(c.transform_additions),
        "transform_shifts": _plain(c.transform_shifts),
        "weight_bytes": c.weight_bytes,
    }


def _plain(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)


_HEADER = ("tiles", "mults", "of direct", "error", "bits", "t.add", "t.shift", "t.mult", "weights")


def _text(title: str, space: Space, names: list[str], limit: float) -> Iterator[str]:
    yield title
    yield ""
    yield "Front of the pairs of tiles, one pair for all layers:"
    pareto = space.pareto()
    yield from _aligned([_HEADER, *map(_line, pareto)])
    uniform, mixed = space.within(limit)
    yield ""
    yield f"Fewest multiplications at an error bound of at most {limit:g}:"
    yield from _aligned([_HEADER, _line(uniform), _line(mixed)])
    yield ""
    yield f"The plan with {_tiles(uniform)} for all layers:"
    header = ("layers", "convolution", "algorithm", "mults", "error")
    yield from _aligned([header, *_plan(space, uniform, names)])


def _line(design: Design) -> tuple[str, ...]:
    c = design.counts
    return (
        _tiles(design),
        short(c.multiplications),
        f"{float(c.multiplications / c.macs):.1%}" if c.macs else "",
        f"{design.error:.2f}",
        f"{design.bits:.1f}",
        short(c.transform_additions),
        short(c.transform_shifts),
        short(c.transform_multiplications),
        short(c.weight_bytes, "B"),
    )


def _tiles(design: Design) -> str:
    if design.tiles is None:
        return "mixed"
    if design.tiles == DIRECT:
        return "direct"
    time, space = design.tiles
    return f"F({time}, K) x F({space}x{space}, RxR)"


def _plan(space: Space, design: Design, names: list[str]) -> Iterator[tuple[str, ...]]:
    """One line per distinct convolution."""
    seen: dict[Any, list[str]] = {}
    options = dict(zip(space.geometries, design.layers, strict=True))
    for name, geometry in zip(names, space.geometries, strict=True):
        seen.setdefault(geometry, []).append(name)
    for geometry, users in seen.items():
        option = options[geometry]
        label = users[0] if len(users) == 1 else f"{users[0]} and {len(users) - 1} more"
        multiplied = len(users) * option.counts.multiplications
        algorithm = algorithm_name(geometry, option.transforms)
        yield label, layer_text(geometry), algorithm, short(multiplied), f"{option.error:.2f}"


def _aligned(lines: list[tuple[str, ...]]) -> Iterator[str]:
    columns = list(zip(*lines, strict=True))
    kept = [column for column in columns if any(column[1:])]
    padded = [
        [cell.ljust(width) if _is_text(column) else cell.rjust(width) for cell in column]
        for column in kept
        for width in [max(map(len, column))]
    ]
    return ("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))


def _is_text(column: tuple[str, ...]) -> bool:
    return column[0] in ("tiles", "layers", "convolution", "algorithm")


def _check_plot(path: str) -> None:
    """Before the work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "explore: a plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    if not Path(path).parent.is_dir():
        raise UnsupportedError(f"explore: no folder {Path(path).parent} for the plot")


def draw(title: str, space: Space, limit: float, path: str) -> None:
    """Error bound against multiplications, both logarithmic, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    front = set(map(id, space.pareto()))
    beaten = [d for d in space.uniform if id(d) not in front]
    best = [d for d in space.uniform if id(d) in front]
    axes.scatter(*_points(beaten), s=14, color="#bdbdbd", label="one pair for all layers")
    axes.scatter(*_points(best), s=28, color="#2166ac", zorder=3, label="not beaten by another")
    for design in best:
        direct = design.tiles == DIRECT  # the rightmost one
        axes.annotate(
            "direct" if direct else "{}, {}".format(*(design.tiles or ("", ""))),
            (float(design.multiplications) / 1e9, design.error),
            textcoords="offset points",
            xytext=(3, 6) if direct else (5, 4),
            ha="right" if direct else "left",
            fontsize=8,
        )
    xs, ys = _points(space.frontier)
    axes.step(xs, ys, where="pre", color="#b2182b", lw=1, label="each layer its own pair")
    axes.axhline(limit, color="black", lw=0.7, ls=":", label=f"limit {limit:g}")
    axes.set(xscale="log", yscale="log", xlabel="multiplications, 1e9", ylabel="error bound")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"explore: cannot write {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _points(designs: Any) -> tuple[list[float], list[float]]:
    return [float(d.multiplications) / 1e9 for d in designs], [d.error for d in designs]
