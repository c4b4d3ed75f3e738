"""The tensor side of `ops`, and the operator `fastconv::conv` with its fake and its gradient.

NumPy kernels see tensors through zero-copy views. Packed weights are kept per weight tensor for as
long as it lives and is not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import backends, ops, planner
from .epilogue import Epilogue
from .geometry import Geometry, SeparableGeometry
from .plan import CONTIGUOUS, Plan

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

_library = torch.library.Library("fastconv", "DEF")
_library.define(
    "conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation='none', Tensor? residual=None, str algorithm='auto', "
    "str backend='auto', float tolerance=4.0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
}
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
# PyTorch has a memory format for 2 and 3 axes; one axis is channels last by its strides.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_SAMPLES = 256  # elements that guard packed weights against writes PyTorch does not count


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    residual: Tensor | None,
    algorithm: str,
    backend: str,
    tolerance: float,
) -> Tensor:
    """`ops.conv3d` and its kin on tensors that the door has checked; differentiable."""
    padding = [p for pair in geometry.padding for p in pair]
    arguments = (input, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
    choice = {"algorithm": algorithm, "backend": backend, "tolerance": float(tolerance)}
    given = [t for t in (input, weight, bias, residual) if t is not None]
    fused = epilogue.activation != "none" or residual is not None
    if fused and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        # The operator's gradient is that of a convolution; PyTorch differentiates the rest.
        z = torch.ops.fastconv.conv(*arguments, **choice)
        return _ACTIVATIONS[epilogue.activation](z if residual is None else z + residual)
    return torch.ops.fastconv.conv(
        *arguments, activation=epilogue.activation, residual=residual, **choice
    )


def _geometry(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return Geometry.of(input.shape, weight.shape, tuple(stride), pairs, tuple(dilation), groups)


def _conv_impl(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = 4.0,
) -> Tensor:
    plan = planner.plan(
        _geometry(input, weight, stride, padding, dilation, groups),
        dtype=str(input.dtype).removeprefix("torch."),
        device=input.device.type,
        epilogue=Epilogue(bias is not None, activation, residual is not None),
        layout=ops.layout_of(input),
        algorithm=algorithm,
        backend=backend,
        tolerance=tolerance,
    )
    return execute(plan, input, packed_weights(plan, weight), bias, residual)


def _conv_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = 4.0,
) -> Tensor:
    geometry = _geometry(input, weight, stride, padding, dilation, groups)
    return new_dense(geometry.y_shape, input, ops.layout_of(input))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, stride, padding, dilation, groups, *_ = inputs
    ctx.save_for_backward(input, weight)
    ctx.arguments = (stride, padding, dilation, groups)
    ctx.bias_size = None if bias is None else bias.shape[0]


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The framework's own gradients; an asymmetric padding is undone by padding the saved input."""
    input, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.arguments
    before, after = padding[::2], padding[1::2]
    common = [min(a, b) for a, b in zip(before, after, strict=True)]
    extra = [p - c for *pair, c in zip(before, after, common, strict=True) for p in pair]
    flipped = [e for i in range(len(common) - 1, -1, -1) for e in extra[2 * i : 2 * i + 2]]
    padded = torch.nn.functional.pad(input, flipped) if any(flipped) else input
    needs = ctx.needs_input_grad[:3]
    mask = [needs[0], needs[1], needs[2] and ctx.bias_size is not None]
    sizes = None if ctx.bias_size is None else [ctx.bias_size]
    forward = (stride, common, dilation, False, [0] * len(common), groups)
    dx, dw, db = torch.ops.aten.convolution_backward(grad, padded, weight, sizes, *forward, mask)
    if dx is not None:
        for axis, size in enumerate(input.shape[2:]):
            dx = dx.narrow(2 + axis, extra[2 * axis], size)
    return dx, dw, db, *(None,) * 9


_library.impl("conv", _conv_impl, "CompositeExplicitAutograd")
torch.library.register_fake("fastconv::conv", _conv_fake, lib=_library)
torch.library.register_autograd(
    "fastconv::conv", _conv_backward, setup_context=_setup_context, lib=_library
)


