"""The tensor side of `ops`: the way of a call to its plan, directly or by an operator.

The operators have gradients to any order, fakes, and rules for autocast and vmap; each is in its
own module: torch_ops_conv, torch_ops_prepacked, torch_ops_block, torch_autograd.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import torch_ops_vmap, winners
from .epilogue import Epilogue
from .geometry import Geometry, SeparableGeometry
from .torch_ops_block import ACTIVATIONS as _ACTIVATIONS
from .torch_ops_conv import known as known
from .torch_ops_conv import plan_for, remember
from .torch_ops_packed import ON_TENSORS as ON_TENSORS
from .torch_ops_packed import PackedWeights as PackedWeights
from .torch_ops_packed import _packed as _packed
from .torch_ops_packed import held_weights
from .torch_ops_prepacked import freeze as freeze
from .torch_ops_register import cast_by_autocast
from .torch_ops_runner import Runner as Runner
from .torch_ops_runner import dense as dense
from .torch_ops_runner import device_workspace as device_workspace
from .torch_ops_runner import execute as execute
from .torch_ops_runner import is_plain
from .torch_ops_runner import new_dense as new_dense
from .torch_ops_runner import packed_weights as packed_weights
from .torch_ops_runner import precision_of as precision_of
from .torch_ops_runner import runner as runner

torch_ops_vmap.register()


def key_of(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    options: tuple[Any, ...],
) -> Any:
    """What tells a call of a function from others; None where it needs more than a plan: a
    gradient, a trace, a refusal."""
    if not is_plain(input, weight, bias, residual):
        return None
    try:
        return (
            input.shape,
            input.stride(),
            input.dtype,
            None if input.is_cpu else (input.device, precision_of(input)),
            weight.shape,
            None if bias is None else bias.shape,
            None if residual is None else residual.shape,
            options,
            winners.generation(),
        )
    except RuntimeError:  # a weight without a shape; the door refuses it
        return None


def as_autocast_does(*tensors: Any) -> list[Any]:
    """What comes in may differ in precision where autocast is about to make it alike."""
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            device = tensor.device.type
            if device != "meta" and torch.is_autocast_enabled(device):
                return cast_by_autocast(device, tensors)
            break
    return list(tensors)


def _sharded(*tensors: Tensor) -> bool:
    """Whether any is a DTensor; the first one brings the sharding rules."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not any(isinstance(t, module.DTensor) for t in tensors):
        return False
    from . import torch_sharding  # noqa: F401  (loading it registers the rules)

    return True


def _trains(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for, as far as can be told; not of an exported program."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    residual: Tensor | None,
    key: Any = None,
    **choice: Any,
) -> Tensor:
    """`ops.conv3d` and its kin on tensors that the door has checked; differentiable.

    key     from `key_of`
    choice  algorithm, backend, tolerance, max_workspace_bytes
    """
    if key is not None:
        found = remember(key, plan_for(geometry, input, epilogue, **choice))
        return found(input, held_weights(weight).form(found, weight), bias, residual)
    padding = [p for pair in geometry.padding for p in pair]
    # A shard of a DTensor may have fewer groups.
    groups = 0 if _sharded(input, weight) else geometry.groups
    arguments = (input, weight, bias, geometry.stride, padding, geometry.dilation, groups)
    fused = epilogue.activation != "none" or residual is not None
    if fused and _trains(input, weight, bias, residual):
        # What the fused operator's gradient would compute again is kept instead.
        z = torch.ops.fastconv.conv(*arguments, **choice)
        return _ACTIVATIONS[epilogue.activation](z if residual is None else z + residual)
    return torch.ops.fastconv.conv(
        *arguments, activation=epilogue.activation, residual=residual, **choice
    )


def separable_block(
    input: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: Sequence[Tensor | None],
    geometry: SeparableGeometry,
    epilogue: tuple[Epilogue, Epilogue, Epilogue],
    residual: Tensor | None,
    **choice: Any,
) -> Tensor:
    """`ops.separable_block` on tensors; three convolutions where a gradient is asked for."""
    # torch.jit.trace knows no lists of words.
    traced = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    if traced or _trains(input, *weights, *biases, residual):
        # What the block's gradient would compute again is kept instead.
        for i, stage in enumerate(geometry.stages):
            rest = residual if i == 2 else None
            input = conv(input, weights[i], biases[i], stage, epilogue[i], rest, **choice)
        return input
    _sharded(input, *weights)
    temporal, depthwise, _ = geometry.stages
    stride = (temporal.stride[0], *depthwise.stride[1:])
    paddings = (temporal.padding[0], *depthwise.padding[1:])
    return torch.ops.fastconv.separable_block(
        input,
        *weights,
        *biases,
        stride,
        [p for pair in paddings for p in pair],
        [e.activation for e in epilogue],
        residual,
        **choice,
    )
