"""The peers, each used as its own users would: weights prepared beforehand, its own layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastconv import backends
from fastconv.errors import UnsupportedError

from . import runtimes, torch_peers
from .cases import KINDS
from .contenders import Prepared
from .problems import Problem


@dataclass(frozen=True)
class Peer:
    """A way people compute the same thing today.

    packages  must be importable
    prepare   (problem, threads) -> Prepared; raises UnsupportedError with the reason if it cannot
    kinds     the kinds of cases it is for
    short     the head of its column
    """

    name: str
    title: str
    short: str
    packages: tuple[str, ...]
    prepare: Callable[[Problem, int], Prepared]
    kinds: tuple[str, ...] = KINDS

    def missing(self) -> str | None:
        """None, or why it cannot run here at all."""
        absent = [package for package in self.packages if not backends.installed(package)]
        if not absent:
            return None
        return f"{' and '.join(absent)} not installed: pip install 'fastconv[bench]'"


WHOLE = ("layers", "blocks", "networks")
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch", "PyTorch, contiguous", "torch", ("torch",), torch_peers.plain(False)),
        Peer(
            "torch-last", "PyTorch, channels_last_3d", "t.last", ("torch",), torch_peers.plain(True)
        ),
        Peer(
            "torch-compile",
            "torch.compile with freezing",
            "t.comp",
            ("torch",),
            torch_peers.compiled,
            WHOLE,
        ),
        Peer(
            "openvino",
            "OpenVINO, float32",
            "ov.f32",
            ("openvino", "torch"),
            runtimes.openvino("f32"),
        ),
        Peer(
            "openvino-default",
            "OpenVINO, its default precision",
            "ov.def",
            ("openvino", "torch"),
            runtimes.openvino(None),
        ),
        Peer(
            "onnxruntime",
            "ONNX Runtime",
            "ort",
            ("onnxruntime", "onnx", "torch"),
            runtimes.onnxruntime,
            WHOLE,
        ),
        Peer(
            "continual-inference",
            "continual-inference",
            "co",
            ("continual", "torch"),
            runtimes.continual,
            ("streams",),
        ),
    )
}
# A name that stands for several.
GROUPS = {"torch": ("torch", "torch-last")}


def select(text: str) -> list[Peer]:
    """The peers named in a comma-separated list, or 'all' or 'none'.

    Raises UnsupportedError for an unknown name.
    """
    if text == "all":
        return list(PEERS.values())
    names: list[str] = []
    for name in [] if text == "none" else text.split(","):
        if name not in PEERS:
            known = ", ".join(("all", "none", *PEERS))
            raise UnsupportedError(f"bench: unknown peer {name!r}. Known: {known}")
        names += GROUPS.get(name, (name,))
    return [PEERS[name] for name in dict.fromkeys(names)]
