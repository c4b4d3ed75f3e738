"""What is timed: the rows of `cases.csv`, and every distinct convolution of the zoo's networks."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

from fastconv import backends
from fastconv.count_table import layer_text, parse_layer
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry, SeparableGeometry

KINDS = ("layers", "blocks", "networks", "streams", "training")
DTYPES = ("float32", "float16", "bfloat16")
# Networks whose convolutions are timed one by one; larger siblings repeat the same kinds of layers.
TRACED = ("x3d_m", "x3d_s", "c3d")
TABLE = "table"


@dataclass(frozen=True)
class Case:
    """One thing to time.

    target      a LAYER as `python -m fastconv count` reads it, or a network's name; for `streams`
                the window that one output column reads; for `training` a layer that is run
                forward and backward
    name        what tables show and `--filter` looks at
    activation  applied after every stage, with a bias
    bar, goal   the ratio to the best peer that counts as good, and what is aimed at: a ratio,
                'copy' (copy speed) or milliseconds
    source      'table', or the networks that have this layer
    cuda_batch  the batch on a GPU, which one clip does not fill; 0 if it is not timed there
    """

    kind: str
    target: str
    name: str
    activation: str = "none"
    bar: float | None = None
    goal: str = ""
    note: str = ""
    source: str = TABLE
    dtype: str = "float32"
    batch: int = 1
    cuda_batch: int = 0

    @property
    def geometry(self) -> Geometry | SeparableGeometry | None:
        """None for a network."""
        if self.kind == "networks":
            return None
        geometry = parse_layer(self.target)
        if isinstance(geometry, Geometry):
            return replace(geometry, batch=self.batch)
        return SeparableGeometry(*(replace(stage, batch=self.batch) for stage in geometry.stages))


def table() -> list[Case]:
    """The cases of `cases.csv`, in its order."""
    text = resources.files(__package__).joinpath("cases.csv").read_text(encoding="utf-8")
    return [_case(row) for row in csv.DictReader(text.splitlines())]


def _case(row: dict[str, str]) -> Case:
    geometry = None if row["kind"] == "networks" else parse_layer(row["target"])
    return Case(
        kind=row["kind"],
        target=row["target"],
        name=row["target"] if geometry is None else describe(geometry),
        activation=row["activation"] or "none",
        bar=float(row["bar"]) if row["bar"] else None,
        goal=row["goal"],
        note=row["note"],
        cuda_batch=int(row["cuda_batch"] or 0),
    )


def of_networks(names: tuple[str, ...] = TRACED) -> list[Case]:
    """Every distinct convolution of these networks of the zoo; [] without PyTorch."""
    if not backends.installed("torch"):
        return []
    homes: dict[Geometry, list[str]] = {}
    for name in names:
        for geometry in _convolutions(name):
            users = homes.setdefault(geometry, [])
            if name not in users:
                users.append(name)
    return [
        Case("layers", layer_text(g), describe(g), source=", ".join(users))
        for g, users in homes.items()
    ]


def _convolutions(network: str) -> list[Geometry]:
    """Traced on the `meta` device: nothing is computed."""
    import torch

    from fastconv import zoo
    from fastconv.nn.trace import trace

    with torch.device("meta"):
        model = zoo.build(network).eval()
        layers = trace(model, torch.empty(1, *zoo.NETWORKS[network].input_shape))
    return [layer.geometry for layer in layers if layer.geometry is not None]


def select(
    kinds: Sequence[str],
    filters: Sequence[str] = (),
    traced: bool = True,
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
) -> list[Case]:
    """The cases of some kinds with every filter in name, target or source; the table's first.

    Raises UnsupportedError if none is left, or for an unknown dtype.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UnsupportedError(f"bench: unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}")
    found = [case for case in table() if case.kind in kinds]
    if device != "cpu":
        found = [_batched(case) for case in found if case.cuda_batch]
    if traced and "layers" in kinds:
        known = {case.geometry for case in found if case.kind == "layers"}
        found += [case for case in of_networks() if case.geometry not in known]
    kept = [case for case in found if all(_matches(case, text) for text in filters)]
    if not kept:
        raise UnsupportedError(
            f"bench: no case of {', '.join(kinds)} matches {' and '.join(map(repr, filters))}; "
            "`python -m fastconv bench list` names them"
        )
    return [_in_dtype(case, dtype) for dtype in dtypes for case in kept]


def _batched(case: Case) -> Case:
    batch = case.cuda_batch
    name = case.name if batch == 1 else f"{case.name} x{batch}"
    # Bars and goals are those of a CPU.
    return replace(case, name=name, batch=batch, bar=None, goal="")


def _in_dtype(case: Case, dtype: str) -> Case:
    if dtype == case.dtype:
        return case
    return replace(case, dtype=dtype, name=f"{case.name} {dtype}", bar=None, goal="")


def _matches(case: Case, text: str) -> bool:
    return text.lower() in f"{case.name} | {case.target} | {case.source}".lower()


def describe(geometry: Geometry | SeparableGeometry) -> str:
    """A geometry in words, e.g. 'depthwise 3x3x3 108 /1x2x2, 16x56x56'."""
    if isinstance(geometry, SeparableGeometry):
        t, d, p = geometry.stages
        channels = f"{t.in_channels}->{t.out_channels}"
        stages = f"{_by_x(t.kernel)} {channels}, dw {_by_x(d.kernel)}, pw {p.out_channels}"
        return f"separable {stages}, {_by_x(t.in_size)}"
    g = geometry
    kind, channels = f"grouped/{g.groups}", f"{g.in_channels}->{g.out_channels}"
    if g.groups == 1:
        kind = "pointwise" if g.taps == 1 else "dense"
    elif g.is_depthwise:
        kind = "depthwise"
        channels = channels if g.in_channels != g.out_channels else f"{g.in_channels}"
    kernel = "" if kind == "pointwise" else f" {_by_x(g.kernel)}"
    stride = "" if set(g.stride) == {1} else f" /{_by_x(g.stride)}"
    return f"{kind}{kernel} {channels}{stride}, {_by_x(g.in_size)}"


def _by_x(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))
