"""`accelerate`: a model as few passes over memory on our kernels, checked against the original."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastconv import planner, winners
from fastconv.autotune import tune_request
from fastconv.errors import UnsupportedError

from .conv import Conv1d, Conv2d, Conv3d
from .graph_forward import Forward, forwards, install, tensors_of
from .graph_program import Options, Work
from .graph_steps import Block, Conv, Other
from .report import NETWORK_MARGIN, Replacement, Report, describe, distance
from .trace import Layer, call_converted, trace

__all__ = ["NETWORK_MARGIN", "Replacement", "Report", "accelerate", "describe", "distance"]

REPLACEMENTS: dict[type[nn.Module], type[Conv1d | Conv2d | Conv3d]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}


def accelerate(
    model: nn.Module,
    example_input: Any,
    *,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = planner.DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
    tune: bool = False,
    check: bool = True,
    fold: bool = True,
    times: bool = False,
) -> tuple[nn.Module, Report]:
    """A copy of an eval-mode model that runs on our kernels, and a report.

    example_input  a tensor, or a tuple of positional arguments; tensors may lie in lists, tuples
                   and dictionaries
    algorithm, backend, tolerance, max_workspace_bytes: as for `fastconv.conv3d`, per layer
    tune           measure which plan is fastest for every layer, see `fastconv.tune`; seconds per
                   layer, but results are kept: what was measured before is not measured again
    check          compare both models with the model in float64 on the example input, and with each
                   other on its mirror image
    fold           batch norms are computed as part of the weights in front of them; without, they
                   stay a pass of their own
    times          measure every layer of the new model for the report

    The copy is of the model's own class, shares parameters and buffers with it and has the same
    state dict and signature; the model itself is not changed. Without a gradient and in eval mode
    it runs as a flat list of kernel calls, made for every input shape when it first comes:
    activations channels last throughout, batch norms, activations, sums and squeeze-and-excitation
    within the convolutions. In training mode, or where a gradient may be asked for, its modules run
    one by one, with our convolutions in the place of PyTorch's. A module that cannot be recorded
    (its control flow looks at numbers, it writes its buffers or inputs, it has hooks) stays as it
    is, and its children are recorded instead. A parameter that is written or replaced is seen. Of
    writes that PyTorch does not count, through `.data` or an array, those are seen that change the
    first or the last element of a tensor on a CPU; for others `accelerated.forward.forget_plans()`
    is there.

    Raises UnsupportedError for a model in training mode, and if the error of the outputs on the
    example input is beyond `Report.allowed`.
    """
    if any(module.training for module in model.modules()):
        raise UnsupportedError("accelerate: the model is in training mode; call model.eval() first")
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    options = Options(algorithm, backend, float(tolerance), max_workspace_bytes, fold)
    layers = trace(model, *_fresh(args))
    with torch.inference_mode():
        try:
            new, last = _rewritten(model, options, channels_last=True), True
            got = _output(new, args)
        except RuntimeError:
            # A `view` that needs contiguous activations; any other error comes again here.
            new, last = _rewritten(model, options, channels_last=False), False
            got = _output(new, args)
        if tune and _tune(new):
            got = _output(new, args)
        want = _output(model, args)
        exact = _in_float64(model, args) if check else want
        mirrored = _mirrored(model, new, args) if check else 0.0
    rows = _Rows(new, args, times).of(layers)
    factor = max((row.error_factor for row in rows), default=1.0)
    errors = distance(got, exact), distance(want, exact)
    roundoff = max((torch.finfo(t.dtype).eps for t in want if t.is_floating_point()), default=0.0)
    traced, stays, others = _left(new, args)
    numbers = min((t.numel() for t in want if t.is_floating_point()), default=0)
    report = Report(rows, max(factor, 1.0), *errors, numbers, roundoff, last, traced, stays, others)
    if check:
        _refuse_beyond(report, mirrored)
    return new, report


def _refuse_beyond(report: Report, mirrored: float) -> None:
    if not report.error <= report.allowed:
        raise UnsupportedError(
            f"accelerate: the error of the outputs is {report.error:.1e} of the largest one, "
            f"allowed is {report.allowed:.1e}"
        )
    # Both are as far from exact as they may be.
    allowed = 2 * report.allowed
    if not mirrored <= allowed:
        raise UnsupportedError(
            f"accelerate: on the mirrored example input the models differ by {mirrored:.1e} of the "
            f"largest output, allowed is {allowed:.1e}: what the model computes seems to depend on "
            "the numbers in its input in a way that was not seen"
        )


def _mirrored(model: nn.Module, new: nn.Module, args: tuple[Any, ...]) -> float:
    """How far the models are from each other on other numbers of the same shapes."""

    def mirror(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
        return value.flip(-1) if floating else value

    other = tree_map(mirror, args)
    return distance(_output(new, other), _output(model, other))


def _tune(model: nn.Module) -> bool:
    """Measure what the model's convolutions asked for and nobody measured yet; whether anything."""
    modules = [m for m in model.modules() if isinstance(m, (Conv1d, Conv2d, Conv3d))]
    recorded = forwards(model)
    asked = dict.fromkeys(
        [request for f in recorded for program in f.programs for request in program.requests]
        + [request for module in modules for request in module.requests()]
    )
    new = [request for request in asked if winners.find(request) is None]
    for request in new:
        tune_request(request)
    for planned in (*modules, *recorded) if new else ():
        planned.forget_plans()
    return bool(new)


