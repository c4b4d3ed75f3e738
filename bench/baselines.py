"""The peers, each used as its own users would: weights prepared beforehand, its own input layout, one call timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv import backends
from fastconv.errors import UnsupportedError

from .contenders import Prepared
from .ours import as_array
from .problems import Problem


@dataclass(frozen=True)
class Peer:
    """A way people compute the same thing today.

    package   must be importable; `version_of` names the distribution whose version is reported
    prepare   (problem, threads) -> Prepared; raises UnsupportedError with the reason where it cannot
    kinds     the kinds of cases it is for
    """

    name: str
    title: str
    package: str
    prepare: Callable[[Problem, int], Prepared]
    kinds: tuple[str, ...] = ("layers", "blocks", "networks", "streams")

    def missing(self) -> str | None:
        """None, or why it cannot run here at all."""
        needs = [self.package] if self.package == "torch" else [self.package, "torch"]
        absent = [p for p in needs if not backends.installed(p)]
        return f"{absent[0]} is not installed: pip install 'fastconv[bench]'" if absent else None


def torch_module(problem: Problem) -> Any:
    """The problem as PyTorch modules in eval mode: a convolution per stage with its activation, or the network."""
    from torch import nn

    if problem.model is not None:
        return problem.model
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    activations = {
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "hardswish": nn.Hardswish,
        "sigmoid": nn.Sigmoid,
    }
    modules: list[Any] = []
    for stage, w, bias in zip(problem.stages, problem.weights, problem.biases, strict=True):
        if any(a != b for a, b in stage.padding):
            raise UnsupportedError("a module pads both sides alike")
        conv = kinds[stage.n](
            stage.in_channels,
            stage.out_channels,
            stage.kernel,
            stage.stride,
            tuple(a for a, _ in stage.padding),
            stage.dilation,
            stage.groups,
            bias is not None,
        )
        _set_weights(conv, w, bias)
        modules.append(conv)
        if problem.case.activation != "none":
            modules.append(activations[problem.case.activation]())
    return nn.Sequential(*modules).eval()


def _set_weights(conv: Any, w: np.ndarray, bias: np.ndarray | None) -> None:
    import torch

    conv.weight = torch.nn.Parameter(torch.from_numpy(w.copy()), requires_grad=False)
    if bias is not None:
        conv.bias = torch.nn.Parameter(torch.from_numpy(bias.copy()), requires_grad=False)


def window(problem: Problem) -> np.ndarray:
    """The input of one call: for streams the window whose convolution gives the newest column."""
    if problem.case.kind != "streams":
        return problem.x
    return np.ascontiguousarray(np.moveaxis(problem.x[2:], 0, 2))


def newest(problem: Problem, y: np.ndarray) -> np.ndarray:
    """The answer of a call on `window`."""
    return y[:, :, 0] if problem.case.kind == "streams" else y


def torch_plain(channels_last: bool) -> Callable[[Problem, int], Prepared]:
    """PyTorch as it is, in one of its memory formats; on a stream it convolves the whole window again."""

    def prepare(problem: Problem, threads: int) -> Prepared:
        module, x = _torch(problem, channels_last)
        return _torch_prepared(problem, module, x)

    return prepare


def torch_compiled(problem: Problem, threads: int) -> Prepared:
    """torch.compile with weights frozen into the graph, activations channels last."""
    import torch
    import torch._dynamo
    import torch._inductor.config as inductor

    module, x = _torch(problem, channels_last=True)
    torch._dynamo.reset()  # each case is a new model, not a recompilation of the last
    compiled = torch.compile(module)
    with torch.inference_mode(), inductor.patch(freezing=True):
        compiled(x)
    return _torch_prepared(problem, compiled, x)


def _torch(problem: Problem, channels_last: bool) -> tuple[Any, Any]:
    import copy

    import torch

    module, x = copy.deepcopy(torch_module(problem)), torch.from_numpy(window(problem))
    if channels_last:
        if x.dim() != 5:
            raise UnsupportedError("channels_last_3d is for three axes")
        module = module.to(memory_format=torch.channels_last_3d)
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return module, x


def _torch_prepared(problem: Problem, module: Any, x: Any) -> Prepared:
    import torch

    def call() -> Any:
        with torch.inference_mode():
            return module(x)

    return Prepared(call, lambda: newest(problem, as_array(call())))


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch", "PyTorch, contiguous", "torch", torch_plain(channels_last=False)),
        Peer("torch-last", "PyTorch, channels_last_3d", "torch", torch_plain(channels_last=True)),
        Peer("torch-compile", "torch.compile with freezing", "torch", torch_compiled),
    )
}
# A name that stands for several.
GROUPS = {"torch": ("torch", "torch-last")}


def select(text: str) -> list[Peer]:
    """The peers named in a comma-separated list; 'all' and 'none' too. Raises UnsupportedError for an unknown name."""
    if text == "all":
        return list(PEERS.values())
    names: list[str] = []
    for name in [] if text == "none" else text.split(","):
        if name not in PEERS:
            known = ", ".join(("all", "none", *PEERS))
            raise UnsupportedError(f"bench: unknown peer {name!r}. Known: {known}")
        names += GROUPS.get(name, (name,))
    return [PEERS[name] for name in dict.fromkeys(names)]
