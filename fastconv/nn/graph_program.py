"""The steps of a recording with plans and packed weights, ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv import backends, torch_ops
from fastconv.epilogue import Epilogue
from fastconv.plan import CHANNELS_LAST, Plan, Request

from .fold import steps
from .graph import Recording
from .graph_bound import Bound, Work
from .graph_plans import Options, affine, candidates, chosen, expected_ms, folded, pack
from .graph_steps import Blend, Block, Conv, Join, Means, Pool, Step

__all__ = ["Options", "Program", "Work"]


class Program:
    """What a recording computes, for its shapes and for the weights as they are now.

    contiguous  whether modules that stay get contiguous arguments
    """

    def __init__(self, recording: Recording, options: Options, contiguous: bool = False) -> None:
        self.options, self.contiguous = options, contiguous
        self.inputs = recording.inputs
        self.stays = recording.stays
        self.device = self.inputs[0].device
        self.uses_c = options.uses_c and self.device == "cpu"
        can_scale = self.uses_c and options.is_free

        def scales(conv: Conv) -> bool:
            return can_scale and conv.y.dtype == torch.float32

        found, self.result = steps(recording, options.fold, scales)
        self.works = [work for step in found for work in self._works(step)]
        self.sources = recording.sources
        self._idle: dict[int, list[Bound]] = {}

    def __call__(self, args: Sequence[Tensor]) -> Any:
        threads = torch.get_num_threads()
        idle = self._idle.setdefault(threads, [])
        try:
            bound = idle.pop()
        except IndexError:
            bound = self.bind()
        result = bound(args)
        idle.append(bound)
        return result

    def bind(self) -> Bound:
        """Memory and calls for one run at a time."""
        with torch.inference_mode(False), torch.no_grad():
            return Bound(self)

    @property
    def requests(self) -> list[Request]:
        """What the planner was asked."""
        return [work.request for work in self.works if work.request is not None]

    def times(self, args: Sequence[Tensor], repeats: int = 3) -> list[float]:
        """Milliseconds of every step, the least of some runs."""
        bound = self.bind()
        runs = [bound.timed(args) for _ in range(repeats + 1)]
        return [min(each) for each in zip(*runs[1:], strict=True)]

    def _works(self, step: Step) -> list[Work]:
        if isinstance(step, Conv):
            return [self._conv(step)]
        if isinstance(step, Block):
            return self._block(step)
        if isinstance(step, Blend):
            packed = None if step.norm is None else affine(step.norm)
            return [Work(step, packed=packed, in_c=self._small(step))]
        return [Work(step, in_c=isinstance(step, (Means, Pool, Join)) and self._small(step))]

    def _small(self, step: Step) -> bool:
        return self.uses_c and all(v.dtype == torch.float32 for v in (*step.inputs, *step.outputs))

    def _conv(self, step: Conv) -> Work:
        weight, bias = folded(step)
        epilogue = Epilogue(bias is not None, step.activation, step.residual is not None)
        dtype = str(step.y.dtype).removeprefix("torch.")
        options = self.options.of_plan
        if step.scale is not None:
            plan = Plan("grouped", "c", step.geometry, dtype, epilogue)
            grouped = backends.kernel("grouped", "c")
            packed = grouped.prepack_scaled(weight.numpy(), plan, step.input_activation)
            return Work(step, None, plan, packed, bias, True)
        if len(step.x.shape) == 2 and not self.options.is_free:
            options = {"backend": "torch"}  # linear: no convolution that was spoken of
        request = Request.of(
            step.geometry,
            dtype=dtype,
            device=self.device,
            precision=torch_ops.precision_of(weight),
            epilogue=epilogue,
            layout=CHANNELS_LAST,
            **options,
        )
        plan = chosen(request)
        return Work(step, request, plan, pack(plan, weight), bias, plan.backend == "c")

    def _block(self, step: Block) -> list[Work]:
        """The block, or its stages where they are expected to be faster."""
        apart = [self._conv(stage) for stage in step.stages]
        if not self.options.is_free:
            return apart
        weights, biases = zip(*map(folded, step.stages), strict=True)
        epilogues = tuple(
            Epilogue(b is not None, s.activation, s.residual is not None)
            for b, s in zip(biases, step.stages, strict=True)
        )
        request = Request.of(
            step.geometry,
            dtype=str(step.outputs[0].dtype).removeprefix("torch."),
            device=self.device,
            precision=torch_ops.precision_of(weights[0]),
            epilogue=epilogues,  # type: ignore[arg-type]  # three
            layout=CHANNELS_LAST,
            **(self.options.of_plan | {"algorithm": "auto"}),
        )
        best = candidates(request)[0]
        alone = sum(expected_ms(work.request) for work in apart)
        if best.reason is not None or best.plan.backend == "torch":
            return apart
        if (best.measured_ms or best.estimate_ms) > alone:
            return apart
        plan = best.plan
        return [Work(step, request, plan, pack(plan, weights), biases, plan.backend == "c")]
