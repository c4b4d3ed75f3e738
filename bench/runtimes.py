"""Peers that take a PyTorch model over: OpenVINO, ONNX Runtime, continual-inference."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastconv.errors import UnsupportedError

from . import continual_networks
from .contenders import Prepared, Settings, as_array, in_place
from .problems import Problem
from .torch_peers import module_of, newest, set_weights, window

# Precisions as OpenVINO may spell them.
LONG = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def openvino(precision: str | None) -> Callable[[Problem, Settings], Prepared]:
    """The model converted from PyTorch and compiled for latency.

    precision: 'f32', or None for the default of this CPU, which may be bfloat16
    """

    def prepare(problem: Problem, settings: Settings) -> Prepared:
        import openvino
        import torch

        _float32(problem)
        x = window(problem)
        with quiet():
            model = openvino.convert_model(
                module_of(problem), example_input=torch.from_numpy(x), input=[x.shape]
            )
        options = {"INFERENCE_NUM_THREADS": settings.threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision is not None:
            options["INFERENCE_PRECISION_HINT"] = precision
        compiled = openvino.Core().compile_model(model, "CPU", options)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if precision is None and used in ("f32", "float32"):
            raise UnsupportedError("its default precision is float32 here: see openvino")
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

        def call() -> Any:
            request.infer()
            return request, x  # the request borrows x's memory: keep both

        def output() -> np.ndarray:
            call()
            return newest(problem, np.array(request.get_output_tensor().data))

        return Prepared(call, output, LONG.get(used, used))

    return prepare


def onnxruntime(problem: Problem, settings: Settings) -> Prepared:
    """The model exported to ONNX, on the CPU provider."""
    import onnxruntime
    import torch

    _float32(problem)
    x = window(problem)
    exported: Any = io.BytesIO()
    with quiet():
        torch.onnx.export(
            module_of(problem), (torch.from_numpy(x),), exported, dynamo=False, input_names=["x"]
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        exported.getvalue(), options, providers=["CPUExecutionProvider"]
    )

    def call() -> Any:
        return session.run(None, {"x": x})[0]

    return Prepared(call, lambda: newest(problem, call()))


def continual(problem: Problem, settings: Settings) -> Prepared:
    """continual-inference's convolution or network, one `forward_step` per frame."""
    with quiet():
        import continual
    import torch

    _float32(problem)
    if problem.case.kind == "networks":
        with quiet():
            return continual_networks.continual_inference(problem, settings)
    g = problem.stages[0]
    if g.dilation[0] != 1:
        raise UnsupportedError("continual-inference refuses temporal dilation")
    classes = {1: continual.Conv1d, 2: continual.Conv2d, 3: continual.Conv3d}
    padding = tuple(before for before, _ in g.padding)
    options = (g.kernel, g.stride, padding, g.dilation, g.groups)
    frames = torch.from_numpy(problem.x).to(settings.device)

    def made() -> Any:
        layer = classes[g.n](
            g.in_channels, g.out_channels, *options, bias=problem.biases[0] is not None
        )
        set_weights(layer, problem.weights[0], problem.biases[0])
        return layer.eval().to(settings.device)

    layer, counted = made(), made()

    def warm(module: Any) -> Any:
        with torch.inference_mode():
            return [module.forward_step(frame) for frame in frames][-1]

    def call() -> Any:
        with torch.inference_mode():
            return layer.forward_step(frames[0])

    warm(layer)
    return Prepared(
        in_place(call, settings), lambda: as_array(in_place(lambda: warm(counted), settings)())
    )


def _float32(problem: Problem) -> None:
    if problem.case.dtype != "float32":
        raise UnsupportedError("is timed in float32")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks that converters make on the way; their errors still come."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
