"""Convolutions fed one frame at a time: what they remember, and the functions that feed them.

Every entry of a batch is a slot: a stream of its own, that may start, stall and end when it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from . import backends, ops, planner
from .counts import ELEMENT_BYTES
from .epilogue import Epilogue
from .errors import GeometryError, UnsupportedError
from .geometry import Geometry
from .layouts import dense_layout, is_tensor, layout_of
from .plan import Plan

Array = Any  # np.ndarray or torch.Tensor
FORMS = ("ring", "sum")
STARTS = ("zeros", "replicate")


@dataclass(frozen=True)
class State:
    """What a continual convolution remembers of N streams; both arrays are written in place.

    frames  form 'ring': (N, C, L, *frame), the last L = dilation * (KT - 1) frames of each stream;
            that of time t is in slot t mod L
            form 'sum': (N, K, L, *out_frame), the L columns that are not complete, in float32
            (float64 for float64)
    steps   (N,) int64, frames seen by each stream
    start   what stands in front of a stream: 'zeros', or 'replicate', its first frame
    stride  along time: how many frames there are to a column
    """

    frames: Array
    steps: Array
    form: str = "ring"
    start: str = "zeros"
    stride: int = 1

    @property
    def emits(self) -> Array:
        """(N,) bool: the streams whose next frame completes a column."""
        return (self.steps - self.frames.shape[2]) % self.stride == 0

    @property
    def ready(self) -> Array:
        """(N,) bool: the streams that have seen a whole receptive field."""
        return self.steps > self.frames.shape[2]

    @property
    def nbytes(self) -> int:
        return int(self.frames.nbytes + self.steps.nbytes)

    def reset(self, slot: int | None = None) -> None:
        """A stream, or all of them, begins anew."""
        at = slice(None) if slot is None else slot
        self.frames[at] = 0
        self.steps[at] = 0

    def save(self, slot: int | None = None) -> State:
        """A copy of a slot, as the state of one stream, or of the whole state."""
        at = slice(None) if slot is None else slice(slot, slot + 1 or None)
        return replace(self, frames=_copy(self.frames[at]), steps=_copy(self.steps[at]))

    def restore(self, saved: State, slot: int | None = None) -> None:
        """Write what `save` returned back, to the same or another slot."""
        at = slice(None) if slot is None else slice(slot, slot + 1 or None)
        self._check_same_kind(saved, at)
        self.frames[at] = saved.frames
        self.steps[at] = saved.steps

    def copy(self, source: int, target: int) -> None:
        """The stream of one slot goes on in another one too."""
        self.frames[target] = self.frames[source]
        self.steps[target] = self.steps[source]

    def _check_same_kind(self, saved: State, at: slice) -> None:
        mine = (self.form, self.start, self.stride, tuple(self.frames[at].shape))
        other = (saved.form, saved.start, saved.stride, tuple(saved.frames.shape))
        if mine != other:
            raise GeometryError(
                f"restore: the state has form, start, stride and shape {mine}, "
                f"what was saved has {other}"
            )


def _copy(array: Array) -> Array:
    return array.clone() if is_tensor(array) else array.copy(order="K")


def continual_state(
    input: Array,
    weight: Array,
    dilation: Any = 1,
    *,
    stride: Any = 1,
    padding: Any = 0,
    groups: int = 1,
    form: str = "ring",
    start: str = "zeros",
) -> State:
    """An empty state for streams of frames like `input`.

    input   (N, C, *frame), an example frame: its shape, precision, layout and kind are taken
    weight  (K, C / groups, KT, *kernel)
    stride, padding, dilation, groups: those of the steps; forms 'sum' and 'auto' ask for all of
            them, 'ring' for the temporal stride and dilation alone
    form    'ring' (frames; a column has the bits that a clip has by the same algorithm and tile),
            'sum' (incomplete columns), or 'auto', the one with fewer bytes
    start   'zeros': the first columns are those of zero padding in front of the stream, or
            'replicate', of its first frame repeated
    """
    op = "continual_state"
    ops.check_arrays(op, input=input, weight=weight)
    if form not in (*FORMS, "auto"):
        raise UnsupportedError(f"{op}: unknown form {form!r}. Known: auto, {', '.join(FORMS)}")
    if start not in STARTS:
        raise UnsupportedError(f"{op}: unknown start {start!r}. Known: {', '.join(STARTS)}")
    tensor = is_tensor(input)
    dtype = str(input.dtype).removeprefix("torch.")
    wide = "float64" if dtype == "float64" else "float32"
    if form == "ring":  # which nothing but time decides on
        _check_axes(op, input.shape, weight.shape)
        time = _first(dilation) * (weight.shape[2] - 1)
        shape = (*input.shape[:2], time, *input.shape[2:])
    else:
        g = window_geometry(op, input.shape, weight.shape, stride, padding, dilation, groups)
        frames, sums = state_shape(g, "ring"), state_shape(g, "sum")
        if form == "auto":
            bytes_of_frames = prod(frames) * ELEMENT_BYTES[dtype]
            form = "sum" if prod(sums) * ELEMENT_BYTES[wide] < bytes_of_frames else "ring"
        shape = sums if form == "sum" else frames
    dtype = wide if form == "sum" else dtype
    memory: Any
    steps: Any
    if tensor:
        from . import torch_continual

        memory, steps = torch_continual.new_state(shape, input, dtype)
    else:
        memory, steps = ops.empty(shape, dtype, layout_of(input)), np.zeros(shape[0], np.int64)
        memory[...] = 0
    return State(memory, steps, form, start, _first(stride))


def continual_step(
    input: Array,
    state: State,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    residual: Array | None = None,
    active: Array | Sequence[int] | None = None,
    update_state: bool = True,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = planner.DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
) -> Array:
    """One frame in, one output column out; `state` is written in place.

    input     (N, C, *frame), the next frame of N streams; *frame is (H, W), (W,) or nothing
    state     from `continual_state`
    weight    (K, C / groups, KT, *kernel)
    residual  (N, K, *out_frame) or None
    active    (N,) bool, or the numbers of the slots that have a frame now; None for all. Of the
              others nothing is read, and no state written
    update_state  False for a look ahead: the result as if the frame were fed, the state as before
    algorithm  'auto', 'direct', or 'winograd': F(m, r) on the axes of a frame
    backend, tolerance, max_workspace_bytes: as for `conv3d`
    result    (N, K, *out_frame); zeros for slots that are not active or whose column is not
              complete, which `state.emits` tells before the step
    stride, padding, dilation: as for the convolution over the whole stream (an int, or one per
              axis, time first); the temporal padding must be 0

    With temporal stride s and L = dilation * (KT - 1), frame t completes a column where t - L is
    divisible by s. Equivalent to column (t - L) / s of `conv3d(stream, w, bias, ...)`; while t < L
    with what the state's `start` says in front of the stream.

    Raises as `conv3d` does; the state is then untouched.
    """
    op, key, find = "continual_step", None, known_geometry
    choice: dict[str, Any] = {
        "algorithm": algorithm,
        "backend": backend,
        "tolerance": tolerance,
        "max_workspace_bytes": max_workspace_bytes,
    }
    tensor = is_tensor(input)
    if tensor:
        from . import torch_continual

        options = (stride, padding, dilation, groups, activation, *choice.values())
        key = torch_continual.key_of(input, state, weight, bias, residual, options)
        ready = None if key is None else torch_continual.known(key)
        if ready is not None:
            mask = None if active is None else mask_of(op, active, input)
            return ready.step(input, state, weight, bias, residual, mask, update_state)
        input, bias, residual = _as_weights_are(weight, input, bias, residual)
        find = torch_continual.finder()
    named = {"state": state.frames} if state.form == "ring" else {}
    ops.check_arrays(op, input=input, **named, weight=weight, bias=bias, residual=residual)
    geometry = find(op, input.shape, weight.shape, stride, padding, dilation, groups)
    ops.check_extras(op, geometry.out_channels, column_shape(geometry), bias, residual)
    mask = mask_of(op, active, input)
    epilogue = Epilogue(bias is not None, activation, residual is not None)
    if tensor:
        return torch_continual.continual_step(
            input, state, weight, bias, geometry, epilogue, residual, mask, update_state,
            key=key, **choice,
        )  # fmt: skip
    check_state(op, state, geometry, input)
    plan = step_plan(
        geometry,
        state.form,
        state.start,
        dtype=str(input.dtype),
        epilogue=epilogue,
        layout=state_layout(op, state.frames, input),
        **choice,
    )
    y = ops.empty(column_shape(geometry), input.dtype, plan.layout)
    if mask is not None or geometry.stride[0] > 1:
        y[...] = 0
    run_step(plan, input, ops.pack(plan, weight), bias, residual, state, y, mask, update_state)
    return y


def continual_step_functional(
    input: Array,
    state: State,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    residual: Array | None = None,
    active: Array | Sequence[int] | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    tolerance: float = planner.DEFAULT_TOLERANCE,
    max_workspace_bytes: int | None = None,
) -> tuple[Array, State]:
    """`continual_step` that leaves the state alone and returns the column with a new state.

    For training frame by frame: with tensors, gradients flow through both results to the input,
    the state, the weight, the bias and the residual.
    """
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "backend": backend,
        "tolerance": tolerance,
        "max_workspace_bytes": max_workspace_bytes,
    }
    if not is_tensor(input):
        state = state.save()
        y = continual_step(
            input, state, weight, bias, stride, padding, dilation, groups,
            activation=activation, residual=residual, active=active, **options,
        )  # fmt: skip
        return y, state
    from . import torch_continual

    op = "continual_step_functional"
    input, bias, residual = _as_weights_are(weight, input, bias, residual)
    named = {"state": state.frames} if state.form == "ring" else {}
    ops.check_arrays(op, input=input, **named, weight=weight, bias=bias, residual=residual)
    geometry = window_geometry(op, input.shape, weight.shape, stride, padding, dilation, groups)
    check_state(op, state, geometry, input)
    ops.check_extras(op, geometry.out_channels, column_shape(geometry), bias, residual)
    epilogue = Epilogue(bias is not None, activation, residual is not None)
    return torch_continual.continual_step_functional(
        input, state, weight, bias, geometry, epilogue, residual,
        active=mask_of(op, active, input), **options,
    )  # fmt: skip


def continual_steps(
    input: Array,
    state: State,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    residual: Array | None = None,
    active: Array | Sequence[int] | None = None,
    **options: Any,
) -> Array:
    """Several frames in, the columns that they complete out: as many calls of `continual_step`.

    input     (N, C, T, *frame), the next T frames
    residual  (N, K, columns, *out_frame) or None
    result    (N, K, columns, *out_frame); T columns without a temporal stride. With one, all active
              streams must be at the same phase of it
    The rest, and the errors, as for `continual_step`.
    """
    op = "continual_steps"
    input, bias, residual = _as_weights_are(weight, input, bias, residual)
    ops.check_arrays(op, input=input, weight=weight, bias=bias, residual=residual)
    if len(input.shape) != len(weight.shape):
        raise GeometryError(
            f"{op}: input must have {len(weight.shape)} dimensions (N, C, T, *frame), "
            f"got shape {tuple(input.shape)}"
        )
    frame = (*input.shape[:2], *input.shape[3:])
    geometry = window_geometry(op, frame, weight.shape, stride, padding, dilation, groups)
    check_state(op, state, geometry, input)
    mask = mask_of(op, active, input)
    if not options.pop("update_state", True):
        state = state.save()
    times = range(input.shape[2])
    if geometry.stride[0] > 1:
        first = _phase(op, state, mask)
        times = range(-first % geometry.stride[0], input.shape[2], geometry.stride[0])
    n, k, *out = column_shape(geometry)
    shape = (n, k, len(times), *out)
    ops.check_extras(op, geometry.out_channels, shape, bias, residual)
    y: Array
    if is_tensor(input):
        from .torch_ops import new_dense

        y = new_dense(shape, input, layout_of(input))
    else:
        y = ops.empty(shape, input.dtype, layout_of(input))
    for t in range(input.shape[2]):
        at = times.index(t) if t in times else None
        column = continual_step(
            input[:, :, t],
            state,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            residual=None if residual is None else residual[:, :, at or 0],
            active=mask,
            **options,
        )
        if at is not None:
            y[:, :, at] = column
    return y


def _phase(op: str, state: State, mask: Array | None) -> int:
    """Frames since the last column, the same for all active streams."""
    seen = state.steps if mask is None else state.steps[mask]
    phases = {(t - state.frames.shape[2]) % state.stride for t in seen.tolist()}
    if len(phases) > 1:
        raise GeometryError(
            f"{op}: with a temporal stride all active streams must be at the same phase of it, "
            f"got {sorted(phases)}"
        )
    return phases.pop() if phases else 0


def _as_weights_are(weight: Array, *arrays: Array | None) -> Sequence[Any]:
    """What autocast may have made less precise than the weights; a state keeps its precision."""
    if not is_tensor(weight):
        return arrays
    from . import torch_continual

    return torch_continual.as_weights_are(weight, *arrays)


def _check_axes(op: str, frame: Sequence[int], weight: Sequence[int]) -> None:
    n = len(weight) - 2
    if len(frame) != n + 1:
        raise GeometryError(
            f"{op}: input must have {n + 1} dimensions (N, C, *frame), got shape {tuple(frame)}"
        )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, Sequence) else value


def known_geometry(
    op: str,
    frame: Sequence[int],
    weight: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Geometry:
    """`window_geometry`, remembered: a stream asks for the same one with every frame."""
    stride, padding, dilation = (
        tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation)
    )
    try:
        return _remembered(op, tuple(frame), tuple(weight), stride, padding, dilation, groups)
    except TypeError:  # no key: an extent that a compiler keeps open, a list in a list
        return window_geometry(op, frame, weight, stride, padding, dilation, groups)


def window_geometry(
    op: str,
    frame: Sequence[int],
    weight: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Geometry:
    """The geometry of one output column: L + 1 frames in.

    frame (N, C, *frame), weight (K, C / groups, KT, *kernel), the rest as for the whole stream
    """
    _check_axes(op, frame, weight)
    time = _first(dilation)
    reach = (time if isinstance(time, int) else 1) * (weight[2] - 1) + 1 if len(weight) > 2 else 1
    g = Geometry.of(
        (*frame[:2], reach, *frame[2:]), weight, stride, padding, dilation, groups, op=op
    )
    if g.padding[0] != (0, 0):
        raise GeometryError(
            f"{op}: temporal padding must be 0, got {g.padding[0][0]}; "
            "the state stands in front of the stream"
        )
    return g


_remembered = lru_cache(maxsize=4096)(window_geometry)


def column_shape(window: Geometry) -> tuple[int, ...]:
    """(N, K, *out_frame)"""
    n, k, _, *out = window.y_shape
    return (n, k, *out)


def state_shape(window: Geometry, form: str) -> tuple[int, ...]:
    """Of `State.frames` for a window."""
    n, c, reach, *frame = window.x_shape
    if form == "ring":
        return (n, c, reach - 1, *frame)
    n, k, *out = column_shape(window)
    return (n, k, reach - 1, *out)


def check_state(op: str, state: State, window: Geometry, input: Array) -> None:
    """Raise if the state is not one of this window, and where the input is."""
    arrays = {"state frames": state.frames, "state steps": state.steps}
    ops.check_dense(op, input=input, **arrays)
    for name, array in arrays.items():
        if is_tensor(array) and array.device != input.device:
            raise UnsupportedError(
                f"{op}: input is on device {input.device}, but {name} are on {array.device}"
            )
    frames, steps = ((tuple(a.shape), _dtype(a)) for a in (state.frames, state.steps))
    check_memory(op, window, _dtype(input), state.form, state.start, state.stride, frames, steps)
    counters = state.steps
    apart = counters.stride(0) if is_tensor(counters) else counters.strides[0]
    if window.batch > 1 and not apart:
        raise GeometryError(f"{op}: state steps must count every stream, got one counter for all")


def check_memory(
    op: str,
    window: Geometry,
    dtype: str,
    form: str,
    start: str,
    stride: int,
    frames: tuple[tuple[int, ...], str],
    steps: tuple[tuple[int, ...], str],
) -> None:
    """`check_state` of shapes and precisions: dtype the input's; frames and steps (shape, dtype)"""
    if form not in FORMS or start not in STARTS:
        raise UnsupportedError(
            f"{op}: a state has a form of {', '.join(FORMS)} and a start of {', '.join(STARTS)}, "
            f"got {form!r} and {start!r}"
        )
    if stride != window.stride[0]:
        raise GeometryError(
            f"{op}: the state is for temporal stride {stride}, got {window.stride[0]}"
        )
    want = state_shape(window, form)
    if frames[0] != want:
        raise GeometryError(f"{op}: state frames must have shape {want}, got {frames[0]}")
    if steps != ((window.batch,), "int64"):
        raise GeometryError(
            f"{op}: state steps must be int64 of shape ({window.batch},), got {steps[1]} {steps[0]}"
        )
    wide = dtype if form == "ring" or dtype == "float64" else "float32"
    if frames[1] != wide:
        raise UnsupportedError(
            f"{op}: the state must be {wide} for an input of {dtype}, got {frames[1]}"
        )


