"""`python -m fastconv stream`: real videos through a continual network, several at once."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from . import backends
from .errors import BackendError, UnsupportedError
from .stream import Policy, StreamPool
from .video import PREPROCESSING, Preprocessing, VideoError, default_clip, read_frames
from .zoo import CONTINUAL, build
from .zoo import NETWORKS as ZOO

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .nn.to_continual import ContinualNetwork

# What the command takes, and the clip networks that they are.
NETWORKS = {**CONTINUAL, **{f"d_resnet{depth}": f"d_resnet{depth}" for depth in (18, 50, 101)}}
STARTS = ("wait", "zeros", "replicate")
REFRESH_S = 0.25  # of the live table
REPEATS = 3  # clips that are recomputed for the summary
HISTORY = 4096  # latencies that percentiles are of
HELP = f"""\
NETWORK is one of {", ".join(NETWORKS)}; weights are seeded, not trained.

Every frame of every video gives a result once the network has seen as many frames as it depends
on. --start says what stands in front of a video: 'wait' nothing, 'zeros' the clip network's own
padding, 'replicate' its first frame. At the end every stream's last result is computed again from
a clip, and a frame's time is set against recomputing the network's clip for each frame."""


@dataclass
class _Player:
    """A video on its way through the pool."""

    title: str
    frames: Iterator[np.ndarray]
    stream: int
    seen: int = 0
    results: int = 0
    top: int | None = None
    output: Tensor | None = None
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    began: float = 0.0
    ended: float = 0.0
    recent: deque[Tensor] = field(default_factory=deque)


def add_options(parser: argparse.ArgumentParser, positive: Any) -> None:
    """The options of the command; positive: the type of whole numbers from 1 on."""
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="default: bikes.mp4, twice")
    parser.add_argument(
        "--network", default="cox3d_m", metavar="NETWORK", help="default: %(default)s"
    )
    parser.add_argument("--start", choices=STARTS, default="wait", help="default: %(default)s")
    parser.add_argument("--frames", type=positive, help="of every video; default: all")
    parser.add_argument(
        "--streams", type=positive, help="at the same time; default: one for every video"
    )
    parser.add_argument("--window", type=positive, help="frames under the last pooling")
    parser.add_argument("--backend", default="auto", help=f"auto, {', '.join(backends.BACKENDS)}")
    parser.add_argument("--threads", type=positive, help="default: every CPU this process may use")


def run(args: argparse.Namespace) -> int:
    """The command; raises UnsupportedError if the streams' results are not the clips'."""
    if not backends.installed("torch"):
        raise BackendError(
            "streams need PyTorch, which is not installed: pip install 'fastconv[demo]'"
        )
    if args.network not in NETWORKS:
        raise UnsupportedError(f"unknown network {args.network!r}. Known: {', '.join(NETWORKS)}")
    if args.backend != "auto":
        backends.check(args.backend)
    import torch

    torch.set_num_threads(args.threads or torch.get_num_threads())
    paths = [Path(video) for video in args.videos] or [default_clip()] * 2
    slots = args.streams or len(paths)
    paths = list(islice(cycle(paths), max(slots, len(paths))))
    for path in paths:
        if not path.is_file():
            raise VideoError(f"no such file: {path}")
    with torch.inference_mode():
        clip_network, network, example = _networks(args)
        pool = StreamPool(
            network, slots, example[0], policy=Policy("refuse", "refuse", "refuse", queue=1)
        )
        players = _play(pool, paths, args)
        print("\n".join(_summary(clip_network, network, players, args)))
    return 0


def preprocessing_of(network: str) -> Preprocessing:
    """What a zoo network expects of its frames; of those not in video.PREPROCESSING, its size."""
    if network in PREPROCESSING:
        return PREPROCESSING[network]
    _, frames, crop, _ = ZOO[network].input_shape
    return Preprocessing(frames, 1, crop * 8 // 7, crop, (0.45,) * 3, (0.225,) * 3)


def _networks(args: argparse.Namespace) -> tuple[nn.Module, ContinualNetwork, Tensor]:
    """The network for clips, the continual one, and a frame (1, C, H, W)."""
    import torch

    from .nn.to_continual import to_continual

    name = NETWORKS[args.network]
    model = build(name).eval()
    clip = torch.empty(1, *ZOO[name].input_shape, device="meta")
    network = to_continual(
        model, clip, start=args.start, pool_window=args.window, backend=args.backend
    )
    return model, network, torch.zeros(1, *clip.shape[1:2], *clip.shape[3:])


def _play(pool: StreamPool, paths: list[Path], args: argparse.Namespace) -> list[_Player]:
    """Every video through the pool, as many at once as it has slots; later ones when one leaves."""
    import torch

    expects = preprocessing_of(NETWORKS[args.network])
    keep = pool.model.receptive_field + pool.model.rate - 1
    open_paths = list(enumerate(paths))
    players: list[_Player] = []
    live: list[_Player] = []
    table = _Table(sys.stdout.isatty())
    while live or open_paths:
        while open_paths and pool.free:
            number, path = open_paths.pop(0)
            frames = islice(read_frames(path, expects), args.frames)
            player = _Player(f"{number} {path.name}", frames, pool.join(), began=perf_counter())
            player.recent = deque(maxlen=keep)
            live.append(player)
            players.append(player)
        for player in list(live):
            picture = next(player.frames, None)
            if picture is None:
                pool.leave(player.stream)
                player.ended = perf_counter()
                live.remove(player)
                continue
            frame = torch.from_numpy(picture)
            player.recent.append(frame)
            pool.push(player.stream, frame)
        results = pool.tick()
        for player in live:
            result = results[player.stream]
            player.seen += 1
            player.latencies.append(result.latency_ms)
            if result.output is not None:
                player.results, player.output = player.results + 1, result.output
                player.top = int(result.output.argmax())
        table.show(players, pool)
    table.show(players, pool, last=True)
    return players


class _Table:
    """Rows that are written over on a terminal, and printed once elsewhere."""

    TITLES = ("stream", "frames", "results", "frames/s", "p50 ms", "p95 ms", "p99 ms", "class")

    def __init__(self, live: bool) -> None:
        self.live, self._lines, self._shown = live, 0, 0.0

    def show(self, players: list[_Player], pool: StreamPool, last: bool = False) -> None:
        now = perf_counter()
        if not last and (not self.live or now - self._shown < REFRESH_S):
            return
        rows = [self.TITLES, *(self._row(player, now) for player in players)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        slots = pool.model.slots
        lines.append(
            f"state {pool.state_bytes / 1e6:.1f} MB in {slots} slots, "
            f"{pool.state_bytes / slots / 1e6:.1f} MB each"
        )
        if self.live and self._lines:
            print(f"\x1b[{self._lines}F\x1b[J", end="")
        print("\n".join(lines), flush=True)
        self._lines, self._shown = len(lines), now

    def _row(self, player: _Player, now: float) -> tuple[str, ...]:
        seconds = (player.ended or now) - player.began
        levels: list[str] = ["-"] * 3
        if player.latencies:
            levels = [f"{p:.1f}" for p in np.percentile(list(player.latencies), (50, 95, 99))]
        rate = f"{player.seen / seconds:.1f}" if seconds else "-"
        top = "-" if player.top is None else str(player.top)
        return (player.title, str(player.seen), str(player.results), rate, *levels, top)


def _summary(
    clip_network: nn.Module,
    network: ContinualNetwork,
    players: list[_Player],
    args: argparse.Namespace,
) -> Iterator[str]:
    import torch

    threads = torch.get_num_threads()
    yield (
        f"\n{args.network}, start {args.start!r}, {threads} threads: receptive field "
        f"{network.receptive_field} frames, delay {network.delay}, first result after "
        f"{network.warm_up + 1}"
    )
    error = _error(network, players)
    if error is not None:
        yield f"largest difference of the last results from a clip's, relative: {error:.1e}"
        if error > 1e-3:
            raise UnsupportedError(
                f"stream: the results are not the clips', difference {error:.1e}"
            )
    step_ms = median(ms for player in players for ms in player.latencies)
    frames = preprocessing_of(NETWORKS[args.network]).frames
    last = next((p.recent for p in players if p.recent), None)
    if last is None:
        return
    picked = [last[i % len(last)] for i in range(frames)]
    clip = torch.stack(picked, dim=1)[None].to(memory_format=torch.channels_last_3d)
    times = []
    for _ in range(REPEATS + 1):
        start = perf_counter()
        clip_network(clip)
        times.append(1e3 * (perf_counter() - start))
    clip_ms = median(times[1:])
    together = network.slots
    yield (
        f"one tick of {together} streams {step_ms:.1f} ms, {step_ms / together:.1f} ms a frame; "
        f"recomputing {frames} frames for every frame with PyTorch {clip_ms:.1f} ms: "
        f"{clip_ms * together / step_ms:.1f} times as long"
    )


def _error(network: ContinualNetwork, players: list[_Player]) -> float | None:
    """Of the last results against `forward` of the frames that they depend on."""
    import torch

    if network.start_mode != "wait" or network.rate != 1:
        return None
    worst = None
    for player in players:
        if player.output is None or len(player.recent) < network.receptive_field:
            continue
        clip = torch.stack(list(player.recent), dim=1)[None]
        want = network(clip)[0, ..., -1]
        off = float((want - player.output).abs().max() / want.abs().max())
        worst = max(off, worst or 0.0)
    return worst
