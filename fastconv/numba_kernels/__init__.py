"""CPU kernels compiled by Numba: explicit vector code of the host's register width, without a C compiler.

`simd` holds the recipe (building blocks in LLVM IR, kernels on disk, parallel loops), `gemm` the matrix micro-kernel, `layout` the
conversions between contiguous and channels-last memory; the other modules are one convolution family each.
"""
