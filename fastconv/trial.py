"""A request with arrays and the exact answer: how plans run for users, and whether rightly."""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import numpy as np

from . import backends, continual, ops
from .geometry import SeparableGeometry
from .layouts import CHANNELS_LAST
from .plan import Plan, Request
from .reference import direct

DTYPES = ("float32", "float64")
# Errors of random data add like a random walk: the expected rms error, with this margin, is the
# bound. Loose against noise, tight against mistakes, which are off by the values' own size.
MARGIN = 4.0


class Trial:
    """Random arrays for a request; plans run on them through the doors that users go through.

    With PyTorch installed these are tensors, without it NumPy arrays.
    """

    def __init__(self, request: Request) -> None:
        g = request.geometry
        self._continual = request.continual
        self._stages = g.stages if isinstance(g, SeparableGeometry) else (g,)
        epilogues = request.epilogue if isinstance(request.epilogue, tuple) else (request.epilogue,)
        random = np.random.default_rng(0)

        def normal(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
            return (scale * random.standard_normal(shape)).astype(request.dtype)

        self._x = normal(self._stages[0].x_shape)
        # Over the root of the sum's length, so that every stage keeps its scale.
        self._weights = tuple(normal(s.w_shape, 1 / sqrt(_terms(s))) for s in self._stages)
        self._biases = tuple(
            normal((s.out_channels,)) if e.bias else None
            for s, e in zip(self._stages, epilogues, strict=True)
        )
        self._residual = normal(g.y_shape) if epilogues[-1].residual else None
        z: Any = self._x
        for s, w, b, e in zip(self._stages, self._weights, self._biases, epilogues, strict=True):
            added = self._residual if e.residual else None
            z = direct.finish(direct.correlate(z, w, s), b, added, e)
        self._want: np.ndarray = z
        if self._continual:  # one column, without its axis
            self._want = z[:, :, 0]
            self._residual = None if self._residual is None else self._residual[:, :, 0]

    def ready(self, plan: Plan) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Two calls without arguments, the weights packed: one run, and the whole answer.

        They differ for a continual plan: its run is one step, its answer that of the last frame.
        """
        tensors = backends.available()["torch"] is None and plan.backend != "reference"
        put = _tensor if tensors else _array
        biases = tuple(put(b, None) for b in self._biases)
        residual = put(self._residual, plan.layout)
        if self._continual:
            return self._steps(plan, put, biases[0], residual)
        x = put(self._x, plan.layout)
        single = len(self._stages) == 1
        packed = ops.pack(plan, self._weights[0] if single else self._weights)
        bias = biases[0] if single else biases
        if tensors:
            from .torch_ops import execute
        else:
            execute = ops.execute

        def run() -> Any:
            return execute(plan, x, packed, bias, residual)

        return run, run

    def _steps(
        self, plan: Plan, put: Callable[[Any, Any], Any], bias: Any, residual: Any
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """`ready` of a continual plan."""
        frames = [put(self._x[:, :, t], plan.layout) for t in range(self._x.shape[2])]
        weight, dilation = put(self._weights[0], None), self._stages[0].dilation
        if put is _tensor:
            from .torch_continual import step as step_tensors

            def step(frame: Any, state: continual.State) -> Any:
                return step_tensors(plan, frame, state, weight, bias, residual)
        else:
            packed = ops.pack(plan, weight)
            y = _array(np.empty(self._want.shape, plan.dtype), plan.layout)

            def step(frame: Any, state: continual.State) -> Any:
                continual.run_step(plan, frame, packed, bias, residual, state, y)
                return y

        def fresh() -> continual.State:
            return continual.continual_state(frames[0], weight, dilation)

        def answer() -> Any:
            state = fresh()
            return [step(frame, state) for frame in frames][-1]

        kept = fresh()
        return lambda: step(frames[0], kept), answer

    def wrong(self, got: Any, factor: float) -> str | None:
        """None for a right answer, else how wrong it is.

        factor  how much more error than a direct sum's the algorithm may make

        A running sum of n random products has relative error u sqrt(n / 2), u half the spacing of
        numbers near 1; 8 more terms for the epilogue and the store.
        """
        off = np.asarray(got, np.float64) - self._want
        if not np.isfinite(off).all():
            return "its result is wrong: not finite everywhere"
        unit = float(np.finfo(self._x.dtype).eps) / 2
        expected = factor * unit * sum(sqrt(_terms(s) / 2 + 8) for s in self._stages)
        error = sqrt(np.mean(off**2) / np.mean(self._want**2))
        if error > MARGIN * expected:
            return f"its result is wrong: rms error {error:.1e}, expected are {expected:.1e}"
        return None


def _terms(stage: Any) -> int:
    """Products per output."""
    return prod(stage.w_shape[1:])


def _array(array: np.ndarray | None, layout: str | None) -> Any:
    """The array (N, C, *size) in a layout, or in C order for None."""
    if array is None or layout != CHANNELS_LAST:
        return None if array is None else np.ascontiguousarray(array)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def _tensor(array: np.ndarray | None, layout: str | None) -> Any:
    """The same as a tensor."""
    if array is None:
        return None
    import torch

    return torch.from_numpy(_array(array, layout))
