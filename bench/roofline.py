"""What this machine can do at most, measured in the same run: multiply-adds per second, and bytes copied per second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastconv import backends
from fastconv.counts import Counts
from fastconv.timing import measure

# Bytes moved by one copy, half read, half written: 256 KB to 128 MB.
SIZES = tuple(1 << power for power in range(18, 28))
REPEATS, BUDGET_S = 300, 0.4  # of each measurement; roofs are the best of them


@dataclass(frozen=True)
class Roofline:
    """The two roofs.

    multiply_adds_per_s  float32 multiply-adds, all threads; how they were measured is in `method`
    copy_bytes_per_s     bytes read plus bytes written by a copy that moves so many bytes in all
    """

    multiply_adds_per_s: float
    method: str
    copy_bytes_per_s: dict[int, float]

    @property
    def memory_bytes_per_s(self) -> float:
        """Of the largest copy, which no cache holds."""
        return self.copy_bytes_per_s[max(self.copy_bytes_per_s)]

    def bandwidth(self, moved: int) -> float:
        """Of the copy next in size to this many bytes: small layers live in caches."""
        nearest = min(self.copy_bytes_per_s, key=lambda size: abs(np.log(size / max(moved, 1))))
        return self.copy_bytes_per_s[nearest]

    def roof(self, counts: Counts) -> tuple[float, str]:
        """The least milliseconds for so much arithmetic and memory, and which of both decides.

        Every multiplication, with its addition, and every operation of a transform takes one multiply-add slot.
        """
        operations = float(
            counts.multiplications
            + counts.transform_multiplications
            + counts.transform_additions
            + counts.transform_shifts
        )
        moved = counts.activation_bytes + counts.weight_bytes
        compute = 1e3 * operations / self.multiply_adds_per_s
        memory = 1e3 * moved / self.bandwidth(moved)
        return (compute, "compute") if compute >= memory else (memory, "memory")

    def record(self) -> dict[str, Any]:
        return asdict(self)


def of(threads: int) -> Roofline:
    """Measure both roofs on so many threads."""
    if backends.available()["numba"] is None:
        from . import fma

        multiply_adds, call = fma.loop(threads, rounds=200_000)
        method = f"Numba, {fma.CHAINS} independent chains of multiply-adds per thread"
    else:
        multiply_adds, call = _product(1536)
        method = "NumPy, product of two 1536 x 1536 matrices"
    timing = measure({"multiply-adds": call}, repeats=REPEATS, budget_s=BUDGET_S)["multiply-adds"]
    copies = {size: _copy(size) for size in SIZES}
    return Roofline(1e3 * multiply_adds / timing.min_ms, method, copies)


def _product(n: int) -> tuple[int, Callable[[], object]]:
    a, b = (np.random.default_rng(seed).standard_normal((n, n), np.float32) for seed in (0, 1))
    return n**3, lambda: a @ b


def _copy(size: int) -> float:
    """Bytes per second of a copy that reads size / 2 bytes and writes as many."""
    call = _copier(np.ones(size // 8, np.float32), np.zeros(size // 8, np.float32))
    times = max(1, (1 << 22) // size)  # a timed call should take much longer than a call

    def several() -> None:
        for _ in range(times):
            call()

    timing = measure({"copy": several}, repeats=REPEATS, budget_s=BUDGET_S)["copy"]
    return 1e3 * times * size / timing.min_ms


def _copier(source: np.ndarray, target: np.ndarray) -> Callable[[], object]:
    """A copy on all threads: PyTorch's where it is installed, which splits the work; else NumPy's."""
    if backends.available()["torch"] is None:
        import torch

        x, y = torch.from_numpy(source), torch.from_numpy(target)
        return lambda: y.copy_(x)
    return lambda: np.copyto(target, source)


def total_roof(roofline: Roofline, parts: Sequence[Counts]) -> tuple[float, str]:
    """The sum of the roofs of layers run one after the other, and which kind decides most of it."""
    roofs = [roofline.roof(part) for part in parts]
    compute = sum(ms for ms, name in roofs if name == "compute")
    memory = sum(ms for ms, name in roofs if name == "memory")
    return compute + memory, "compute" if compute >= memory else "memory"
