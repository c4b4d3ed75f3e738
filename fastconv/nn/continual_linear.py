"""A linear layer of a stream's head: a convolution of one point, by our own kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from fastconv import torch_ops
from fastconv.epilogue import Epilogue
from fastconv.geometry import Geometry
from fastconv.plan import CHANNELS_LAST, Plan

from .continual_elementwise import has_c, in_c


@lru_cache(maxsize=256)
def _plan(features: int, outputs: int, slots: int, bias: bool) -> Plan:
    point = Geometry(slots, features, outputs, 1, (1,), (1,), (1,), ((0, 0),), (1,))
    return Plan("grouped", "c", point, "float32", Epilogue(bias), CHANNELS_LAST)


class Linear:
    """`torch.nn.Linear`; features (N, C) in float32 and main memory without PyTorch's product.

    Its threads and ours would take each other's time between two frames.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._point: Tensor | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether our kernel does it."""
        w = self.module.weight
        return x.dim() == 2 and isinstance(w, Tensor) and has_c()

    def packed(self, x: Tensor) -> tuple[torch_ops.Runner, Any, Tensor | None]:
        """What runs features (N, C) like these: weights in its form, bias."""
        w, b = self.module.weight, self.module.bias
        if self._point is None or self._point.data_ptr() != w.data_ptr():
            self._point = w.detach()[..., None]  # (K, C, 1), with the version of the weights
        runner = torch_ops.runner(_plan(*w.shape[::-1], x.shape[0], b is not None))
        bias = None if b is None else b.detach()
        return runner, torch_ops.held_weights(self._point).form(runner, self._point), bias

    def __call__(self, x: Tensor) -> Tensor:
        if not self.takes(x) or not in_c(x, self.module.weight.detach()):
            return self.module(x)
        runner, packed, bias = self.packed(x)
        return runner(x[..., None], packed, bias)[..., 0]
