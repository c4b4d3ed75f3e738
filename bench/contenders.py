"""What ours and every peer look like to the harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np

from fastconv.plan import CHANNELS_LAST, Plan

MOST_SETS = 16


@dataclass(frozen=True)
class Settings:
    """Where and how to time.

    budget_s  of timing per contender of a case
    cold      caches are emptied before each call (CPU)
    """

    threads: int
    repeats: int = 50
    budget_s: float = 0.5
    cold: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Prepared:
    """A contender ready to run one problem: weights packed, code compiled.

    call       one run as its users would do it, from input to output; for `streams` one step
    output     the answer to compare with `Problem.want`; runs whatever it takes
    precision  of the operands
    algorithm  what ran, in a few words
    plans      ours only: the plans of one run, for counting
    factor     how much more error than a direct sum's the algorithm may make
    """

    call: Callable[[], Any]
    output: Callable[[], Any]
    precision: str = "float32"
    algorithm: str = ""
    plans: tuple[Plan, ...] = field(default=(), repr=False)
    factor: float = 1.0


def tensor(array: np.ndarray | None, layout: str, dtype: str, device: str) -> Any:
    """A tensor of an array (N, C, *size); None of None. Only 5 dimensions have two layouts."""
    if array is None:
        return None
    import torch

    made = torch.from_numpy(array).to(device, getattr(torch, dtype))
    if layout == CHANNELS_LAST and made.dim() == 5:
        return made.contiguous(memory_format=torch.channels_last_3d)
    return made.contiguous()


def inputs(array: np.ndarray, layout: str, dtype: str, settings: Settings) -> Iterator[Any]:
    """The input again and again; on a GPU in enough copies that its L2 cache does not answer."""
    first = tensor(array, layout, dtype, settings.device)
    return cycle([first, *(first.clone() for _ in range(sets(first, settings) - 1))])


def sets(first: Any, settings: Settings) -> int:
    """Copies of an input that together fill the L2 cache twice; 1 on a CPU."""
    if settings.device == "cpu":
        return 1
    import torch

    cache = torch.cuda.get_device_properties(settings.device).L2_cache_size
    return max(1, min(MOST_SETS, -(-2 * cache // max(1, first.numel() * first.element_size()))))


def in_place(call: Callable[[], Any], settings: Settings, tf32: bool = False) -> Callable[[], Any]:
    """The call as it should run on the settings' device.

    On a GPU, whether float32 operands may be rounded to TF32 is a global flag that cuDNN and cuBLAS
    read when they are called, and the contender before may have left it otherwise.
    """
    if settings.device == "cpu":
        return call
    import torch

    def on_gpu() -> Any:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        return call()

    return on_gpu


def as_array(result: Any) -> Any:
    """A NumPy array of an array or tensor, float32 at least; what is on a GPU stays there.

    Of a tuple, a tuple.
    """
    if isinstance(result, tuple):
        return tuple(map(as_array, result))
    if isinstance(result, np.ndarray):
        return result
    made = result.detach()
    if made.device.type != "cpu":
        return made
    return np.asarray(made if made.element_size() >= 4 else made.float())
