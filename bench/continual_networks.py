"""Continual networks, timed on one frame: ours, and continual-inference's of the same weights.

A stream begins with its first frame repeated, so that every network is warm at once. The other
peers compute the clip network on its whole clip again, as one does without a stream; their answer
is another one, and is checked against their own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.errors import UnsupportedError

from .cases import Case
from .contenders import Prepared, Settings, as_array, in_place
from .problems import Problem

if TYPE_CHECKING:
    from fastconv.nn.to_continual import ContinualNetwork

FORM = "auto"  # of the memory


def problem_of(case: Case, clip: Problem) -> Problem:
    """The problem of a stream, from that of its clip network, which the other peers get."""
    import torch

    assert clip.model is not None
    exact = _network(clip, "torch", copy.deepcopy(clip.model).double())
    plain = _network(clip, "torch", clip.model)
    want = _last(exact, torch.from_numpy(clip.x).double())
    problem = Problem(case, clip.x, want, 0.0, model=clip.model, clip=clip)
    problem.direct_rms = problem.errors(_last(plain, torch.from_numpy(clip.x)))[1]
    return problem


def ours(problem: Problem, backend: str, settings: Settings) -> Prepared:
    """`to_continual`, one `forward_step` a call."""
    import torch

    if problem.case.dtype != "float32":
        raise UnsupportedError("continual networks are timed in float32")
    assert problem.model is not None
    model = copy.deepcopy(problem.model).to(settings.device)
    network = _network(problem, backend, model)
    x = torch.from_numpy(problem.x).to(settings.device)
    frame = x[:, :, 0].contiguous(memory_format=torch.channels_last)
    network.forward_step(frame)
    plans = tuple(network.plans())
    used = "+".join(dict.fromkeys(plan.backend for plan in plans))

    def call() -> Any:
        with torch.inference_mode():
            return network.forward_step(frame)

    def output() -> np.ndarray:
        return _last(_network(problem, backend, model), x)

    return Prepared(in_place(call, settings), output, "float32", f"{used} to_continual", plans)


def _network(problem: Problem, backend: str, model: Any) -> ContinualNetwork:
    import torch

    from fastconv.nn.to_continual import to_continual

    clip = torch.empty(problem.x.shape, device="meta")
    return to_continual(model, clip, start="replicate", backend=backend, form=FORM)


def _last(network: ContinualNetwork, x: Any) -> np.ndarray:
    """The output of the last frame of a stream."""
    step = None
    for frame in x.unbind(2):
        step = network.forward_step(frame)
    assert step is not None
    return as_array(step.output)


def continual_inference(problem: Problem, settings: Settings) -> Prepared:
    """X3D put together from continual-inference's modules, as its authors did."""
    import torch

    if problem.case.dtype != "float32":
        raise UnsupportedError("is timed in float32")
    if not problem.case.target.startswith("cox3d"):
        raise UnsupportedError("only CoX3D is put together from its modules")
    x = torch.from_numpy(problem.x).to(settings.device)
    window = x.shape[2]

    def warm() -> Any:
        network = _cox3d(copy.deepcopy(problem.model), window).eval().to(settings.device)
        with torch.inference_mode():
            for _ in range(network.receptive_field - 1):
                network.forward_step(x[:, :, 0])
        return network

    network = warm()

    def call() -> Any:
        with torch.inference_mode():
            return network.forward_step(x[:, :, 0])

    def output() -> np.ndarray:
        spare = warm()
        with torch.inference_mode():
            y = as_array([spare.forward_step(frame) for frame in x.unbind(2)][-1])
        return y.reshape(y.shape[:2])

    return Prepared(in_place(call, settings), output)


def _cox3d(model: Any, window: int) -> Any:
    """The zoo's X3D in continual-inference's modules, around the same weights."""
    import continual as co
    from torch import nn

    def each(*parts: Any) -> Any:
        return co.forward_stepping(nn.Sequential(*parts))

    def block(b: Any) -> Any:
        branch = co.Sequential(
            each(b.expand),
            co.Conv3d.build_from(b.depthwise.conv),
            each(b.depthwise.bn, b.excite, b.swish, b.project),
        )
        shortcut = co.Sequential(each(b.shortcut), co.Delay(1))
        return co.Sequential(
            co.BroadcastReduce(branch, shortcut, reduce="sum", auto_delay=False), each(b.relu)
        )

    stem, head = model.stem, model.head
    linear = head.classifier
    classifier = nn.Conv3d(linear.in_features, linear.out_features, 1)  # frames keep their axes
    classifier.weight.data = linear.weight.data[:, :, None, None, None]
    classifier.bias = linear.bias
    return co.Sequential(
        each(stem.space),
        co.Conv3d.build_from(stem.time),
        each(stem.bn, stem.relu),
        *(block(b) for stage in model.stages for b in stage),
        each(head.features, nn.AdaptiveAvgPool3d((None, 1, 1))),
        co.AvgPool3d((window, 1, 1), stride=1),
        each(head.hidden, head.relu, classifier),
    )