def _dtype(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def state_layout(op: str, frames: Array, input: Array) -> str:
    """The layout that a step computes in: the state's, or the input's where there is none."""
    if not frames.shape[2]:
        return layout_of(input)
    layout = dense_layout(frames)
    if layout is None:
        raise GeometryError(
            f"{op}: state frames must be dense, contiguous or channels last; a strided view is not"
        )
    return layout


def mask_of(op: str, active: Any, input: Array) -> Array | None:
    """(N,) bool of the kind of `input` from a mask or the numbers of slots."""
    if active is None:
        return None
    n, tensor = input.shape[0], is_tensor(input)
    array = hasattr(active, "dtype")
    if array:
        ops.check_dense(op, active=active)
    if array and _dtype(active) == "bool":
        if tuple(active.shape) != (n,):
            raise GeometryError(f"{op}: active must have shape ({n},), got {tuple(active.shape)}")
        if is_tensor(active) != tensor or (tensor and active.device != input.device):
            raise UnsupportedError(f"{op}: active must be of the kind and on the device of input")
        return active.contiguous() if tensor else np.ascontiguousarray(active)
    slots = active.tolist() if hasattr(active, "tolist") else list(active)
    whole = (isinstance(s, (int, np.integer)) and not isinstance(s, bool) for s in slots)
    if not all(whole) or not all(0 <= slot < n for slot in slots):
        raise GeometryError(f"{op}: active slots must be in 0 .. {n - 1}, got {slots}")
    mask = np.zeros(n, np.bool_)
    mask[slots] = True
    if not tensor:
        return mask
    import torch

    return torch.from_numpy(mask).to(input.device)


def step_plan(window: Geometry, form: str, start: str, **choice: Any) -> Plan:
    """The plan of a step; choice: as for `planner.plan`.

    It is the plan of one stream, so that no stream's bits depend on how many there are.
    """
    plan = planner.plan(replace(window, batch=1), continual=True, **choice)
    options = {"sum": int(form == "sum"), "replicate": int(start == "replicate")}
    config = tuple((name, value) for name, value in options.items() if value)
    if not config and window.batch == 1:
        return plan
    plan = replace(plan, geometry=window, config=config)
    limit = choice.get("max_workspace_bytes")
    if limit is not None:  # which the planner held against one stream in the form of frames
        elements = backends.kernel(plan.family, plan.backend).workspace_size(plan)
        size = elements * ELEMENT_BYTES[plan.dtype]
        if size > limit:
            raise UnsupportedError(
                f"{window.batch} streams in form {form!r} on backend {plan.backend!r} need "
                f"{size:,} bytes of workspace, allowed are {limit:,}"
            )
    return plan


def run_step(
    plan: Plan,
    x: np.ndarray,
    packed: Any,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    state: State,
    y: np.ndarray,
    active: np.ndarray | None = None,
    update: bool = True,
) -> None:
    """One step of a continual plan on NumPy arrays; writes y and state."""
    if not x.shape[0]:
        return
    module = backends.kernel(plan.family, plan.backend)
    x, residual = ops.dense(x, plan.layout), ops.dense(residual, plan.layout)
    scratch = ops.workspace(module.workspace_size(plan), y.dtype)
    bias = ops.flat(bias)
    module.run(
        plan, x, packed, bias, residual, state.frames, state.steps, y, scratch, active, update
    )