def separable_block(
    input: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: Sequence[Tensor | None],
    geometry: SeparableGeometry,
    epilogue: tuple[Epilogue, Epilogue, Epilogue],
    residual: Tensor | None,
    backend: str,
    tolerance: float,
) -> Tensor:
    """`ops.separable_block` on tensors; three convolutions where a gradient is asked for."""
    given = [t for t in (input, *weights, *biases, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        for i, stage in enumerate(geometry.stages):
            rest = residual if i == 2 else None
            input = conv(
                input, weights[i], biases[i], stage, epilogue[i], rest, "auto", backend, tolerance
            )
        return input
    plan = planner.plan(
        geometry,
        dtype=str(input.dtype).removeprefix("torch."),
        device=input.device.type,
        epilogue=epilogue,
        layout=ops.layout_of(input),
        backend=backend,
        tolerance=tolerance,
    )
    return execute(plan, input, _pack(plan, weights), tuple(biases), residual)


def new_state(shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Zero frames of this shape in the layout, precision and device of `like`, and zero steps."""
    frames = new_dense(shape, like, ops.layout_of(like)).zero_()
    return frames, torch.zeros(shape[0], dtype=torch.int64, device=like.device)


def continual_step(
    plan: Plan,
    input: Tensor,
    state: ops.State,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`ops.continual_step` on tensors; no gradient is kept."""
    with torch.no_grad():
        shape = (*plan.geometry.y_shape[:2], *plan.geometry.y_shape[3:])
        y = new_dense(shape, input, plan.layout)
        packed = packed_weights(plan, weight)
        if plan.backend == "torch":
            from .torch_kernels import continual

            x, r = dense(input, plan.layout), dense(residual, plan.layout)
            continual.run(plan, x, packed, bias, r, state.frames, state.steps, y, None)
        else:
            x, b, r = map(_view, (input, bias, residual))
            views = ops.State(_view(state.frames), _view(state.steps))
            ops.run_step(plan, x, packed, b, r, views, _view(y))
    return y


def execute(plan: Plan, x: Tensor, packed: Any, bias: Any, residual: Tensor | None) -> Tensor:
    """`ops.execute` on tensors: y is allocated by PyTorch, kernels on NumPy arrays see views."""
    geometry, epilogue = plan.geometry, plan.epilogue
    with torch.no_grad():
        if (
            plan.backend == "torch"
            and plan.family in ("grouped", "depthwise")
            and isinstance(geometry, Geometry)
            and isinstance(epilogue, Epilogue)
            and epilogue.plain
        ):
            # PyTorch's convolution allocates its own result: one pass over memory less than `run`.
            from .torch_kernels.grouped import convolve

            return dense(convolve(dense(x, plan.layout), packed, bias, geometry), plan.layout)
        y = new_dense(geometry.y_shape, x, plan.layout)
        if not y.numel():
            return y
        if plan.backend == "torch":
            x, residual = dense(x, plan.layout), dense(residual, plan.layout)
            backends.kernel(plan.family, plan.backend).run(plan, x, packed, bias, residual, y, None)
        else:
            _follow_threads(plan.backend)
            b = tuple(map(_view, bias)) if isinstance(bias, tuple) else _view(bias)
            ops.run(plan, _view(x), packed, b, _view(residual), _view(y))
    return y


def packed_weights(plan: Plan, weight: Tensor) -> Any:
    """Packed weights of a plan, made once per weight tensor and value.

    A write is seen by PyTorch's version counter or, for writes through `.data` and other aliases
    that it does not count, by a sample of the elements.
    """
    if weight.is_inference():
        return _pack(plan, weight)
    stamp = (weight.data_ptr(), weight._version, _sample(weight))
    held = _packed.get(weight)
    if held is None or held[0] != stamp:
        held = _packed[weight] = (stamp, {})
    if plan not in held[1]:
        held[1][plan] = _pack(plan, weight)
    return held[1][plan]


def _sample(weight: Tensor) -> bytes:
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return b""
    flat = weight.detach().view(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step].contiguous().view(torch.uint8).numpy().tobytes()


def _pack(plan: Plan, weights: Any) -> Any:
    if plan.backend == "torch":
        return ops.pack(plan, weights)
    views = tuple(map(_view, weights)) if isinstance(weights, tuple) else _view(weights)
    return ops.pack(plan, views)


def _view(tensor: Tensor | None) -> Any:
    """A NumPy array of the same memory; None stays None."""
    return None if tensor is None else tensor.detach().numpy()


def new_dense(shape: Sequence[int], like: Tensor, layout: str) -> Tensor:
    """An uninitialised tensor (N, C, *size) in a layout."""
    if layout == CONTIGUOUS:
        return like.new_empty(shape)
    if len(shape) in _CHANNELS_LAST:
        memory_format = _CHANNELS_LAST[len(shape)]
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
    return like.new_empty((shape[0], *shape[2:], shape[1])).movedim(-1, 1)


def dense(tensor: MaybeTensor, layout: str) -> MaybeTensor:
    """The tensor itself if it is dense in the layout, else a copy that is."""
    if tensor is None:
        return None
    if layout == CONTIGUOUS:
        return tensor.contiguous()
    if tensor.dim() in _CHANNELS_LAST:
        return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _follow_threads(backend: str) -> None:
    """`torch.set_num_threads` rules the Numba kernels too."""
    if backend == "numba":
        import numba

        wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if numba.get_num_threads() != wanted:
            numba.set_num_threads(wanted)
