"""Packed weights of tensors, kept for as long as the tensor lives and is not written."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops
from .layouts import CONTIGUOUS
from .plan import Plan

ON_TENSORS = ("torch", "triton")  # backends whose kernels take tensors; the others see memory
_SAMPLES = 256  # elements that guard packed weights against writes PyTorch does not count
_FEW = 4096  # elements that are all compared
_packed: dict[int, tuple[weakref.ref[Tensor], PackedWeights]] = {}  # by id of the weight tensor
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():  # which writes by operators that are counted
        _steps += 1


# Every optimiser's step, of classes nobody here knows too: some write through `.data`.
register_optimizer_step_post_hook(_count_step)


class PackedWeights:
    """The packed forms of one weight tensor, for as long as nobody writes it.

    A write is seen by PyTorch's version counter. An optimiser may write what it trains without
    being counted, so its step is a write of every tensor with a gradient. Writes elsewhere, through
    `.data` and other aliases, are seen by comparing elements, of large tensors a sample of them.
    Inference tensors have no counter: there all elements are compared.
    """

    def __init__(self, weight: Tensor) -> None:
        self._pointer, self._version, self._steps = weight.data_ptr(), _version(weight), _steps
        self._counted, self._strides = self._version >= 0, weight.stride()
        self._sample = _sample(weight)
        self._values = self._sample.tobytes()
        # By runner: the form, stream and event of its packing, what it was packed together with.
        self._packed: dict[Any, tuple[Any, Any, Any, tuple[Any, ...]]] = {}

    def are_of(self, weight: Tensor, frozen: bool = False) -> bool:
        """Whether this is still the memory and the content that was packed.

        frozen: nobody writes it without being counted
        """
        if weight.data_ptr() != self._pointer:
            return False
        if self._counted and weight._version != self._version:
            return False
        if weight.stride() != self._strides:
            return False  # the same memory in another order
        if frozen:
            return True
        if not self._counted and weight.device.type != "cpu":
            return False  # nothing tells
        return (
            self._steps == _steps or not weight.requires_grad
        ) and self._sample.tobytes() == self._values

    def form(self, runner: Any, weight: Tensor) -> Any:
        """The weights in the form that a plan's kernel reads."""
        held = self._packed.get(runner)
        if held is None:
            packed = pack(runner.plan, weight)
            if _recording(weight):
                return packed  # memory of the graph, written when it is replayed
            held = self._packed[runner] = (packed, *_moment(weight), ())
        return held[0] if held[1] is None else self._current(held, weight)

    @staticmethod
    def _current(held: tuple[Any, ...], weight: Tensor) -> Any:
        packed, stream, event, _ = held
        if stream is None or torch.cuda.current_stream(weight.device) == stream:
            return packed
        # Packed on one stream, read on another. What was packed before a graph is recorded is done:
        # recording begins with a wait for everything.
        if not _recording(weight):
            torch.cuda.current_stream(weight.device).wait_event(event)
        return packed

    def form_with(self, runner: Any, weights: tuple[Tensor, ...], others: tuple[Any, ...]) -> Any:
        """`form` of several tensors, of which this one is the first; others: the PackedWeights of
        the rest, which are new ones if they were written."""
        held = self._packed.get(runner)
        if held is None or any(a is not b for a, b in zip(held[3], others, strict=True)):
            packed = pack(runner.plan, weights)
            if _recording(weights[0]):
                return packed
            held = self._packed[runner] = (packed, *_moment(weights[0]), others)
        return self._current(held, weights[0])

    def drop(self) -> None:
        """Pack again when a form is asked for next."""
        self._packed.clear()


def _recording(weight: Tensor) -> bool:
    """Whether a CUDA graph is being recorded."""
    return weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _moment(weight: Tensor) -> tuple[Any, Any]:
    """The stream on which something was just made, and an event behind it; None on a CPU."""
    if weight.device.type != "cuda":
        return None, None
    stream = torch.cuda.current_stream(weight.device)
    return stream, stream.record_event()


def held_weights(weight: Tensor, frozen: bool = False) -> PackedWeights:
    """The packed weights kept for a tensor, new ones if it was written meanwhile."""
    key = id(weight)
    known = _packed.get(key)
    if known is not None and known[0]() is weight and known[1].are_of(weight, frozen):
        return known[1]
    held = PackedWeights(weight)

    def forget(reference: weakref.ref[Tensor]) -> None:
        last = _packed.get(key)
        if last is not None and last[0] is reference:
            del _packed[key]

    _packed[key] = (weakref.ref(weight, forget), held)
    return held


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> np.ndarray:
    """A view of evenly spaced elements, about _SAMPLES; of all where they are few or no counter
    helps.

    Empty where NumPy cannot see them.
    """
    if weight.device.type != "cpu" or weight.dim() < 3:  # frozen weights have one axis
        return np.empty(0)
    # NumPy has no bfloat16: precisions of two bytes are seen as integers.
    weight = weight.detach()
    array = (weight.view(torch.int16) if weight.element_size() == 2 else weight).numpy()
    layout = ops.dense_layout(array)
    if layout is None:
        return array  # with gaps, which weights seldom have: all of it
    flat = (array if layout == CONTIGUOUS else np.moveaxis(array, 1, -1)).reshape(-1)
    every = weight.is_inference() or flat.size <= _FEW
    return flat[:: 1 if every else flat.size // _SAMPLES]


def pack(plan: Plan, weights: Any) -> Any:
    """Weights, a tensor or a tuple of them, in the form that a plan's kernel reads."""
    if plan.backend in ON_TENSORS:
        return ops.pack(plan, weights)
    views = tuple(map(view, weights)) if isinstance(weights, tuple) else view(weights)
    return ops.pack(plan, views)


def view(tensor: Tensor | None) -> Any:
    """A NumPy array of the same memory; None stays None."""
    return None if tensor is None else tensor.detach().numpy()
