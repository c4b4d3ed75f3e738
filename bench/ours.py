"""Our kernels on a problem: planned and packed beforehand; layout changes and transforms happen in the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv import backends, ops, planner
from fastconv.geometry import Geometry, SeparableGeometry
from fastconv.plan import CHANNELS_LAST, CONTIGUOUS, Plan

from .contenders import Prepared, as_array
from .problems import Problem


@dataclass(frozen=True)
class Choice:
    """What to run, as `fastconv.plan` takes it; `tile` and `algorithm` are for `layers` only."""

    backend: str = "auto"
    algorithm: str = "auto"
    tile: tuple[int, ...] | None = None
    layout: str = CHANNELS_LAST
    device: str = "cpu"
    dtype: str = "float32"


def prepare(problem: Problem, choice: Choice) -> Prepared:
    """Raises UnsupportedError or BackendError with the reason if this choice cannot run."""
    if problem.case.kind == "networks":
        return _network(problem, choice)
    if problem.case.kind == "streams":
        return _stream(problem, choice)
    return _layer(problem, choice)


def _plan(problem: Problem, choice: Choice) -> Plan:
    geometry: Geometry | SeparableGeometry | None = problem.case.geometry
    assert geometry is not None
    epilogue: Any = problem.epilogues
    if isinstance(geometry, Geometry):
        epilogue = epilogue[0]
    plain = problem.case.kind == "layers"
    return planner.plan(
        geometry,
        dtype=choice.dtype,
        device=choice.device,
        epilogue=epilogue,
        layout=choice.layout,
        algorithm=choice.algorithm if plain else "auto",
        backend=choice.backend,
        tile=choice.tile if plain else None,
        # A tile that was asked for is shown with its error, whatever that is.
        tolerance=float("inf") if plain and choice.tile else planner.DEFAULT_TOLERANCE,
        continual=problem.case.kind == "streams",
    )


def _layer(problem: Problem, choice: Choice) -> Prepared:
    plan = _plan(problem, choice)
    single = isinstance(plan.geometry, Geometry)
    packed = ops.pack(plan, problem.weights[0] if single else problem.weights)
    if plan.device != "cpu" or plan.backend == "torch":
        from fastconv import torch_ops

        x, biases = _tensor(problem.x, choice), [_tensor(b, choice) for b in problem.biases]
        bias = biases[0] if single else tuple(biases)

        def call() -> Any:
            return torch_ops.execute(plan, x, packed, bias, None)
    else:
        array = laid_out(problem.x, choice.layout)
        given = problem.biases[0] if single else problem.biases

        def call() -> Any:
            return ops.execute(plan, array, packed, given, None)

    return _prepared(call, plan)


def _prepared(call: Any, plan: Plan) -> Prepared:
    factor = max(1.0, planner.error_factor(plan))
    return Prepared(call, lambda: as_array(call()), plan.dtype, _algorithm(plan), (plan,), factor)


def _algorithm(plan: Plan) -> str:
    return f"{plan.backend} {plan.algorithm}"


def _stream(problem: Problem, choice: Choice) -> Prepared:
    plan = _plan(problem, choice)
    g = plan.geometry
    assert isinstance(g, Geometry)
    packed, bias = ops.pack(plan, problem.weights[0]), problem.biases[0]
    frames = [laid_out(f, choice.layout) for f in problem.x]
    ring = (*g.x_shape[:2], g.in_size[0] - 1, *g.in_size[1:])

    def fresh() -> ops.State:
        return ops.State(
            laid_out(np.zeros(ring, np.float32), choice.layout), np.zeros(g.batch, np.int64)
        )

    def step(frame: np.ndarray, state: ops.State) -> np.ndarray:
        shape = (*g.y_shape[:2], *g.y_shape[3:])
        y = empty(shape, choice.layout)
        ops.run_step(plan, frame, packed, bias, None, state, y)
        return y

    def output() -> np.ndarray:
        state = fresh()
        return [step(frame, state) for frame in frames][-1]

    state = fresh()
    return Prepared(lambda: step(frames[0], state), output, plan.dtype, _algorithm(plan), (plan,))


def _network(problem: Problem, choice: Choice) -> Prepared:
    import torch

    from fastconv.nn.rewrite import accelerate

    if choice.backend != "auto":
        backends.check(choice.backend)
    x = _tensor(problem.x, choice)
    model, report = accelerate(problem.model, x, backend=choice.backend, check=False)
    plans = tuple(layer.plan for layer in report.layers if layer.plan is not None)
    used = "+".join(dict.fromkeys(plan.backend for plan in plans))

    def call() -> Any:
        with torch.inference_mode():
            return model(x)

    return Prepared(
        call,
        lambda: as_array(call()),
        choice.dtype,
        f"{used} accelerate",
        plans,
        report.error_factor,
    )


def _tensor(array: np.ndarray | None, choice: Choice) -> Any:
    if array is None:
        return None
    import torch

    tensor = torch.from_numpy(array).to(choice.device, getattr(torch, choice.dtype))
    if choice.layout == CONTIGUOUS or tensor.dim() != 5:
        return tensor
    return tensor.to(memory_format=torch.channels_last_3d)


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
