"""The tensor side of `ops`, and the operator `fastconv::conv` with its fake and its gradient.

NumPy kernels see tensors through zero-copy views. Packed weights are kept per weight tensor for as
long as it lives and is not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import backends, ops, planner, torch_memory
from .epilogue import Epilogue
from .geometry import Geometry, SeparableGeometry
from .plan import CONTIGUOUS, Plan

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

_library = torch.library.Library("fastconv", "DEF")
_library.define(
    "conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation='none', Tensor? residual=None, str algorithm='auto', "
    "str backend='auto', float tolerance=4.0, int? max_workspace_bytes=None) -> Tensor",
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
_FLOAT32 = np.dtype(np.float32)
ON_TENSORS = ("torch", "triton")  # backends whose kernels take tensors; the others see memory
_SAMPLES = 256  # elements that guard packed weights against writes PyTorch does not count


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: Epilogue,
    residual: Tensor | None,
    **choice: Any,
) -> Tensor:
    """`ops.conv3d` and its kin on tensors that the door has checked; differentiable.

    choice: algorithm, backend, tolerance, max_workspace_bytes
    """
    padding = [p for pair in geometry.padding for p in pair]
    arguments = (input, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
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
    max_workspace_bytes: int | None = None,
) -> Tensor:
    plan = planner.plan(
        _geometry(input, weight, stride, padding, dilation, groups),
        dtype=str(input.dtype).removeprefix("torch."),
        device=input.device.type,
        precision=precision_of(input),
        epilogue=Epilogue(bias is not None, activation, residual is not None),
        layout=ops.layout_of(input),
        algorithm=algorithm,
        backend=backend,
        tolerance=tolerance,
        max_workspace_bytes=max_workspace_bytes,
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
    max_workspace_bytes: int | None = None,
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
    return dx, dw, db, *(None,) * 10


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
    **choice: Any,
) -> Tensor:
    """`ops.separable_block` on tensors; three convolutions where a gradient is asked for."""
    given = [t for t in (input, *weights, *biases, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        for i, stage in enumerate(geometry.stages):
            rest = residual if i == 2 else None
            input = conv(input, weights[i], biases[i], stage, epilogue[i], rest, **choice)
        return input
    plan = planner.plan(
        geometry,
        dtype=str(input.dtype).removeprefix("torch."),
        device=input.device.type,
        precision=precision_of(input),
        epilogue=epilogue,
        layout=ops.layout_of(input),
        **choice,
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
        if plan.backend in ON_TENSORS:
            if y.numel():
                module = backends.kernel("continual", plan.backend)
                x, r = dense(input, plan.layout), dense(residual, plan.layout)
                scratch = device_workspace(module.workspace_size(plan), y)
                module.run(plan, x, packed, bias, r, state.frames, state.steps, y, scratch)
        elif plan.backend == "c":
            if y.numel():
                x, r = dense(input, plan.layout), dense(residual, plan.layout)
                workspace = ops.workspace(packed.workspace_size(), _FLOAT32)
                packed.step(x, bias, r, state.frames, state.steps, y, workspace)
        else:
            if plan.backend == "numba":
                _follow_threads()
            x, b, r = map(_view, (input, bias, residual))
            views = ops.State(_view(state.frames), _view(state.steps))
            ops.run_step(plan, x, packed, b, r, views, _view(y))
    return y


class Runner:
    """A plan ready for many calls: its kernel, workspace and output shape are looked up once."""

    def __init__(self, plan: Plan) -> None:
        module = backends.kernel(plan.family, plan.backend)
        self.plan = plan
        self._run = module.run
        self._size_of = module.workspace_size
        self._sizes: dict[int, int] = {}  # by number of threads
        self._y_shape = plan.geometry.y_shape
        # PyTorch's convolution allocates its own result: one pass over memory less than `run`.
        plain = isinstance(plan.epilogue, Epilogue) and plan.epilogue.plain
        direct = plan.backend == "torch" and plan.family in ("grouped", "depthwise")
        dense_module = backends.kernel("grouped", "torch") if direct and plain else None
        self._convolve = None if dense_module is None else dense_module.convolve

    def __call__(self, x: Tensor, packed: Any, bias: Any, residual: Tensor | None = None) -> Tensor:
        """y (N, K, *out_size) in the plan's layout, without a gradient; x may have any strides."""
        layout = self.plan.layout
        x = dense(x, layout)
        if self._convolve is not None:
            return dense(self._convolve(x, packed, bias, self.plan.geometry), layout)
        residual = dense(residual, layout)
        y = new_dense(self._y_shape, x, layout)
        if not y.numel():
            return y
        if self.plan.backend in ON_TENSORS:
            scratch = device_workspace(self._size_of(self.plan), y)
            self._run(self.plan, x, packed, bias, residual, y, scratch)
            return y
        if self.plan.backend == "c":  # sees addresses only, and knows what was packed
            workspace = ops.workspace(packed.workspace_size(), _FLOAT32)
            self._run(self.plan, x, packed, bias, residual, y, workspace)
            return y
        threads = _follow_threads() if self.plan.backend == "numba" else 0
        size = self._sizes.get(threads)
        if size is None:
            size = self._sizes[threads] = self._size_of(self.plan)
        b = tuple(map(_view, bias)) if isinstance(bias, tuple) else _view(bias)
        x_view, y_view = _view(x), _view(y)
        workspace = ops.workspace(size, y_view.dtype)
        self._run(self.plan, x_view, packed, b, _view(residual), y_view, workspace)
        return y


