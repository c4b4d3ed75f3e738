"""`python -m fastconv tune`: measure plans for networks and layers, and show what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from . import autotune, backends, costs, planner, winners
from .autotune import NO_ROOM, Tuned
from .epilogue import ACTIVATIONS, Epilogue
from .errors import BackendError, GeometryError, UnsupportedError
from .geometry import Geometry, SeparableGeometry
from .layouts import LAYOUTS
from .notation import layer_text, parse_layer
from .plan import Request
from .targets import load

HELP = """\
Every distinct convolution of a NETWORK (of fastconv.zoo, for its paper's clip or for another one,
x3d_m@16x112x112), as `accelerate` runs it, or a single LAYER, written as for `count`:
  conv3d:64-128:3x3x3@16x56x56:p1

Candidate plans are checked against float64 and timed by turns; the fastest are kept for this
machine, these versions, this instruction set and number of threads, and run from then on wherever
their convolution is asked for. What was measured before is not measured again without --again,
unless ~ marks it: then other work of the machine disturbed the measurement."""

Epilogues = Epilogue | tuple[Epilogue, Epilogue, Epilogue]


@dataclass(frozen=True)
class Row:
    """One distinct request: the layers that make it, and what was found."""

    names: list[str]
    request: Request
    tuned: Tuned | None = None
    note: str = ""


def add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("targets", nargs="*", metavar="NETWORK|LAYER")
    add("--backend", default="auto", help=f"auto (default), {', '.join(backends.BACKENDS)}")
    add("--tolerance", type=float, default=planner.DEFAULT_TOLERANCE, help="default: %(default)g")
    add("--layout", choices=LAYOUTS, default=LAYOUTS[-1], help="default: %(default)s")
    dtypes = tuple(dict.fromkeys(sum(autotune.DTYPES.values(), ())))
    add("--dtype", choices=dtypes, default="float32", help="default: %(default)s")
    add("--device", choices=tuple(autotune.DTYPES), default="cpu", help="default: %(default)s")
    add("--threads", type=positive, help="default: as many as PyTorch uses")
    add("--budget", type=positive, default=1000, metavar="MS", help="per layer; default: 1000")
    add("--again", action="store_true", help="measure what was measured before")
    for name in ("bias", "residual"):
        add(f"--{name}", action="store_true", help=f"LAYER: with a {name}")
    add("--activation", choices=ACTIVATIONS, default="none", help="LAYER: default none")
    add("--continual", action="store_true", help="LAYER: the window of one output column")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="print results, measure nothing")
    what.add_argument("--clear", action="store_true", help="remove all results")


def run(args: argparse.Namespace) -> Iterator[str]:
    """The command, as lines to print. Raises the library's errors."""
    if args.clear:
        count = winners.clear()
        yield f"{count} results removed: {winners.path()}"
        return
    if args.threads:
        _set_threads(args.threads)
    if args.show and not args.targets:
        yield from _all_records()
        return
    if not args.targets:
        raise UnsupportedError("tune: what? Name a network or a layer, or --show or --clear")
    if args.backend != "auto":
        backends.check(args.backend)
    rows = _rows(args)
    if not args.show:
        rows, interrupted = _measured(rows, args)
        if interrupted:
            yield "interrupted: what was measured is kept"
    yield from _table(rows)
    yield _summary(rows)


def _set_threads(count: int) -> None:
    if backends.available()["torch"] is not None:
        raise BackendError(
            "tune: --threads needs PyTorch, which is not installed: pip install 'fastconv[torch]'"
        )
    import torch

    torch.set_num_threads(count)


def _rows(args: argparse.Namespace) -> list[Row]:
    """Distinct requests in the order of the layers that make them."""
    names: dict[Request, list[str]] = {}
    for target in args.targets:
        for name, geometry, epilogue in _convolutions(target, args):
            request = Request.of(
                geometry,
                dtype=args.dtype,
                device=args.device,
                epilogue=epilogue,
                layout=args.layout,
                backend=args.backend,
                tolerance=args.tolerance,
                continual=args.continual and ":" in target,
            )
            names.setdefault(request, []).append(name)
    return [Row(layers, request) for request, layers in names.items()]


def _convolutions(
    target: str, args: argparse.Namespace
) -> Iterator[tuple[str, Geometry | SeparableGeometry, Epilogues]]:
    """Name, geometry and epilogue of what a target names."""
    from .zoo import NETWORKS

    network = target.split("@")[0]
    if network not in NETWORKS and ":" not in target:
        raise UnsupportedError(
            f"tune: {target!r} is neither a network nor a layer. Networks: "
            f"{', '.join(sorted(NETWORKS))}; a layer is written like "
            "conv3d:64-128:3x3x3@16x56x56:p1"
        )
    try:
        if network in NETWORKS:
            for layer in load(target).layers():
                if layer.geometry is not None:
                    yield layer.name, layer.geometry, Epilogue(bias=layer.bias)
            return
        geometry = parse_layer(target)
    except (BackendError, GeometryError) as error:
        raise type(error)(str(error).replace("count:", "tune:", 1)) from error
    epilogue = Epilogue(args.bias, args.activation, args.residual)
    if isinstance(geometry, SeparableGeometry):
        first = Epilogue(args.bias, args.activation)
        yield target, geometry, (first, first, epilogue)
    else:
        yield target, geometry, epilogue


