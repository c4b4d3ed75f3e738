"""The command line of `python -m fastconv bench`; heavy modules wait until a command runs."""

from __future__ import annotations

import argparse
from typing import Any

from . import limits

KINDS = ("layers", "blocks", "networks", "streams", "training")
HELP = {
    "all": "all five, the most informative cases first",
    "layers": "single convolutions: a table of well-known ones, then those of the zoo's networks",
    "blocks": "fully separable blocks",
    "networks": "whole networks",
    "streams": "one frame in, one column out",
    "training": "single convolutions, forward and backward",
}


def add(commands: Any) -> None:
    """Add `bench` and its commands to the command line's subparsers."""
    bench = commands.add_parser("bench", help="time our kernels against what people run today")
    kinds = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in HELP.items():
        _timing(kinds.add_parser(name, help=text), KINDS if name == "all" else (name,))
    compare = kinds.add_parser("compare", help="what got faster or slower from one file to another")
    compare.add_argument("before", metavar="A.json")
    compare.add_argument("after", metavar="B.json")
    compare.set_defaults(command=_compare)
    show = kinds.add_parser("show", help="the table of a file, and its plots")
    show.add_argument("file", metavar="FILE.json")
    show.add_argument("--plot", metavar="DIR", help="write PNG plots into this folder")
    show.set_defaults(command=_show)
    rates = kinds.add_parser("rates", help="what each family reached in a file, per thread")
    rates.add_argument("file", metavar="FILE.json")
    rates.set_defaults(command=_rates)
    errors = kinds.add_parser("errors", help="how far minimal filtering is from float64")
    errors.add_argument("--backend", default="auto", help="auto (default), numba, c, torch, ...")
    errors.set_defaults(command=_errors)
    readme = kinds.add_parser(
        "readme", help="write the tables of errors and of bench/results into README.md"
    )
    readme.set_defaults(command=_readme)
    listing = kinds.add_parser("list", help="the cases, and the peers with what is missing")
    listing.set_defaults(command=_list)
    gpu = kinds.add_parser("gpu", help="check, then time, everything on this machine's GPU")
    gpu.add_argument("--out", required=True, metavar="DIR", help="the folder of all rows")
    gpu.add_argument("--threads", type=_positive, help="default: every CPU of this process")
    text = "seconds after which no further case is begun; default: %(default)g"
    gpu.add_argument("--limit", type=_seconds, default=280.0, metavar="S", help=text)
    gpu.add_argument("--filter", action="append", default=[], metavar="TEXT", help="only these")
    gpu.set_defaults(command=_gpu)


def _timing(parser: argparse.ArgumentParser, kinds: tuple[str, ...]) -> None:
    add = parser.add_argument
    text = "only cases with TEXT in name, LAYER or network; repeat it: all must hold"
    add("--filter", action="append", default=[], metavar="TEXT", help=text)
    add("--backend", default="auto", help="auto (default), numba, c, triton, torch, reference")
    add("--algorithm", default="auto", help="of layers: auto (default), direct, winograd, ...")
    add("--tile", type=_tile, metavar="MxMxM", help="of winograd layers: outputs per tile and axis")
    add("--peers", default="all", help="all (default), none, or names with commas, see list")
    add("--table-only", action="store_true", help="of layers: without those of the networks")
    text = "limit ours and PyTorch to an instruction set of this CPU; other peers are left out"
    add("--isa", choices=sorted(limits.LIMITS), help=text)
    add("--cold", action="store_true", help="empty the caches before each timed call")
    add("--threads", type=_positive, help="default: every CPU that this process may use")
    add("--repeats", type=_positive, default=50, help="at most; default: %(default)s")
    text = "seconds per contender of a case (networks twice as long); default: %(default)g"
    add("--budget", type=_seconds, default=0.5, metavar="S", help=text)
    text = "seconds after which no further case is begun; default: none"
    add("--limit", type=_seconds, default=float("inf"), metavar="S", help=text)
    add("--json", metavar="FILE", help="write rows as they come; into a folder: named by machine")
    add("--plot", metavar="DIR", help="write PNG plots into this folder")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    text = "float32 (default), float16, bfloat16, or several with commas"
    add("--dtype", type=_names, default=("float32",), help=text)
    parser.set_defaults(command=_run, kinds=kinds)


def _run(args: argparse.Namespace) -> int:
    if args.isa:
        limits.limit(args.isa)
        args.peers = limits.OBEDIENT if args.peers == "all" else args.peers
    from . import run

    return run.main(args)


def _gpu(args: argparse.Namespace) -> int:
    from . import gpu

    return gpu.main(args)


def _compare(args: argparse.Namespace) -> int:
    from . import report, results

    print("\n".join(report.comparison(results.read(args.before), results.read(args.after))))
    return 0


def _show(args: argparse.Namespace) -> int:
    from . import report, results

    document = results.read(args.file)
    print("\n".join(report.summary(document)))
    if args.plot:
        from . import plots, run

        run.require_plots(args.plot)
        print("\n".join(f"wrote {path}" for path in plots.write(document, args.plot)))
    return 0


def _rates(args: argparse.Namespace) -> int:
    from . import report, results

    print("\n".join(report.rates(results.read(args.file))))
    return 0


def _errors(args: argparse.Namespace) -> int:
    from . import errors

    print("\n".join(errors.table(errors.measured(args.backend))))
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _tile(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers joined by 'x', got {text!r}")
    return tuple(map(int, parts))
