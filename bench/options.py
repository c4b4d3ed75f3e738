"""The command line of `python -m fastconv bench`; nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
from typing import Any

KINDS = ("layers", "blocks", "networks", "streams")
HELP = {
    "all": "everything below, the most informative cases first",
    "layers": "single convolutions: the table's, then every distinct one of the zoo's networks",
    "blocks": "fully separable blocks",
    "networks": "whole networks",
    "streams": "one frame in, one column out",
}


def add(commands: Any) -> None:
    """Add `bench` and its commands to the command line's subparsers."""
    bench = commands.add_parser("bench", help="time our kernels against what people run today")
    kinds = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in HELP.items():
        _timing(kinds.add_parser(name, help=text))
    compare = kinds.add_parser("compare", help="what got faster or slower from one file to another")
    compare.add_argument("before", metavar="A.json")
    compare.add_argument("after", metavar="B.json")
    compare.set_defaults(command=_compare)
    show = kinds.add_parser("show", help="the table and plots of a file")
    show.add_argument("file", metavar="FILE.json")
    show.add_argument("--plot", metavar="DIR", help="write PNG plots into this folder")
    show.set_defaults(command=_show)
    readme = kinds.add_parser("readme", help="write the table of bench/results into README.md")
    readme.set_defaults(command=_readme)
    listing = kinds.add_parser("list", help="the cases and the peers, with what is missing")
    listing.set_defaults(command=_list)


def _timing(parser: argparse.ArgumentParser) -> None:
    kind = parser.prog.split()[-1]
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="TEXT",
        help="only cases whose name, LAYER or network contains TEXT; repeat for more (all must hold)",
    )
    parser.add_argument(
        "--backend", default="auto", help="auto (default), numba, c, triton, torch, ..."
    )
    parser.add_argument(
        "--algorithm", default="auto", help="layers: auto (default), direct, winograd, ..."
    )
    parser.add_argument(
        "--tile", type=_tile, metavar="MxMxM", help="layers: outputs per tile and axis"
    )
    parser.add_argument("--peers", default="all", help="all (default), none, or names with commas")
    parser.add_argument("--table-only", action="store_true", help="layers: without the zoo's")
    parser.add_argument(
        "--cold", action="store_true", help="empty the caches before each timed call"
    )
    parser.add_argument("--threads", type=_positive, help="default: every CPU this process may use")
    parser.add_argument("--repeats", type=_positive, default=30, help="default: %(default)s")
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=4.0,
        metavar="S",
        help="of timing per case; default: %(default)g",
    )
    parser.add_argument(
        "--limit",
        type=_seconds,
        default=float("inf"),
        metavar="S",
        help="of the whole run; default: none",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write rows as they come; a folder: named by machine"
    )
    parser.add_argument("--plot", metavar="DIR", help="write PNG plots into this folder")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s"
    )
    parser.set_defaults(command=_run, kinds=KINDS if kind == "all" else (kind,))


def _run(args: argparse.Namespace) -> int:
    from . import run

    return run.main(args)


def _compare(args: argparse.Namespace) -> int:
    from . import report, results

    print("\n".join(report.comparison(results.read(args.before), results.read(args.after))))
    return 0


def _show(args: argparse.Namespace) -> int:
    from . import report, results

    document = results.read(args.file)
    print("\n".join(report.summary(document)))
    if args.plot:
        from . import plots

        print("\n".join(f"wrote {path}" for path in plots.write(document, args.plot)))
    return 0


def _readme(args: argparse.Namespace) -> int:
    from . import readme

    print(f"wrote {readme.write()}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from . import run

    print("\n".join(run.listing()))
    return 0


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def _tile(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers joined by 'x', got {text!r}")
    return tuple(map(int, parts))
