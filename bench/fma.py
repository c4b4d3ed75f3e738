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

CHAINS = 12  # more than latency times throughput of a multiply-add, fewer than there are registers


@block
def _chains(code: Code, dtype: str, chains: int, out: Int, rounds: Int) -> None:
    """chains independent sums s = s * a + b, rounds times; their total goes to out, so that it is not left out."""
    a, b = code.broadcast(out, 0), code.broadcast(out, 1)
    start = [code.splat(i) for i in range(chains)]
    sums = code.loop(rounds, lambda _, carry: [fma(s, a, b) for s in carry], start)
    total = sums[0]
    for s in sums[1:]:
        total = total + s
    code.store(total, out)


def _fma_kernel(DTYPE, CHAINS):
    def fma_kernel(params, item, thread):
        _chains(DTYPE, CHAINS, peek(params, 0) + item * 256, peek(params, 1))

    return fma_kernel


def loop(threads: int, rounds: int) -> tuple[int, Callable[[], None]]:
    """The multiply-adds of one call, and the call."""
    out = np.tile(np.float32(0.5), (threads, 64))  # a cache line or more per thread: a = b = 0.5
    compiled = kernel(_fma_kernel, "float32", CHAINS)

    def call() -> None:
        out[:, :2] = 0.5
        parallel_for(compiled, (address(out), rounds), threads)

    return threads * rounds * CHAINS * vector_width("float32"), call
