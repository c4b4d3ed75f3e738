"""What this machine can do at most, measured in the same run: multiply-adds and copied bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastconv import backends
from fastconv.counts import Counts
from fastconv.timing import measure

from .contenders import Settings

# Bytes moved by one copy, half read, half written: 256 KB to 128 MB; a GPU has larger memories.
SIZES = tuple(1 << power for power in range(18, 28))
CUDA_SIZES = tuple(1 << power for power in range(20, 31, 2))
# Of each measurement; a roof is the best of them. A quiet machine needs much less.
REPEATS, BUDGET_S = 300, 1.0


@dataclass(frozen=True)
class Roofline:
    """The two roofs.

    multiply_adds_per_s  by precision, on all threads; `method` says how they were measured
    copy_bytes_per_s     bytes read plus bytes written, by the bytes that one copy moves in all
    """

    multiply_adds_per_s: dict[str, float]
    method: str
    copy_bytes_per_s: dict[int, float]

    def bandwidth(self, moved: int) -> float:
        """Of the copy next in size to this many bytes: small layers live in caches."""
        nearest = min(self.copy_bytes_per_s, key=lambda size: abs(np.log(size / max(moved, 1))))
        return self.copy_bytes_per_s[nearest]

    def roof(self, counts: Counts, dtype: str = "float32") -> tuple[float, str]:
        """The least milliseconds for so much arithmetic and memory, and which of both decides.

        Every multiplication, with its addition, and every operation of a transform takes one
        multiply-add slot.
        """
        operations = float(
            counts.multiplications
            + counts.transform_multiplications
            + counts.transform_additions
            + counts.transform_shifts
        )
        moved = counts.activation_bytes + counts.weight_bytes
        compute = 1e3 * operations / self.multiply_adds_per_s[dtype]
        memory = 1e3 * moved / self.bandwidth(moved)
        return (compute, "compute") if compute >= memory else (memory, "memory")

    def total(self, parts: Sequence[Counts], dtype: str = "float32") -> tuple[float, str]:
        """Of layers run one after the other: the sum, and which kind of roof is most of it."""
        roofs = [self.roof(part, dtype) for part in parts]
        compute = sum(ms for ms, name in roofs if name == "compute")
        memory = sum(ms for ms, name in roofs if name == "memory")
        return compute + memory, "compute" if compute >= memory else "memory"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def of(settings: Settings, dtypes: Sequence[str] = ("float32",)) -> Roofline:
    """Measure both roofs."""
    if settings.device != "cpu":
        return _of_gpu(dtypes)
    if backends.available()["numba"] is None:
        from . import fma

        call: Callable[[], object]
        multiply_adds, call = fma.loop(settings.threads, rounds=200_000)
        method = f"Numba, {fma.CHAINS} independent chains of multiply-adds per thread"
    else:
        multiply_adds, call = _product(1536)
        method = "NumPy, product of two 1536 x 1536 matrices"
    rate = 1e3 * multiply_adds / _best_ms(call)
    # Other precisions are for GPUs; a CPU kernel that has them is held to float32's peak.
    return Roofline(dict.fromkeys(dtypes, rate), method, {size: _copy(size) for size in SIZES})


def _best_ms(call: Callable[[], object]) -> float:
    return measure({"": call}, repeats=REPEATS, budget_s=BUDGET_S)[""].min_ms


def _product(n: int) -> tuple[int, Callable[[], object]]:
    a, b = (np.random.default_rng(seed).standard_normal((n, n), np.float32) for seed in (0, 1))
    return n**3, lambda: a @ b


def _copy(size: int) -> float:
    """Bytes per second of a copy that reads size / 2 bytes and writes as many."""
    copy = _copier(np.ones(size // 8, np.float32), np.zeros(size // 8, np.float32))
    times = max(1, (1 << 22) // size)  # what is timed should take much longer than a call

    def several() -> None:
        for _ in range(times):
            copy()

    return 1e3 * times * size / _best_ms(several)


def _copier(source: np.ndarray, target: np.ndarray) -> Callable[[], object]:
    """A copy on all threads: PyTorch's where it is installed, which splits the work."""
    if backends.available()["torch"] is None:
        import torch

        x, y = torch.from_numpy(source), torch.from_numpy(target)
        return lambda: y.copy_(x)
    return lambda: np.copyto(target, source)


def _of_gpu(dtypes: Sequence[str]) -> Roofline:
    """cuBLAS products (float32 without TF32) and copies, by CUDA events."""
    import torch

    from . import cuda

    torch.backends.cuda.matmul.allow_tf32 = False
    rates, n = {}, 8192
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
        rates[dtype] = 1e3 * n**3 / cuda.best_ms(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    copies = {}
    for size in CUDA_SIZES:
        x, y = (torch.empty(size // 8, device="cuda") for _ in range(2))
        copies[size] = 1e3 * size / cuda.best_ms(lambda x=x, y=y: y.copy_(x))  # type: ignore[misc]
    return Roofline(rates, f"cuBLAS, product of two {n} x {n} matrices", copies)
