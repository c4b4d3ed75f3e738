"""`python -m fastconv demo`: a real clip through a network, on PyTorch's convolutions and ours."""

from __future__ import annotations

import argparse
import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import backends
from .errors import BackendError, UnsupportedError
from .video import PREPROCESSING, Clip, default_clip, read_clip

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .nn.rewrite import Report

REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One convolution of the network: multiplications of one run, median times of one call."""

    name: str
    geometry: str
    algorithm: str
    backend: str
    direct: int
    multiplications: int
    torch_ms: float
    ours_ms: float


def run(args: argparse.Namespace) -> int:
    """The command; raises if the outputs do not agree within the stated bound."""
    for package, title in (("torch", "PyTorch"), ("tqdm", "tqdm")):
        if not backends.installed(package):
            raise BackendError(
                f"the demo needs {title}, which is not installed: pip install 'fastconv[demo]'"
            )
    if args.network not in PREPROCESSING:
        raise UnsupportedError(
            f"unknown network {args.network!r}. Known: {', '.join(sorted(PREPROCESSING))}"
        )
    clip, path = _clip(args)
    import torch

    from .zoo import build

    torch.set_num_threads(args.threads or torch.get_num_threads())
    with _progress() as step:
        step(f"building {args.network}")
        options: dict[str, Any] = {"clip": clip.data.shape[1:]} if args.network == "c3d" else {}
        network = build(args.network, **options).eval()
        with torch.inference_mode():
            _compare(args.network, args.backend, network, clip, path, step)
    return 0


def _clip(args: argparse.Namespace) -> tuple[Clip, Path]:
    preprocessing = PREPROCESSING[args.network]
    if args.frames:
        preprocessing = replace(preprocessing, frames=args.frames)
    path = Path(args.video) if args.video else default_clip()
    return read_clip(path, preprocessing), path


def _compare(
    network_name: str,
    backend: str,
    network: nn.Module,
    clip: Clip,
    path: Path,
    step: Callable[[str], None],
) -> None:
    """Run both, time both, print; UnsupportedError if the outputs differ beyond the bound."""
    import torch

    from .nn.rewrite import accelerate

    # PyTorch is given its faster layout for video too.
    peer: Any = copy.deepcopy(network)
    peer.to(memory_format=torch.channels_last_3d)
    x = torch.from_numpy(clip.data)[None].to(memory_format=torch.channels_last_3d)
    step("planning, compiling on first use, checking against float64")
    ours, report = accelerate(network, x, backend=backend)
    names = [layer.name for layer in report.layers]
    totals: dict[str, list[float]] = {"torch": [], "ours": []}
    per_layer: dict[str, dict[str, list[float]]] = {
        "torch": defaultdict(list),
        "ours": defaultdict(list),
    }
    for i in range(REPEATS + 1):
        step(f"timing, run {i} of {REPEATS}" if i else "warming up")
        for who, model in (("torch", peer), ("ours", ours)):
            total, layers = _timed(model, x, names)
            if i:
                totals[who].append(total)
                for name, ms in layers.items():
                    per_layer[who][name].append(ms)
    step("")
    print("\n".join(_table(_rows(report, per_layer))))
    print("\n".join(_summary(network_name, clip, path, report, totals, peer(x), ours(x))))


def _timed(model: nn.Module, x: Tensor, names: list[str]) -> tuple[float, dict[str, float]]:
    """Milliseconds of one run, then of each named layer in a run of its own."""
    start = perf_counter()
    model(x)
    total = 1e3 * (perf_counter() - start)
    layers: dict[str, float] = {}
    began: dict[str, float] = {}
    modules = dict(model.named_modules())

    def before(name: str) -> Callable[..., None]:
        return lambda *_: began.__setitem__(name, perf_counter())

    def after(name: str) -> Callable[..., None]:
        return lambda *_: layers.__setitem__(name, 1e3 * (perf_counter() - began[name]))

    handles = [modules[n].register_forward_pre_hook(before(n)) for n in names]
    handles += [modules[n].register_forward_hook(after(n)) for n in names]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return total, layers


def _rows(report: Report, per_layer: dict[str, dict[str, list[float]]]) -> list[Row]:
    from .costs import multiplications
    from .nn.rewrite import describe

    rows = []
    for layer in report.layers:
        plan = layer.plan
        if plan is not None:
            times = (median(per_layer[who][layer.name]) for who in ("torch", "ours"))
            facts = (
                describe(plan),
                plan.algorithm,
                plan.backend,
                plan.geometry.macs,
                multiplications(plan),
            )
            rows.append(Row(layer.name, *facts, *times))
    return rows


def _table(rows: list[Row]) -> list[str]:
    """One line per layer and one in total; percent of the direct multiplications behind ours."""
    texts = ("layer", "geometry", "algorithm", "backend")
    numbers = ("direct", "actual", "", "torch ms", "ours ms", "ratio")
    cells = [(*texts, *numbers)]
    summed = ("direct", "multiplications", "torch_ms", "ours_ms")
    sums = (sum(getattr(r, name) for r in rows) for name in summed)
    total = Row("convolutions", "", "", "", *sums)
    for r in (*rows, total):
        share = f"{100 * r.multiplications / r.direct:.0f}%"
        numbers = (
            f"{r.direct:,}",
            f"{r.multiplications:,}",
            share,
            f"{r.torch_ms:.2f}",
            f"{r.ours_ms:.2f}",
            f"{r.torch_ms / r.ours_ms:.2f}",
        )
        cells.append((r.name, r.geometry, r.algorithm, r.backend, *numbers))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust] * len(texts) + [str.rjust] * len(numbers)
    return [
        "  ".join(side(cell, w) for side, cell, w in zip(sides, row, widths, strict=True))
        for row in cells
    ]


def _summary(
    network: str,
    clip: Clip,
    path: Path,
    report: Report,
    totals: dict[str, list[float]],
    want: Tensor,
    got: Tensor,
) -> Iterator[str]:
    import torch

    torch_ms, ours_ms = median(totals["torch"]), median(totals["ours"])
    frames = f"{len(clip.indices)} of {clip.source_frames} frames, every {clip.sampling_rate}"
    threads = torch.get_num_threads()
    top = {"PyTorch": want, "ours": got}
    yield f"\n{path.name}: {frames}; {network}, seeded random weights, {threads} threads"
    yield (
        f"whole network: PyTorch channels_last_3d {torch_ms:.1f} ms, ours {ours_ms:.1f} ms, "
        f"ratio {torch_ms / ours_ms:.2f}"
    )
    yield (
        f"largest error against float64, relative: PyTorch {report.original_error:.1e}, "
        f"ours {report.error:.1e}, bound {report.allowed:.1e}: outputs match"
    )
    tops = (f"{who} {y[0].topk(5).indices.tolist()}" for who, y in top.items())
    yield f"top classes: {', '.join(tops)}"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A bar on stderr, one tick per stage; `step(text)` names the stage that begins."""
    from tqdm import tqdm

    with tqdm(
        total=REPEATS + 3, file=sys.stderr, bar_format="{bar:24} {elapsed} {desc}", leave=False
    ) as bar:

        def step(text: str) -> None:
            bar.set_description_str(text)
            bar.update()

        yield step
