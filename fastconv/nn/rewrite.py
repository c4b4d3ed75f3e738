"""`accelerate`: a model with its convolutions on our kernels, checked against the original."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastconv import planner, winners
from fastconv.autotune import tune_request
from fastconv.errors import UnsupportedError
from fastconv.geometry import Geometry
from fastconv.plan import Plan

from .conv import Conv1d, Conv2d, Conv3d
from .trace import Layer, call_converted, trace

REPLACEMENTS: dict[type[nn.Module], type[Conv1d | Conv2d | Conv3d]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}
# The two errors are one random draw each; twice covers their spread.
NETWORK_MARGIN = 2.0


@dataclass(frozen=True)
class Replacement:
    """One convolution: its plan on the example input, or the reason why it stays PyTorch's."""

    name: str
    module: str
    plan: Plan | None = None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `accelerate` did. `str(report)` is a table.

    layers          one Replacement per call of a convolution, in execution order
    error_factor    largest expected layer error, as a multiple of a direct sum's
    error           max |accelerated - exact| / max |exact| on the example input; exact is the model
                    in float64
    original_error  the same of the model itself
    roundoff        the spacing of numbers near 1 in the precision of the outputs
    channels_last   whether activations are kept channels last from the first convolution on

    Without the check, `error` is the distance to the model itself and `original_error` is 0.
    """

    layers: tuple[Replacement, ...]
    error_factor: float
    error: float
    original_error: float
    roundoff: float
    channels_last: bool

    @property
    def allowed(self) -> float:
        """The bound on `error`: the model's own, times the worst layer's factor and a margin.

        An own error below four units in the last place is luck, not a measure.
        """
        own = max(self.original_error, 4 * self.roundoff)
        return NETWORK_MARGIN * self.error_factor * own

    def __str__(self) -> str:
        rows = [("layer", "geometry", "algorithm", "backend")]
        for layer in self.layers:
            if layer.plan is None:
                rows.append((layer.name, layer.module, "unchanged: " + layer.reason, ""))
            else:
                rows.append(
                    (layer.name, describe(layer.plan), layer.plan.algorithm, layer.plan.backend)
                )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        done = sum(layer.plan is not None for layer in self.layers)
        lines.append(
            f"{done} of {len(self.layers)} convolutions replaced; "
            f"error {self.error:.1e} of the largest output"
        )
        return "\n".join(lines)


def describe(plan: Plan) -> str:
    """A geometry in one short line, e.g. '54x16x56x56 -> 54, 3x3x3 /1x2x2 groups 54'."""
    g = plan.geometry
    assert isinstance(g, Geometry)  # modules plan single convolutions, no blocks
    x = "x".join(map(str, (g.in_channels, *g.in_size)))
    stride = "" if set(g.stride) == {1} else " /" + "x".join(map(str, g.stride))
    groups = "" if g.groups == 1 else f" groups {g.groups}"
    return f"{x} -> {g.out_channels}, {'x'.join(map(str, g.kernel))}{stride}{groups}"


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
) -> tuple[nn.Module, Report]:
    """A copy of an eval-mode model with its convolutions on our kernels, and a report.

    example_input  a tensor, or a tuple of positional arguments
    algorithm, backend, tolerance, max_workspace_bytes: as for `fastconv.conv3d`, per layer
    tune           measure which plan is fastest for every layer, see `fastconv.tune`; seconds per
                   layer, but results are kept: what was measured before is not measured again
    check          compare both models with the model in float64 on the example input

    The copy shares parameters and buffers with the model and has the same state dict and signature;
    the model itself is not changed. Modules that only derive from PyTorch's convolutions stay as
    they are. Activations are kept channels last from the first convolution on, unless the model
    cannot run so (it may use `view`).

    Raises UnsupportedError for a model in training mode, and if the error of the outputs on the
    example input is beyond `Report.allowed`.
    """
    if any(module.training for module in model.modules()):
        raise UnsupportedError("accelerate: the model is in training mode; call model.eval() first")
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    options = {
        "algorithm": algorithm,
        "backend": backend,
        "tolerance": tolerance,
        "max_workspace_bytes": max_workspace_bytes,
    }
    layers = trace(model, *args)
    with torch.inference_mode():
        try:
            new = _rewritten(model, channels_last=True, **options)
            got, last = _leaves(new(*args)), True
        except RuntimeError:
            # A `view` that needs contiguous activations; any other error comes again here.
            new = _rewritten(model, channels_last=False, **options)
            got, last = _leaves(new(*args)), False
        if tune and _tune(new):
            got = _leaves(new(*args))
        want = _leaves(model(*args))
        exact = _in_float64(model, args) if check else want
    rows = _replacements(new, layers, last)
    factor = max(
        (planner.error_factor(row.plan) for row in rows if row.plan is not None), default=1.0
    )
    errors = distance(got, exact), distance(want, exact)
    roundoff = max((torch.finfo(t.dtype).eps for t in want if t.is_floating_point()), default=0.0)
    report = Report(rows, max(factor, 1.0), *errors, roundoff, last)
    if check and not report.error <= report.allowed:
        raise UnsupportedError(
            f"accelerate: the error of the outputs is {report.error:.1e} of the largest one, "
            f"allowed is {report.allowed:.1e}"
        )
    return new, report


def _tune(model: nn.Module) -> bool:
    """Measure what the model's convolutions asked for and nobody measured yet; whether anything."""
    modules = [m for m in model.modules() if isinstance(m, (Conv1d, Conv2d, Conv3d))]
    asked = dict.fromkeys(request for module in modules for request in module.requests())
    new = [request for request in asked if winners.find(request) is None]
    for request in new:
        tune_request(request)
    for module in modules if new else ():
        module.forget_plans()
    return bool(new)


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """max |got - want| / max |want| over the tensors of two outputs; NaN equals NaN."""
    largest = 0.0
    for a, b in zip(got, want, strict=True):
        if not b.is_floating_point() or not b.numel():
            continue
        a, b = a.double(), b.double()
        equal = (a == b) | (a.isnan() & b.isnan())
        off = torch.where(equal, 0.0, a - b).abs().max()
        scale = torch.where(b.isfinite(), b, 0.0).abs().max()
        largest = max(largest, float(off / scale) if off else 0.0)
    return largest


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


