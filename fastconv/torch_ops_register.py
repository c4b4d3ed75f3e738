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

from . import ops
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
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    context: Callable[..., None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    autocast: str = "",
    apart: tuple[str, ...] = (),
) -> None:
    """Give a defined operator all that it needs; functions as for torch.library.

    context, backward: None for an operator that keeps no gradient
    autocast  'lower' casts as PyTorch's own convolutions do; the name of an argument stands for its
              precision
    apart     tensors that may be of another precision
    """
    op = _give_kernels(name, impl, fake, apart)
    if context is not None and backward is not None:
        kernel = _differentiable(op, impl, context, backward)
        library.impl(name, kernel, "Autograd", with_keyset=True)
    for device in ("cpu", "cuda") if autocast else ():
        precise = _in_precision_of_autocast(op, device, autocast, apart)
        library.impl(name, precise, f"Autocast{device.upper()}")


def _give_kernels(
    name: str, impl: Callable[..., Any], fake: Callable[..., Any], apart: tuple[str, ...]
) -> Any:
    """The operator with its implementation, and its fake for tensors without values.

    What is neither dense nor on a usual device, and fakes, are checked first.
    """
    op = getattr(torch.ops.fastconv, name).default
    names = [a.name for a in op._schema.arguments]
    tensors = [a.name for a in op._schema.arguments if "Tensor" in str(a.type)]

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def check_first(*given: Any, **named: Any) -> Any:
            arguments = dict(zip(names, given, strict=False)) | named
            _check(name, {n: arguments.get(n) for n in tensors}, apart)
            return function(*given, **named)

        return check_first

    for device in ("CPU", "CUDA"):
        library.impl(name, impl, device)
    library.impl(name, checked(impl), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastconv::{name}", checked(fake), lib=library)
    return op


def _check(op: str, tensors: dict[str, Any], apart: tuple[str, ...]) -> None:
    ops.check_arrays(op, **{n: t for n, t in tensors.items() if n not in apart})
    first, x = next(iter(tensors.items()))
    others = {n: tensors[n] for n in apart if tensors.get(n) is not None}
    ops.check_dense(op, **{first: x}, **others)
    for name, other in others.items():
        if other.device != x.device:
            raise UnsupportedError(
                f"{op}: {first} is on device {x.device}, but {name} is on {other.device}"
            )


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
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            needs = ctx.needs_input_grad[1:]
            ctx.needs = (*needs, *(False,) * (len(defaults) - len(needs)))
            return (None, *backward(ctx, *grads)[: len(needs)])

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


def cast_by_autocast(
    device: str, tensors: Iterable[Any], dtype: torch.dtype | None = None
) -> list[Any]:
    """float32 and below to a precision, autocast's on a device if none is named, whatever else as
    it is."""
    wanted = dtype or torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != device:
            return value
        single = value.is_floating_point() and value.dtype != torch.float64
        return value.to(wanted) if single else value

    return list(map(cast, tensors))


def _in_precision_of_autocast(
    op: Any, device: str, autocast: str, apart: tuple[str, ...]
) -> Callable[..., Any]:
    names = [a.name for a in op._schema.arguments]
    ruling = names.index(autocast) if autocast in names else None
    fixed = [i for i, name in enumerate(names) if name in apart]

    def kernel(*given: Any) -> Any:
        dtype = None if ruling is None else given[ruling].dtype
        with torch.autocast(device, enabled=False):
            arguments = cast_by_autocast(device, given, dtype)
            for i in fixed:
                if i < len(given):
                    arguments[i] = given[i]
            return op(*arguments)

    return kernel
