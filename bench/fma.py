"""A loop of multiply-adds in registers: the peak that no kernel can exceed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastconv.numba_kernels.simd import (
    Code,
    Int,
    address,
    block,
    fma,
    kernel,
    parallel_for,
    peek,
    vector_width,
)

# More than latency times throughput of a multiply-add, fewer than there are registers.
CHAINS = 12


@block
def _chains(code: Code, dtype: str, chains: int, out: Int, rounds: Int) -> None:
    """Independent sums s = s * a + b, rounds times; their total is stored, or they would vanish."""
    a, b = code.broadcast(out, 0), code.broadcast(out, 1)
    start = [code.splat(i) for i in range(chains)]
    sums = code.loop(rounds, lambda _, carry: [fma(s, a, b) for s in carry], start)
    total = sums[0]
    for s in sums[1:]:
        total = total + s
    code.store(total, out)


def _fma_kernel(DTYPE: str, CHAINS: int) -> Callable[..., None]:
    def fma_kernel(params: int, item: int, thread: int) -> None:
        _chains(DTYPE, CHAINS, peek(params, 0) + item * 256, peek(params, 1))

    return fma_kernel


def loop(threads: int, rounds: int) -> tuple[int, Callable[[], None]]:
    """The multiply-adds of one call, and the call."""
    out = np.empty((threads, 64), np.float32)  # 256 bytes per thread: no cache line is shared
    compiled = kernel(_fma_kernel, "float32", CHAINS)

    def call() -> None:
        out[:, :2] = 0.5  # a and b
        parallel_for(compiled, (address(out), rounds), threads)

    return threads * rounds * CHAINS * vector_width("float32"), call