def _rewritten(model: nn.Module, channels_last: bool, **options: Any) -> nn.Module:
    """A deep copy of the modules around the same parameters and buffers, convolutions converted."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    new = copy.deepcopy(model, shared)
    converted: dict[int, nn.Module] = {}
    for parent in list(new.modules()):
        for name, child in list(parent._modules.items()):
            replacement = None if child is None else REPLACEMENTS.get(type(child))
            if child is not None and replacement is not None:
                if id(child) not in converted:
                    converted[id(child)] = replacement.convert(
                        child, channels_last=channels_last, **options
                    )
                setattr(parent, name, converted[id(child)])
    root = REPLACEMENTS.get(type(new))
    return new if root is None else root.convert(new, channels_last=channels_last, **options)


def _replacements(
    model: nn.Module, layers: list[Layer], channels_last: bool
) -> tuple[Replacement, ...]:
    """One row per traced convolution: the plan its module made, or why there is none."""
    modules = dict(model.named_modules())
    rows = []
    for layer in layers:
        module = modules[layer.name]
        if layer.kind == "linear":
            continue
        if isinstance(module, (Conv1d, Conv2d, Conv3d)):
            rows.append(Replacement(layer.name, layer.module, module.plan_of(layer.x_shape)))
        else:
            reason = layer.note or "not PyTorch's own class"
            rows.append(Replacement(layer.name, layer.module, reason=reason))
    return tuple(rows)
