"""PyTorch itself as a peer, in both memory formats and compiled; and what the other peers take from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from fastconv.errors import UnsupportedError

from .contenders import Prepared, as_array
from .problems import Problem


def module_of(problem: Problem) -> Any:
    """The problem in PyTorch, in eval mode: convolutions with their activations, or the network."""
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
        set_weights(conv, w, bias)
        modules.append(conv)
        if problem.case.activation != "none":
            modules.append(activations[problem.case.activation]())
    return nn.Sequential(*modules).eval()


def set_weights(conv: Any, w: np.ndarray, bias: np.ndarray | None) -> None:
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


def plain(channels_last: bool) -> Callable[[Problem, int], Prepared]:
    """PyTorch as it is; of a stream it convolves the whole window again."""

    def prepare(problem: Problem, threads: int) -> Prepared:
        module, x = _inputs(problem, channels_last)
        return _prepared(problem, module, x)

    return prepare


def compiled(problem: Problem, threads: int) -> Prepared:
    """torch.compile with weights frozen into the graph, activations channels last."""
    import torch
    import torch._dynamo
    import torch._inductor.config as inductor

    module, x = _inputs(problem, channels_last=True)
    torch._dynamo.reset()  # each case is a new model, not a recompilation of the last
    fast = torch.compile(module)
    with torch.inference_mode(), inductor.patch(freezing=True):
        fast(x)
    return _prepared(problem, fast, x)


def _inputs(problem: Problem, channels_last: bool) -> tuple[Any, Any]:
    import torch

    module, x = copy.deepcopy(module_of(problem)), torch.from_numpy(window(problem))
    if channels_last:
        if x.dim() != 5:
            raise UnsupportedError("channels_last_3d is for three axes")
        module = module.to(memory_format=torch.channels_last_3d)
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return module, x


def _prepared(problem: Problem, module: Any, x: Any) -> Prepared:
    import torch

    def call() -> Any:
        with torch.inference_mode():
            return module(x)

    return Prepared(call, lambda: newest(problem, as_array(call())))