def device_workspace(size: int, like: Tensor) -> Tensor | None:
    """Scratch for a kernel on the stream of this call: PyTorch's allocator keeps streams apart."""
    return like.new_empty(size) if size else None


def precision_of(input: Tensor) -> str:
    """'tf32' where the user lets PyTorch's own convolutions of this tensor round to TF32."""
    if input.device.type != "cuda" or input.dtype != torch.float32:
        return "ieee"
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


@lru_cache(maxsize=4096)
def runner(plan: Plan) -> Runner:
    """The plan's Runner."""
    return Runner(plan)


def execute(plan: Plan, x: Tensor, packed: Any, bias: Any, residual: Tensor | None) -> Tensor:
    """`ops.execute` on tensors: y is allocated by PyTorch, kernels on NumPy arrays see views."""
    return runner(plan)(x, packed, bias, residual)


class PackedWeights:
    """The packed forms of one weight tensor, for as long as nobody writes it.

    A write is seen by PyTorch's version counter or, for writes through `.data` and other aliases
    that it does not count, by a sample of the elements. Inference tensors have no counter: there
    the sample is the whole tensor.
    """

    def __init__(self, weight: Tensor) -> None:
        self._pointer, self._version = weight.data_ptr(), _version(weight)
        self._sample = _sample(weight)
        self._values = self._sample.tobytes()
        self._packed: dict[Plan | Runner, tuple[Any, Any, Any]] = {}

    def are_of(self, weight: Tensor) -> bool:
        """Whether this is still the memory and the content that was packed."""
        if weight.is_inference() and weight.device.type != "cpu":
            return False  # nothing tells
        return (
            _version(weight) == self._version
            and weight.data_ptr() == self._pointer
            and self._sample.tobytes() == self._values
        )

    def form(self, runner: Runner, weight: Tensor) -> Any:
        """The weights in the form that a plan's kernel reads."""
        held = self._packed.get(runner)
        if held is None:
            packed = _pack(runner.plan, weight)
            held = self._packed[runner] = (packed, *_moment(weight))
        packed, stream, event = held
        if stream is not None and torch.cuda.current_stream(weight.device) != stream:
            # Packed on one stream, read on another.
            torch.cuda.current_stream(weight.device).wait_event(event)
        return packed

    def drop(self) -> None:
        """Pack again when a form is asked for next."""
        self._packed.clear()


def _moment(weight: Tensor) -> tuple[Any, Any]:
    """The stream on which something was just made, and an event behind it; None on a CPU."""
    if weight.device.type != "cuda":
        return None, None
    stream = torch.cuda.current_stream(weight.device)
    return stream, stream.record_event()


def held_weights(weight: Tensor) -> PackedWeights:
    """The packed weights kept for a tensor, new ones if it was written meanwhile."""
    held = _packed.get(weight)
    if held is None or not held.are_of(weight):
        held = _packed[weight] = PackedWeights(weight)
    return held


def packed_weights(plan: Plan, weight: Tensor) -> Any:
    """The weights in the form that a plan's kernel reads, packed once per tensor and content."""
    return held_weights(weight).form(runner(plan), weight)


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> np.ndarray:
    """A view of evenly spaced elements, about _SAMPLES; of all where no counter helps.

    Empty where NumPy cannot see them.
    """
    if weight.device.type != "cpu":
        return np.empty(0)
    # NumPy has no bfloat16: precisions of two bytes are seen as integers.
    weight = weight.detach()
    array = (weight.view(torch.int16) if weight.element_size() == 2 else weight).numpy()
    layout = ops.dense_layout(array)
    if layout is None:
        return array  # with gaps, which weights seldom have: all of it
    flat = (array if layout == CONTIGUOUS else np.moveaxis(array, 1, -1)).reshape(-1)
    return flat[:: 1 if weight.is_inference() else max(1, flat.size // _SAMPLES)]


def _pack(plan: Plan, weights: Any) -> Any:
    if plan.backend in ON_TENSORS:
        return ops.pack(plan, weights)
    views = tuple(map(_view, weights)) if isinstance(weights, tuple) else _view(weights)
    return ops.pack(plan, views)


def _view(tensor: Tensor | None) -> Any:
    """A NumPy array of the same memory; None stays None."""
    return None if tensor is None else tensor.detach().numpy()


def new_dense(shape: Sequence[int], like: Tensor, layout: str) -> Tensor:
    """An uninitialised tensor (N, C, *size) in a layout."""
    memory = tuple(shape) if layout == CONTIGUOUS else (shape[0], *shape[2:], shape[1])
    plain = type(like) is Tensor and like.device.type == "cpu"
    if plain and like.dtype in torch_memory.DTYPES:
        y = torch_memory.empty(memory, like.dtype)
    else:
        y = like.new_empty(memory)
    return y if layout == CONTIGUOUS else y.movedim(-1, 1)


def dense(tensor: MaybeTensor, layout: str) -> MaybeTensor:
    """The tensor itself if it is dense in the layout, else a copy that is."""
    if tensor is None:
        return None
    if layout == CONTIGUOUS:
        return tensor.contiguous()
    if tensor.dim() in _CHANNELS_LAST:
        return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _follow_threads() -> int:
    """`torch.set_num_threads` rules the Numba kernels too; their number."""
    import numba

    from .numba_kernels import simd

    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if simd.threads() != wanted:
        numba.set_num_threads(wanted)
    return wanted
