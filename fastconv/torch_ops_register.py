"""How an operator is registered: implementation, fake, gradient and autocast.

`torch.library.register_autograd` sends every call through the dispatcher twice, which takes as long
as a small convolution. Here a call without gradients of ordinary tensors goes straight on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .errors import UnsupportedError

_C = torch._C
_grad_enabled, _any_requires_grad = torch.is_grad_enabled, _C._any_requires_grad
_PLAIN = tuple(
    (_C.DispatchKeySet(key) & _C._after_autograd_keyset).raw_repr()
    for key in (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)
)


library = torch.library.Library("fastconv", "FRAGMENT")


def define(schema: str) -> None:
    """An operator of the namespace `fastconv`; `register` gives it what it does."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register(
    name: str,
    impl: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    autocast: bool = False,
) -> None:
    """Give a defined operator all that it needs; functions as for torch.library.

    autocast: cast as PyTorch's own convolutions do
    """
    qualified = f"fastconv::{name}"
    library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    op = getattr(torch.ops.fastconv, name).default
    library.impl(name, _differentiable(op, impl, context, backward), "Autograd", with_keyset=True)
    if autocast:
        library.impl(name, _in_precision_of_autocast(op, "cpu"), "AutocastCPU")
        library.impl(name, _in_precision_of_autocast(op, "cuda"), "AutocastCUDA")


def _differentiable(
    op: Any,
    impl: Callable[..., Tensor],
    context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Tensor]:
    """The operator's kernel for the Autograd key."""
    defaults = [a.default_value for a in op._schema.arguments]

    # The dispatcher calls once per level of torch.func, so that a function of one level suffices.
    class Gradient(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keys: Any, *given: Any) -> Tensor:
            # Levels of torch.func below this one have gradients of their own.
            with torch.enable_grad(), _C._AutoDispatchBelowAutograd():
                y = op.redispatch(keys, *given)
            # Arguments that equal their defaults are not passed on.
            context(ctx, (*given, *defaults[len(given) :]), y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            needs = ctx.needs_input_grad[1:]
            ctx.needs = (*needs, *(False,) * (len(defaults) - len(needs)))
            return (None, *backward(ctx, grad)[: len(needs)])

    after = _C._after_autograd_keyset
    known: dict[int, bool] = {}  # by key set: whether what comes behind autograd is a kernel
    apply: Callable[..., Tensor] = Gradient.apply  # type: ignore[attr-defined]

    def kernel(keyset: Any, *given: Any) -> Tensor:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, given)
        if _grad_enabled() and _any_requires_grad(*given):
            keys = keyset & after
            if _C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return apply(keys, *given)
            return apply(keys, *given)
        here = keyset.raw_repr()
        plain = known.get(here)
        if plain is None:
            plain = known[here] = (keyset & after).raw_repr() in _PLAIN
        if plain:
            return impl(*given)
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & after, *given)

    return kernel


def _refuse_tangents(op: Any, given: tuple[Any, ...]) -> None:
    """They would be lost without a word."""
    for value in given:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise UnsupportedError(
                f"{op}: has no forward-mode gradient; use backward(), torch.autograd.grad or "
                "torch.func.vjp"
            )


def cast_by_autocast(device: str, tensors: Iterable[Any]) -> list[Any]:
    """float32 and below to autocast's precision on a device, whatever else as it is."""
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != device:
            return value
        single = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if single else value

    return list(map(cast, tensors))


def _in_precision_of_autocast(op: Any, device: str) -> Callable[..., Tensor]:
    """As PyTorch's own convolutions: float tensors are cast, except float64."""

    def kernel(*given: Any) -> Tensor:
        with torch.autocast(device, enabled=False):
            return op(*cast_by_autocast(device, given))

    return kernel
