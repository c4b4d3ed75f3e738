"""A request with arrays and the exact answer: how plans run for users, and whether rightly."""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import numpy as np

from . import backends, continual, ops
from .geometry import Geometry, SeparableGeometry
from .layouts import CHANNELS_LAST
from .plan import Plan, Request
from .reference import direct

DTYPES = {"cpu": ("float32", "float64"), "cuda": ("float32", "float16", "bfloat16")}
# Half the spacing of numbers near 1.
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TF32_UNIT = 2.0**-11
# Errors of random data add like a random walk: the expected rms error, with this margin, is the
# bound. Loose against noise, tight against mistakes, which are off by the values' own size.
MARGIN = 4.0


class Trial:
    """Random arrays for a request; plans run on them through the doors that users go through.

    With PyTorch installed these are tensors, on the request's device, without it NumPy arrays. On a
    GPU a run is the replay of a CUDA graph and the wait for its end.
    """

    def __init__(self, request: Request) -> None:
        g = request.geometry
        self._dtype, self._device = request.dtype, request.device
        self._unit = TF32_UNIT if request.precision == "tf32" else UNIT[request.dtype]
        self._continual = request.continual
        self._stages = g.stages if isinstance(g, SeparableGeometry) else (g,)
        epilogues = request.epilogue if isinstance(request.epilogue, tuple) else (request.epilogue,)
        random = np.random.default_rng(0)

        def normal(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
            return _rounded(scale * random.standard_normal(shape), request.dtype)

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
            z = direct.finish(_correlate(z, w, s, self._device), b, added, e)
        self._want: np.ndarray = z
        if self._continual:  # one column, without its axis
            self._want = z[:, :, 0]
            self._residual = None if self._residual is None else self._residual[:, :, 0]

    def ready(self, plan: Plan) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Two calls without arguments, the weights packed: one run, and the whole answer.

        They differ for a continual plan: its run is one step, its answer that of the last frame.
        """
        tensors = backends.available()["torch"] is None and plan.backend != "reference"
        put = self._tensor if tensors else _array
        biases = tuple(put(b, None) for b in self._biases)
        residual = put(self._residual, plan.layout)
        if self._continual:
            return self._steps(plan, tensors, put, biases[0], residual)
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

        return (run if self._device == "cpu" else _graph(run)), run

    def _steps(
        self, plan: Plan, tensors: bool, put: Callable[[Any, Any], Any], bias: Any, residual: Any
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """`ready` of a continual plan."""
        frames = [put(self._x[:, :, t], plan.layout) for t in range(self._x.shape[2])]
        weight, dilation = put(self._weights[0], None), self._stages[0].dilation
        if tensors:
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

        def once() -> Any:
            return step(frames[0], kept)

        return (once if self._device == "cpu" else _graph(once)), answer

    def _tensor(self, array: np.ndarray | None, layout: str | None) -> Any:
        """The array (N, C, *size) as a tensor in a layout, or in C order for None."""
        if array is None:
            return None
        import torch

        return torch.from_numpy(_array(array, layout)).to(self._device, getattr(torch, self._dtype))

    def wrong(self, got: Any, factor: float) -> str | None:
        """None for a right answer, else how wrong it is.

        factor  how much more error than a direct sum's the algorithm may make

        A running sum of n random products has relative error u sqrt(n / 2); 8 more terms for the
        epilogue and the store.
        """
        if self._device != "cpu":
            got = got.double().cpu().numpy()
        off = np.asarray(got, np.float64) - self._want
        if not np.isfinite(off).all():
            return "its result is wrong: not finite everywhere"
        sums = min(self._unit, UNIT["float32"])  # shorter formats are summed in float32
        expected = factor * sums * sum(sqrt(_terms(s) / 2 + 8) for s in self._stages)
        if self._unit > sums:  # operands and results are rounded
            expected += factor * 3 * len(self._stages) * self._unit
        error = sqrt(np.mean(off**2) / np.mean(self._want**2))
        if error > MARGIN * expected:
            return f"its result is wrong: rms error {error:.1e}, expected are {expected:.1e}"
        return None


def _rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a precision; of those that NumPy has not, or sums badly, in float32."""
    if dtype in DTYPES["cpu"]:
        return array.astype(dtype)
    import torch

    return torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()


def _correlate(x: Any, w: np.ndarray, stage: Geometry, device: str) -> np.ndarray:
    """The exact convolution; on a GPU by PyTorch in float64."""
    if device == "cpu":
        return direct.correlate(x, w, stage)
    import torch

    from .torch_kernels import grouped

    x64, w64 = (torch.from_numpy(np.asarray(a, np.float64)).to(device) for a in (x, w))
    return (
        grouped.convolve(x64, w64.unsqueeze(2) if stage.n == 1 else w64, None, stage).cpu().numpy()
    )


def _graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """A run on the GPU alone: its launches are recorded once, and its end is waited for."""
    import torch

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def _terms(stage: Any) -> int:
    """Products per output."""
    return prod(stage.w_shape[1:])


def _array(array: np.ndarray | None, layout: str | None) -> Any:
    """The array (N, C, *size) in a layout, or in C order for None."""
    if array is None or layout != CHANNELS_LAST:
        return None if array is None else np.ascontiguousarray(array)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
