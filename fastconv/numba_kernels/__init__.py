"""CPU kernels compiled by Numba: vector code of the host's register width, without a C compiler.

`simd` holds the recipe (building blocks in LLVM IR, kernels kept on disk, parallel loops), `gemm`
the matrix micro-kernel, `layout` the conversions between contiguous and channels-last memory; the
other modules are one convolution family each, or parts of one.
"""
