"""A recording as few steps: batch norms, activations and sums become part of a convolution.

Every step is one pass over memory. What is not known stays an operation of PyTorch's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastconv.errors import GeometryError
from fastconv.geometry import SeparableGeometry

from .graph import Operation, Recording, Value
from .graph_match import identity, is_plain, step_of
from .graph_steps import Blend, Block, Conv, Other, Pad, Step


def steps(
    recording: Recording, fold: bool = True, scales: Callable[[Conv], bool] = lambda conv: True
) -> tuple[list[Step], Any]:
    """The steps of a recording, and its result with the values that they make.

    fold    batch norms are taken into the weights in front of them
    scales  whether a convolution can scale and activate its input as it reads it
    """
    folder = _Folder(recording)
    folder.drop_unused()
    if fold:
        folder.norms()
    folder.pads()
    folder.gates()
    folder.sums()
    folder.activations()
    folder.scales(scales)
    folder.blocks()
    return folder.steps, folder.result


class _Folder:
    def __init__(self, recording: Recording) -> None:
        same: dict[Value, Value] = {}

        def present(leaf: Any) -> Any:
            while leaf in same if isinstance(leaf, Value) else False:
                leaf = same[leaf]
            return leaf

        self.steps: list[Step] = []
        for operation in recording.operations:
            now = replace(
                operation,
                args=tree_map(present, operation.args),
                kwargs=tree_map(present, operation.kwargs),
            )
            source = identity(now)
            if source is not None:
                same[now.outputs[0]] = source
            else:
                self.steps.append(step_of(now))
        self.result = tree_map(present, recording.result)
        leaves = tree_leaves(self.result)
        self._result_values = [leaf for leaf in leaves if isinstance(leaf, Value)]

    def _users(self) -> Counter[Value]:
        counts = Counter(v for step in self.steps for v in step.inputs)
        counts.update(self._result_values)
        return counts

    def _makers(self) -> dict[Value, Step]:
        return {v: step for step in self.steps for v in step.outputs}

    def _remove(self, gone: Iterable[Step]) -> None:
        ids = set(map(id, gone))
        self.steps = [step for step in self.steps if id(step) not in ids]

    def drop_unused(self) -> None:
        """Steps nobody needs; what draws random numbers or runs users' code is kept."""
        needed = set(self._result_values)
        kept: list[Step] = []
        for step in reversed(self.steps):
            asked = any(v in needed for v in step.outputs)
            if asked or (isinstance(step, Other) and _has_effects(step.operation)):
                needed.update(step.inputs)
                kept.append(step)
        self.steps = kept[::-1]

    def norms(self) -> None:
        users, makers, gone = self._users(), self._makers(), []
        for step in self.steps:
            if not isinstance(step, Blend) or step.parts != {"norm"}:
                continue
            conv = makers.get(step.x)
            if isinstance(conv, Conv) and users[conv.y] == 1 and conv.norm is None:
                conv.norm, conv.y = step.norm, step.y
                conv.fused.append("batch norm")
                makers[conv.y] = conv
                gone.append(step)
        self._remove(gone)

    def pads(self) -> None:
        """Zeros in front of convolutions become their padding; other ones stay an operation."""
        for pad in [step for step in self.steps if isinstance(step, Pad)]:
            users = [step for step in self.steps if pad.y in step.inputs]
            asked = pad.y in self._result_values
            if asked or not all(_can_pad(step, pad) for step in users):
                self.steps[self.steps.index(pad)] = Other(pad.operation)
                continue
            for conv in users:
                assert isinstance(conv, Conv)
                both = zip(conv.geometry.padding, pad.pairs, strict=True)
                padding = tuple((a + c, b + d) for (a, b), (c, d) in both)
                size = tuple(pad.x.shape[2:])
                conv.geometry = replace(conv.geometry, in_size=size, padding=padding)
                conv.x = pad.x
                conv.fused.append("padding")
            self._remove([pad])

    def gates(self) -> None:
        """x * sigmoid(x) is one activation."""
        users, makers, gone = self._users(), self._makers(), []
        for i, step in enumerate(self.steps):
            if not isinstance(step, Other) or step.operation.name != "mul":
                continue
            pair = step.operation.args
            if len(pair) != 2 or not all(isinstance(v, Value) for v in pair):
                continue
            for x, gate in (pair, pair[::-1]):
                maker = makers.get(gate)
                if not isinstance(maker, Blend) or maker.parts != {"activation"}:
                    continue
                known = maker.activation == "sigmoid" and is_plain(step.outputs[0])
                if maker.x is x and known:
                    self.steps[i] = Blend(x, step.outputs[0], activation="silu")
                    if users[gate] == 1:
                        gone.append(maker)
                    break
        self._remove(gone)

    def sums(self) -> None:
        """x + y joins what makes x, or y, if nobody else wants that."""
        users, makers, gone = self._users(), self._makers(), []
        for step in self.steps:
            if not isinstance(step, Blend) or step.parts != {"residual"}:
                continue
            assert step.residual is not None
            pairs = (step.x, step.residual), (step.residual, step.x)
            for x, residual in pairs:
                maker = makers.get(x)
                if x is residual or users[x] != 1 or not _takes_residual(maker):
                    continue
                assert isinstance(maker, (Conv, Blend))
                maker.residual, maker.y = residual, step.y
                if isinstance(maker, Conv):
                    maker.fused.append("sum")
                makers[step.y] = maker
                gone.append((step, maker))
                break
        # The sum's other part may be made after the step that takes it in.
        for step, maker in gone:
            self.steps.remove(maker)
            self.steps[self.steps.index(step)] = maker

    def activations(self) -> None:
        users, makers, gone = self._users(), self._makers(), []
        for step in self.steps:
            if not isinstance(step, Blend) or step.parts != {"activation"}:
                continue
            maker = makers.get(step.x)
            if isinstance(maker, (Conv, Blend)) and users[step.x] == 1 and not maker.finished:
                maker.activation, maker.y = step.activation, step.y
                if isinstance(maker, Conv):
                    maker.fused.append(step.activation)
                makers[step.y] = maker
                gone.append(step)
        self._remove(gone)

    def scales(self, allowed: Callable[[Conv], bool]) -> None:
        """Squeeze and excitation: the convolution behind it scales what it reads."""
        users, makers, gone = self._users(), self._makers(), []
        for step in self.steps:
            if not isinstance(step, Conv) or prod(step.geometry.kernel) != 1:
                continue
            maker = makers.get(step.x)
            if not isinstance(maker, Blend) or maker.parts - {"activation"} != {"scale"}:
                continue
            if users[step.x] == 1 and step.geometry.groups == 1 and allowed(step):
                step.x, step.scale, step.input_activation = maker.x, maker.scale, maker.activation
                step.fused.insert(0, "scaled input")
                if maker.finished:
                    step.fused.insert(1, f"its {maker.activation}")
                gone.append(maker)
        self._remove(gone)

    def blocks(self) -> None:
        users, makers = self._users(), self._makers()
        for last in [step for step in self.steps if isinstance(step, Conv)]:
            middle = makers.get(last.x)
            first = makers.get(middle.x) if isinstance(middle, Conv) else None
            if not isinstance(middle, Conv) or not isinstance(first, Conv):
                continue
            if users[last.x] != 1 or users[middle.x] != 1:
                continue
            stages = (first, middle, last)
            geometry = _separable(stages)
            if geometry is not None:
                self.steps[self.steps.index(last)] = Block(stages, geometry)
                self._remove((first, middle))
                makers = self._makers()


