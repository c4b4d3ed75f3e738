"""The peers, each used as its own users would: weights prepared beforehand, its own layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastconv import backends
from fastconv.errors import UnsupportedError

from . import cases, runtimes, torch_peers
from .contenders import Prepared, Settings
from .problems import Problem


@dataclass(frozen=True)
class Peer:
    """A way people compute the same thing today.

    packages  must be importable
    prepare   (problem, settings) -> Prepared; raises UnsupportedError with the reason if it cannot
    kinds     the kinds of cases it is for
    devices   where it runs
    short     the head of its column
    cuda_kinds  on a GPU for these kinds alone
    process   on a CPU, peers of the same name here are timed in one process; '' stands for `name`
    streams   it has continual networks
    """

    name: str
    title: str
    short: str
    packages: tuple[str, ...]
    prepare: Callable[[Problem, Settings], Prepared]
    kinds: tuple[str, ...] = cases.KINDS
    devices: tuple[str, ...] = ("cpu", "cuda")
    process: str = ""
    cuda_kinds: tuple[str, ...] | None = None
    streams: bool = False

    def missing(self) -> str | None:
        """None, or why it cannot run here at all."""
        absent = [package for package in self.packages if not backends.installed(package)]
        if not absent:
            return None
        return f"{' and '.join(absent)} not installed: pip install 'fastconv[bench]'"

    def refusal(self, kind: str, device: str) -> tuple[str, str] | None:
        """Status and reason for not even trying a case of this kind."""
        if kind not in self.kinds:
            return "unsupported", f"is for {', '.join(self.kinds)}"
        if device == "cuda" and self.cuda_kinds is not None and kind not in self.cuda_kinds:
            return "unsupported", f"on a GPU is for {', '.join(self.cuda_kinds)}"
        if device not in self.devices:
            return "unsupported", f"is for {' and '.join(self.devices)}"
        missing = self.missing()
        return None if missing is None else ("unavailable", missing)


TORCH = ("torch",)
OPENVINO = ("openvino", "torch")
ONNX = ("onnxruntime", "onnx", "torch")
WHOLE = ("layers", "blocks", "networks")
INFERENCE = (*WHOLE, "streams")
CPU, GPU = ("cpu",), ("cuda",)
_ALL = (
    Peer("torch", "PyTorch", "torch", TORCH, torch_peers.plain(False), process="torch"),
    Peer(
        "torch-last",
        "PyTorch channels_last_3d",
        "t.last",
        TORCH,
        torch_peers.plain(True),
        process="torch",
    ),
    Peer(
        "torch-tf32",
        "PyTorch TF32",
        "t.tf32",
        TORCH,
        torch_peers.plain(False, True),
        cases.KINDS,
        GPU,
    ),
    Peer(
        "torch-last-tf32",
        "PyTorch channels_last_3d TF32",
        "tl.tf32",
        TORCH,
        torch_peers.plain(True, True),
        cases.KINDS,
        GPU,
    ),
    Peer("openvino", "OpenVINO", "ov.f32", OPENVINO, runtimes.openvino("f32"), INFERENCE, CPU),
    Peer(
        "openvino-default",
        "OpenVINO default precision",
        "ov.def",
        OPENVINO,
        runtimes.openvino(None),
        INFERENCE,
        CPU,
        "openvino",
    ),
    Peer("onnxruntime", "ONNX Runtime", "ort", ONNX, runtimes.onnxruntime, WHOLE, CPU),
    Peer(
        "continual-inference",
        "continual-inference",
        "co",
        ("continual", "torch"),
        runtimes.continual,
        ("streams", "networks"),
        streams=True,
    ),
    # Last, for compiling a network takes longer than timing it.
    Peer(
        "torch-compile",
        "torch.compile frozen",
        "t.comp",
        TORCH,
        torch_peers.compiled,
        WHOLE,
        cuda_kinds=("networks",),
    ),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
# A name that stands for several.
GROUPS = {"torch": ("torch", "torch-last")}


def select(text: str, device: str = "cpu") -> list[Peer]:
    """The peers named in a comma-separated list, or 'all' those of a device, or 'none'.

    Raises UnsupportedError for an unknown name.
    """
    if text == "all":
        return [peer for peer in PEERS.values() if device in peer.devices]
    names: list[str] = []
    for name in [] if text == "none" else text.split(","):
        if name not in PEERS:
            known = ", ".join(("all", "none", *PEERS))
            raise UnsupportedError(f"bench: unknown peer {name!r}. Known: {known}")
        names += GROUPS.get(name, (name,))
    return [PEERS[name] for name in dict.fromkeys(names)]