def _measured(rows: Sequence[Row], args: argparse.Namespace) -> tuple[list[Row], bool]:
    """The rows with their results, and whether the user had enough before the end."""
    done: list[Row] = []
    try:
        with _progress(len(rows)) as step:
            for row in rows:
                step(row.names[0])
                known = winners.find(row.request)
                if known is not None and not known.noisy and not args.again:
                    done.append(row)
                    continue
                try:
                    tuned = autotune.tune_request(row.request, args.budget / 1e3)
                    done.append(Row(row.names, row.request, tuned))
                except UnsupportedError as error:
                    done.append(Row(row.names, row.request, note=str(error)))
    except KeyboardInterrupt:
        return done, True
    return done, False


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr where there is a terminal and tqdm; `step(text)` names what begins."""
    if not backends.installed("tqdm") or not sys.stderr.isatty():
        yield lambda text: None
        return
    from tqdm import tqdm

    form = "{n_fmt}/{total_fmt} {bar:24} {elapsed} {desc}"
    with tqdm(total=total, file=sys.stderr, bar_format=form, leave=False) as bar:

        def step(text: str) -> None:
            bar.set_description_str(text)
            bar.update()

        yield step


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """One line per distinct request: what ran before, what runs now, milliseconds, the ratio."""
    cells: list[tuple[str, ...]] = [
        ("layer", "convolution", "before", "ms", "now", "ms", "torch ms", "ratio", "")
    ]
    cells += map(_cells, rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = (0, 1, 2, 4, 8)
    for row in cells:
        aligned = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(aligned).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    geometry = row.request.geometry
    name = row.names[0] + (f" and {len(row.names) - 1} more" if len(row.names) > 1 else "")
    text = layer_text(geometry) if isinstance(geometry, Geometry) else "separable"
    if ":" in row.names[0]:  # a LAYER is its own name
        text = ""
    tuned, record = row.tuned, winners.find(row.request)
    if record is None:
        return (name, text, "", "", "", "", "", "", row.note or "not measured")
    now, torch_ms = record.ms[record.winner], _framework_ms(record)
    before, before_ms, note = "as measured before", "", "~" if record.noisy else ""
    if tuned is not None:
        same = tuned.before == tuned.after
        before = "the same" if same else winners.label(tuned.before)
        before_ms = "" if same else _ms(tuned.before_ms)
        wrong = [f"{name}: {why}" for name, why in tuned.refused.items() if why != NO_ROOM]
        note = " ".join([*(["~"] if tuned.noisy else []), "; ".join(wrong)]).strip()
    ratio = "" if torch_ms is None else f"{torch_ms / now:.2f}"
    return (name, text, before, before_ms, record.winner, _ms(now), _ms(torch_ms), ratio, note)


def _framework_ms(record: winners.Record) -> float | None:
    """PyTorch's time, also where it was given up."""
    times = {**record.given_up, **record.ms}
    return min((ms for name, ms in times.items() if name.startswith("torch ")), default=None)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _summary(rows: Sequence[Row]) -> str:
    """Sums over all layers, each as often as it is called."""
    now = torch_ms = 0.0
    measured = [row.tuned for row in rows if row.tuned is not None]
    for row in rows:
        record = winners.find(row.request)
        theirs = None if record is None else _framework_ms(record)
        if record is not None and theirs is not None:
            now += len(row.names) * record.ms[record.winner]
            torch_ms += len(row.names) * theirs
    changed = sum(tuned.before != tuned.after for tuned in measured)
    ratio = f", ratio {torch_ms / now:.2f}" if now else ""
    return (
        f"{len(measured)} of {len(rows)} measured, {changed} changed; all calls: "
        f"{now:.1f} ms, PyTorch {torch_ms:.1f} ms{ratio}; {costs.threads()} threads; "
        f"{winners.path()}"
    )


def _all_records() -> Iterator[str]:
    """Everything kept for these versions."""
    records = winners.records()
    for key, record in sorted(records.items()):
        yield key + (" ~" if record.noisy else "")
        for times, mark in ((record.ms, ""), (record.given_up, "~")):
            for name, ms in times.items():
                yield f"  {'>' if name == record.winner else ' '} {mark}{ms:.3f} ms  {name}"
    yield f"{len(records)} results for {winners.environment()}: {winners.path()}"
