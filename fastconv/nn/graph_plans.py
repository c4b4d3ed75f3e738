"""Plans and folded weights of the steps of a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from fastconv import backends, ops, planner, torch_ops
from fastconv.plan import Plan, Request

from .graph_steps import Conv, Norm

# How much faster a measured plan of PyTorch's has to be than the best of ours: it also costs an
# allocation, and memory that is not the program's.
PREFERENCE = 0.8


@dataclass(frozen=True)
class Options:
    """What `accelerate` was told about each convolution; as for `fastconv.plan`."""

    algorithm: str = "auto"
    backend: str = "auto"
    tolerance: float = planner.DEFAULT_TOLERANCE
    max_workspace_bytes: int | None = None
    fold: bool = True

    @property
    def of_plan(self) -> dict[str, Any]:
        """The keywords of a plan."""
        return {name: value for name, value in vars(self).items() if name != "fold"}

    @property
    def uses_c(self) -> bool:
        """Whether the C kernels may be used."""
        return self.backend in ("auto", "c") and backends.available()["c"] is None

    @property
    def is_free(self) -> bool:
        """Nothing was asked for that the small kernels could violate."""
        return self.algorithm in ("auto", "direct") and self.max_workspace_bytes is None


def candidates(request: Request) -> tuple[planner.Candidate, ...]:
    options = {name: value for name, value in vars(request).items() if name != "geometry"}
    return planner.candidates(request.geometry, **options)


def expected_ms(request: Request | None) -> float:
    assert request is not None
    first = candidates(request)[0]
    return first.measured_ms or first.estimate_ms


def chosen(request: Request) -> Plan:
    """The plan to run inside a program: PyTorch's own only where it was measured to be better."""
    plan = planner.plan_of(request)
    if plan.backend != "torch" or request.backend != "auto" or request.device != "cpu":
        return plan
    found = [c for c in candidates(request) if c.reason is None]
    ours = next((c for c in found if c.plan.backend not in ("torch", "reference")), None)
    if ours is None:
        return plan
    theirs = found[0].measured_ms
    if theirs is None or (ours.measured_ms is not None and theirs > PREFERENCE * ours.measured_ms):
        return ours.plan
    return plan


def affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch norm, in its precision."""
    mean, variance = (ref.tensor.detach().double() for ref in (norm.mean, norm.variance))
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.tensor.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.tensor.detach().double()
    dtype = norm.mean.tensor.dtype
    return scale.to(dtype).contiguous(), shift.to(dtype).contiguous()


def folded(conv: Conv) -> tuple[Tensor, Tensor | None]:
    """Weight (K, C / groups, *kernel) and bias (K,) of a convolution and its batch norm."""
    weight = conv.weight.tensor.detach().reshape(conv.geometry.w_shape)
    bias = None if conv.bias is None else conv.bias.tensor.detach()
    if conv.norm is None:
        return weight.contiguous(), None if bias is None else bias.contiguous()
    dtype, norm = weight.dtype, conv.norm
    scale = (norm.variance.tensor.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.tensor.detach().double()
    shift = -norm.mean.tensor.detach().double()
    if bias is not None:
        shift = shift + bias.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.tensor.detach().double()
    wide = weight.double() * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    return wide.to(dtype).contiguous(), shift.to(dtype).contiguous()


def pack(plan: Plan, weights: Any) -> Any:
    if plan.backend in torch_ops.ON_TENSORS:
        return ops.pack(plan, weights)
    return ops.pack(plan, tree_map(lambda w: w.numpy(), weights))
