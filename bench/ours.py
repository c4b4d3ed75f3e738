"""Our kernels on a problem: planned and packed beforehand; all else happens in the call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv import backends, continual, ops, planner
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, CONTIGUOUS, Plan

from . import continual_networks
from .contenders import Prepared, Settings, as_array, in_place, inputs, tensor
from .problems import Problem
from .torch_peers import forward_backward


@dataclass(frozen=True)
class Choice:
    """What to run, as `fastconv.plan` takes it; `tile` and `algorithm` are for `layers` only."""

    backend: str = "auto"
    algorithm: str = "auto"
    tile: tuple[int, ...] | None = None
    layout: str = CHANNELS_LAST


def prepare(problem: Problem, choice: Choice, settings: Settings) -> Prepared:
    """Raises UnsupportedError or BackendError with the reason if this choice cannot run."""
    if problem.clip is not None:
        return continual_networks.ours(problem, choice.backend, settings)
    if problem.case.kind == "networks":
        return _network(problem, choice, settings)
    if problem.case.kind == "streams":
        return _stream(problem, choice, settings)
    if problem.case.kind == "training":
        return _training(problem, choice, settings)
    return _layer(problem, choice, settings)


def _plan(problem: Problem, choice: Choice, settings: Settings) -> Plan:
    geometry, epilogues = problem.case.geometry, problem.epilogues
    assert geometry is not None
    plain = problem.case.kind in ("layers", "training")
    return planner.plan(
        geometry,
        dtype=problem.case.dtype,
        device=settings.device,
        epilogue=epilogues[0] if isinstance(geometry, Geometry) else epilogues,  # type: ignore[arg-type]
        layout=choice.layout,
        algorithm=choice.algorithm if plain else "auto",
        backend=choice.backend,
        tile=choice.tile if plain else None,
        # A tile that was asked for is shown with its error, whatever that is.
        tolerance=float("inf") if plain and choice.tile else planner.DEFAULT_TOLERANCE,
        continual=problem.case.kind == "streams",
    )


def _layer(problem: Problem, choice: Choice, settings: Settings) -> Prepared:
    plan = _plan(problem, choice, settings)
    single = isinstance(plan.geometry, Geometry)
    packed = ops.pack(plan, problem.weights[0] if single else problem.weights)
    biases: tuple[Any, ...] = problem.biases
    call: Callable[[], Any]
    if plan.backend != "reference":
        # As users of PyTorch call us: tensors in, a tensor out.
        from fastconv import torch_ops

        xs = inputs(problem.x, plan.layout, plan.dtype, settings)
        biases = tuple(tensor(b, CONTIGUOUS, plan.dtype, plan.device) for b in biases)
        bias = biases[0] if single else biases

        def call() -> Any:
            return torch_ops.execute(plan, next(xs), packed, bias, None)
    else:
        x, bias = laid_out(problem.x, plan.layout), biases[0] if single else biases

        def call() -> Any:
            return ops.execute(plan, x, packed, bias, None)

    factor = max(1.0, planner.error_factor(plan))
    run = in_place(call, settings)
    return Prepared(run, lambda: as_array(run()), plan.dtype, _algorithm(plan), (plan,), factor)


def _training(problem: Problem, choice: Choice, settings: Settings) -> Prepared:
    """Forward and backward through autograd, packing the weights anew as after each update."""
    (stage,) = problem.stages
    plan = _plan(problem, choice, settings)
    convolve = (ops.conv1d, ops.conv2d, ops.conv3d)[stage.n - 1]

    def run(x: Any, w: Any) -> Any:
        return convolve(
            x,
            w,
            None,
            stage.stride,
            stage.padding,
            stage.dilation,
            stage.groups,
            algorithm=choice.algorithm,
            backend=choice.backend,
        )

    last = choice.layout == CHANNELS_LAST
    call = in_place(forward_backward(problem, settings, last, run), settings)
    return Prepared(
        call,
        lambda: as_array(call()),
        plan.dtype,
        f"{_algorithm(plan)} and gradients",
        factor=max(1.0, planner.error_factor(plan)),
    )


def _algorithm(plan: Plan) -> str:
    return f"{plan.backend} {plan.algorithm}"


def _stream(problem: Problem, choice: Choice, settings: Settings) -> Prepared:
    plan = _plan(problem, choice, settings)
    assert isinstance(plan.geometry, Geometry)
    weight, bias, w = problem.weights[0], problem.biases[0], None
    if plan.device != "cpu":
        from fastconv import torch_continual

        def put(array: np.ndarray | None, layout: str = plan.layout) -> Any:
            return tensor(array, layout, plan.dtype, plan.device)

        frames = [put(frame) for frame in problem.x]
        w, b = put(weight, CONTIGUOUS), put(bias)

        def step(frame: Any, state: continual.State) -> Any:
            return torch_continual.step(plan, frame, state, w, b, None)
    else:
        frames, packed = [laid_out(f, plan.layout) for f in problem.x], ops.pack(plan, weight)
        shape = (*plan.geometry.y_shape[:2], *plan.geometry.y_shape[3:])

        def step(frame: Any, state: continual.State) -> Any:
            y = empty(shape, plan.layout)
            continual.run_step(plan, frame, packed, bias, None, state, y)
            return y

    dilation = plan.geometry.dilation

    def fresh() -> continual.State:
        return continual.continual_state(frames[0], weight if w is None else w, dilation)

    def output() -> np.ndarray:
        state = fresh()
        return as_array([step(frame, state) for frame in frames][-1])

    state = fresh()
    call = in_place(lambda: step(frames[0], state), settings)
    return Prepared(call, output, plan.dtype, _algorithm(plan), (plan,))


def _network(problem: Problem, choice: Choice, settings: Settings) -> Prepared:
    import torch

    from fastconv.nn.rewrite import accelerate

    if choice.backend != "auto":
        backends.check(choice.backend)
    dtype = problem.case.dtype
    xs = inputs(problem.x, choice.layout, dtype, settings)
    assert problem.model is not None
    source = copy.deepcopy(problem.model).to(settings.device, getattr(torch, dtype))
    # Planned under the flags under which it runs.
    accelerated = in_place(
        lambda: accelerate(source, next(xs), backend=choice.backend, check=False), settings
    )
    model, report = accelerated()
    plans = tuple(layer.plan for layer in report.layers if layer.plan is not None)
    used = "+".join(dict.fromkeys(plan.backend for plan in plans))

    def call() -> Any:
        with torch.inference_mode():
            return model(next(xs))

    run, name = in_place(call, settings), f"{used} accelerate"
    return Prepared(run, lambda: as_array(run()), dtype, name, plans, report.error_factor)


def empty(shape: tuple[int, ...], layout: str) -> np.ndarray:
    """An uninitialised float32 array (N, C, *size) in a layout."""
    if layout == CONTIGUOUS:
        return np.empty(shape, np.float32)
    return np.moveaxis(np.empty((shape[0], *shape[2:], shape[1]), np.float32), -1, 1)


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values in (N, C, *size) order, in memory as the layout says."""
    new = empty(array.shape, layout)
    new[...] = array
    return new
