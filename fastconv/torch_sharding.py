"""Sharding rules for DTensor: by batch, by output channels, by whole groups.

Loaded when the first DTensor arrives. The rules are for one axis of a device mesh; PyTorch combines
them over several, and redistributes what fits none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from . import torch_ops  # noqa: F401  (the operators are there)

Rule = tuple[list[Any], list[Any]]  # placements of the outputs, and of the arguments
_ALL, _BATCH, _CHANNELS, _SUM = Replicate(), Shard(0), Shard(1), Partial()
_OUTPUTS = Shard(0)  # of weights (K, C / G, *kernel) and of a bias (K,)


def _rule(output: Any, arguments: tuple[Any, ...], **placements: Any) -> Rule:
    """A rule for the arguments of a call: tensors by their position, which are named t0, t1, ..."""
    return [output], [
        placements.get(f"t{i}", _ALL) if _is_tensor(a) else None for i, a in enumerate(arguments)
    ]


def _is_tensor(argument: Any) -> bool:
    """What stands for a tensor has placements."""
    return hasattr(argument, "placements")


def _one_group(x: Any, weight: Any) -> bool:
    return x.shape[1] == weight.shape[1]


def _rules_of(op: Any) -> Callable[[Callable[..., list[Rule]]], Callable[..., list[Rule]]]:
    """`register_sharding`, by whose own account calls that differ in lists of numbers are alike: it
    would remember the shape of the first one's result for all of them."""

    def register(rules: Callable[..., list[Rule]]) -> Callable[..., list[Rule]]:
        register_sharding(op)(rules)
        types = [str(a.type) for a in op._schema.arguments]
        first = next(i for i, t in enumerate(types) if "Tensor" not in t)
        propagator = DTensor._op_dispatcher.sharding_propagator
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(first, needs_pytree=True)
        return rules

    return register


def _divides(tensor: Any, groups: int) -> bool:
    """Whether every device gets whole groups, over whichever axes of the mesh."""
    return groups % tensor.mesh.size() == 0


@_rules_of(torch.ops.fastconv.conv.default)
def conv(*arguments: Any) -> list[Rule]:
    """conv(input, weight, bias, stride, padding, dilation, groups, activation, residual, ...)."""
    x, weight, *_ = arguments
    rules = [
        _rule(_ALL, arguments),
        _rule(_BATCH, arguments, t0=_BATCH, t8=_BATCH),
    ]
    by_outputs = {"t1": _OUTPUTS, "t2": _OUTPUTS, "t8": _CHANNELS}
    if _one_group(x, weight):
        rules.append(_rule(_CHANNELS, arguments, **by_outputs))
    elif not arguments[6] and _divides(x, x.shape[1] // weight.shape[1]):
        # 0 groups: as many as the channels of a shard tell.
        rules.append(_rule(_CHANNELS, arguments, t0=_CHANNELS, **by_outputs))
    return rules


@_rules_of(torch.ops.fastconv.conv_input_gradient.default)
def conv_input_gradient(*arguments: Any) -> list[Rule]:
    """conv_input_gradient(grad, weight, input_size, ..., group_outputs, ...)."""
    grad, group_outputs = arguments[0], arguments[6]
    rules = [_rule(_ALL, arguments), _rule(_BATCH, arguments, t0=_BATCH)]
    # Output channels of one group add up; groups stay apart.
    groups = grad.shape[1] // group_outputs
    if groups == 1 or _divides(grad, groups):
        result = _SUM if groups == 1 else _CHANNELS
        rules.append(_rule(result, arguments, t0=_CHANNELS, t1=_OUTPUTS))
    return rules


@_rules_of(torch.ops.fastconv.conv_weight_gradient.default)
def conv_weight_gradient(*arguments: Any) -> list[Rule]:
    """conv_weight_gradient(grad, input, weight_size, ...)."""
    _, x, weight_size, *_ = arguments
    rules = [_rule(_ALL, arguments), _rule(_SUM, arguments, t0=_BATCH, t1=_BATCH)]
    if x.shape[1] == weight_size[0]:
        rules.append(_rule(_OUTPUTS, arguments, t0=_CHANNELS))
    elif _divides(x, x.shape[1] // weight_size[0]):
        rules.append(_rule(_OUTPUTS, arguments, t0=_CHANNELS, t1=_CHANNELS))
    return rules


@_rules_of(torch.ops.fastconv.conv_prepacked.default)
def conv_prepacked(*arguments: Any) -> list[Rule]:
    """conv_prepacked(input, packed, bias, ..., residual, ...): weights are not cut."""
    return [_rule(_ALL, arguments), _rule(_BATCH, arguments, t0=_BATCH, t9=_BATCH)]


@_rules_of(torch.ops.fastconv.separable_block.default)
def separable_block(*arguments: Any) -> list[Rule]:
    """separable_block(input, three weights, three biases, ..., residual, ...)."""
    return [
        _rule(_ALL, arguments),
        _rule(_BATCH, arguments, t0=_BATCH, t10=_BATCH),
        # The last stage alone is cut; the stages before it are computed by all.
        _rule(_CHANNELS, arguments, t3=_OUTPUTS, t6=_OUTPUTS, t10=_CHANNELS),
    ]