def _separable(stages: tuple[Conv, Conv, Conv]) -> SeparableGeometry | None:
    """The geometry of a fully separable block, or None if these are something else."""
    if any(s.residual for s in stages[:2]) or any(s.scale for s in stages):
        return None
    gs = [s.geometry for s in stages]
    if any(g.n != 3 or g.dilation != (1, 1, 1) for g in gs) or gs[0].kernel[0] == 1:
        return None
    if gs[0].groups != 1 or not gs[1].is_depthwise or gs[2].groups != 1:
        return None
    stride = (gs[0].stride[0], *gs[1].stride[1:])
    padding = (gs[0].padding[0], *gs[1].padding[1:])
    temporal, depthwise, pointwise = (g.w_shape for g in gs)
    try:
        found = SeparableGeometry.of(gs[0].x_shape, temporal, depthwise, pointwise, stride, padding)
    except GeometryError:
        return None
    return found if list(found.stages) == gs else None


def _takes_residual(maker: Step | None) -> bool:
    return isinstance(maker, (Conv, Blend)) and not maker.finished and maker.residual is None


def _can_pad(step: Step, pad: Pad) -> bool:
    return isinstance(step, Conv) and step.x is pad.y and len(pad.pairs) == step.geometry.n


def _has_effects(operation: Operation) -> bool:
    return operation.opaque or torch.Tag.nondeterministic_seeded in operation.target.tags
