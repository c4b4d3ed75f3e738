"""Runs that are limited to an older instruction set, ours and the peers' alike.

Libraries read such limits from the environment, once, as they are loaded; child processes inherit
it. Peers that do not obey are left out.
"""

from __future__ import annotations

import os

# oneDNN and PyTorch's own kernels; ours in C; what LLVM compiles for.
LIMITS = {
    "avx2": {
        "FASTCONV_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma",
    },
}
OBEDIENT = "torch,torch-last"


def limit(isa: str) -> None:
    """Limit this process and its children; before any library is loaded."""
    os.environ.update(LIMITS[isa])


def limited() -> str | None:
    """The instruction set that this process is limited to, or None."""
    for isa, variables in LIMITS.items():
        if all(os.environ.get(name) == value for name, value in variables.items()):
            return isa
    return None
