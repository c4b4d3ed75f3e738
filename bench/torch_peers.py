"""PyTorch as a peer, in both memory formats and compiled; and what other peers take from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from fastconv.errors import UnsupportedError
from fastconv.plan import CHANNELS_LAST, CONTIGUOUS

from .contenders import Prepared, Settings, as_array, in_place, inputs, tensor
from .problems import Problem


def module_of(problem: Problem) -> Any:
    """The problem in PyTorch, in eval mode: convolutions with activations, or the network."""
    from torch import nn

    if problem.model is not None:
        return problem.model
    kinds: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    activations = {
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "hardswish": nn.Hardswish,
        "sigmoid": nn.Sigmoid,
    }
    modules: list[Any] = []
    for stage, w, bias in zip(problem.stages, problem.weights, problem.biases, strict=True):
        if any(before != after for before, after in stage.padding):
            raise UnsupportedError("a PyTorch module pads both sides alike")
        conv = kinds[stage.n](
            stage.in_channels,
            stage.out_channels,
            stage.kernel,
            stage.stride,
            tuple(before for before, _ in stage.padding),
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
    """Give a convolution module these values."""
    import torch

    conv.weight = torch.nn.Parameter(torch.from_numpy(w.copy()), requires_grad=False)
    if bias is not None:
        conv.bias = torch.nn.Parameter(torch.from_numpy(bias.copy()), requires_grad=False)


def window(problem: Problem) -> np.ndarray:
    """The input of one call: of a stream, the window whose convolution is the newest column."""
    if problem.case.kind != "streams":
        return problem.x
    return np.ascontiguousarray(np.moveaxis(problem.x[2:], 0, 2))


def newest(problem: Problem, y: Any) -> Any:
    """The answer of a call on `window`."""
    return y[:, :, 0] if problem.case.kind == "streams" else y


def plain(channels_last: bool, tf32: bool = False) -> Callable[[Problem, Settings], Prepared]:
    """PyTorch as it is; of a stream it convolves the whole window again.

    tf32: whether float32 operands may be rounded to TF32 on a GPU
    """

    def prepare(problem: Problem, settings: Settings) -> Prepared:
        if tf32 and problem.case.dtype != "float32":
            raise UnsupportedError("TF32 is for float32")
        if problem.gradient is not None:
            return _training(problem, settings, channels_last, tf32)
        module, xs = _made(problem, settings, channels_last)
        return _prepared(problem, settings, module, xs, tf32)

    return prepare


def _training(problem: Problem, settings: Settings, channels_last: bool, tf32: bool) -> Prepared:
    """Forward and backward by autograd: y, and the gradients of x and w."""
    import torch

    (stage,) = problem.stages
    if stage.n != 3 or any(before != after for before, after in stage.padding):
        raise UnsupportedError("is for three axes, padded on both sides alike")
    padding = tuple(before for before, _ in stage.padding)
    arguments = (stage.stride, padding, stage.dilation, stage.groups)

    def run(x: Any, w: Any) -> Any:
        return torch.nn.functional.conv3d(x, w, None, *arguments)

    call = in_place(forward_backward(problem, settings, channels_last, run), settings, tf32)
    precision = "tf32" if tf32 else problem.case.dtype
    return Prepared(call, lambda: as_array(call()), precision)


def forward_backward(
    problem: Problem, settings: Settings, channels_last: bool, run: Callable[[Any, Any], Any]
) -> Callable[[], Any]:
    """() -> (y, gradient of x, gradient of w) of y = run(x, w)."""
    import torch

    assert problem.gradient is not None
    dtype, layout = problem.case.dtype, CHANNELS_LAST if channels_last else CONTIGUOUS
    xs = inputs(problem.x, layout, dtype, settings)
    gs = inputs(problem.gradient, layout, dtype, settings)
    w = tensor(problem.weights[0], layout, dtype, settings.device).requires_grad_()

    def call() -> Any:
        x = next(xs).detach().requires_grad_()
        y = run(x, w)
        return (y.detach(), *torch.autograd.grad(y, (x, w), next(gs)))

    return call


def compiled(problem: Problem, settings: Settings) -> Prepared:
    """torch.compile with weights frozen into the graph, activations channels last."""
    import torch
    import torch._dynamo
    import torch._inductor.config as inductor

    module, xs = _made(problem, settings, channels_last=True)
    # Each case is a new model, not a recompilation of the last.
    torch._dynamo.reset()
    fast = torch.compile(module)
    # One compiler thread: the processes of a pool start late and compute beside what is timed.
    with torch.inference_mode(), inductor.patch(freezing=True, compile_threads=1):
        fast(next(xs))  # type: ignore[no-untyped-call]
    return _prepared(problem, settings, fast, xs)


def _made(problem: Problem, settings: Settings, channels_last: bool) -> tuple[Any, Any]:
    import torch

    x, dtype = window(problem), problem.case.dtype
    if channels_last and x.ndim != 5:
        raise UnsupportedError("channels_last_3d is for three axes")
    module = copy.deepcopy(module_of(problem)).to(settings.device, getattr(torch, dtype))
    if channels_last:
        module = module.to(memory_format=torch.channels_last_3d)
    layout = CHANNELS_LAST if channels_last else CONTIGUOUS
    return module, inputs(x, layout, dtype, settings)


def _prepared(
    problem: Problem, settings: Settings, module: Any, xs: Any, tf32: bool = False
) -> Prepared:
    import torch

    def call() -> Any:
        with torch.inference_mode():
            return module(next(xs))

    run = in_place(call, settings, tf32)
    precision = "tf32" if tf32 else problem.case.dtype
    return Prepared(run, lambda: newest(problem, as_array(run())), precision)