def _fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in lists and dictionaries of their own: models write those they are given."""
    fresh: tuple[Any, ...] = tree_map(lambda leaf: leaf, args)
    return fresh


def _output(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    return _leaves(model(*_fresh(args)))


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _in_float64(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        return _leaves(call_converted(model, tree_map(double, args), double))
    except RuntimeError as error:
        raise UnsupportedError(
            "accelerate: the model does not run in float64, which its check needs "
            f"({error}); pass check=False to go without"
        ) from error


def _rewritten(model: nn.Module, options: Options, channels_last: bool) -> nn.Module:
    """A deep copy of the modules around the same parameters and buffers, convolutions converted,
    with a Forward."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    new = copy.deepcopy(model, shared)
    converted: dict[int, nn.Module] = {}
    keywords = options.of_plan | {"channels_last": channels_last}
    for parent in list(new.modules()):
        for name, child in list(parent._modules.items()):
            replacement = None if child is None else REPLACEMENTS.get(type(child))
            if child is not None and replacement is not None:
                if id(child) not in converted:
                    converted[id(child)] = replacement.convert(child, **keywords)
                setattr(parent, name, converted[id(child)])
    root = REPLACEMENTS.get(type(new))
    if root is not None:
        return root.convert(new, **keywords)
    install(new, options, contiguous=not channels_last)
    return new


def _left(model: nn.Module, args: tuple[Any, ...]) -> tuple[bool, tuple[Any, ...], tuple[Any, ...]]:
    """For the report: whether one program is all, which modules stay, what is left to PyTorch."""
    names = {module: name for name, module in model.named_modules()}
    stays: dict[str, str] = {}
    others: Counter[str] = Counter()
    for forward in forwards(model):
        if forward.refused:
            stays[names[forward.module]] = forward.refused
        for program in forward.programs:
            stays |= {names[module]: reason for module, reason in program.stays.items()}
            steps = (work.step for work in program.works)
            others.update(s.operation.name or "module" for s in steps if isinstance(s, Other))
    own = model.__dict__.get("forward")
    traced = isinstance(own, Forward) and own.program_of(args) is not None
    return traced, tuple(sorted(stays.items())), tuple(sorted(others.items()))


class _Rows:
    """One row per call of a convolution: where it ran, or why it is PyTorch's."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], times: bool) -> None:
        self.modules = dict(model.named_modules())
        names = {module: name for name, module in self.modules.items()}
        self.found: dict[str, list[Replacement]] = defaultdict(list)
        for forward in forwards(model):
            prefix = names[forward.module] + "." if names[forward.module] else ""
            for program in forward.programs:
                # Only the model's own example is at hand.
                timed = times and forward.module is model and program is forward.program_of(args)
                measured = (
                    program.times(tensors_of(args)[0]) if timed else [None] * len(program.works)
                )
                for work, ms in zip(program.works, measured, strict=True):
                    self._note(work, prefix, ms)

    def _note(self, work: Work, prefix: str, ms: float | None) -> None:
        step, plan = work.step, work.plan
        if not isinstance(step, (Conv, Block)) or plan is None:
            return
        stages = step.stages if isinstance(step, Block) else (step,)
        for stage in stages:
            name, whole = prefix + stage.name, f"the block that ends with {stages[-1].name}"
            fused = tuple(stage.fused) if len(stages) == 1 else (*stage.fused, whole)
            last = stage is stages[-1]
            factor = planner.error_factor(plan)
            self.found[name].append(
                Replacement(name, "", plan, "", fused, factor, ms if last else None)
            )

    def of(self, layers: list[Layer]) -> tuple[Replacement, ...]:
        return tuple(self._row(layer) for layer in layers if layer.kind != "linear")

    def _row(self, layer: Layer) -> Replacement:
        noted, module = self.found[layer.name], self.modules[layer.name]
        if noted:
            row = noted.pop(0) if len(noted) > 1 else noted[0]
            return Replacement(**(vars(row) | {"module": layer.module}))
        if isinstance(module, (Conv1d, Conv2d, Conv3d)):
            plan = module.plan_of(layer.x_shape)
            if plan is not None:
                factor = planner.error_factor(plan)
                return Replacement(layer.name, layer.module, plan, error_factor=factor)
        reason = layer.note or "not PyTorch's own class"
        return Replacement(layer.name, layer.module, reason=reason)
