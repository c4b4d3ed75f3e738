"""The families in Triton, for GPUs; under TRITON_INTERPRET=1 the same code runs on CPU tensors."""

if __name__ != "fastconv.triton_kernels":
    raise ImportError(f"import fastconv.triton_kernels, not {__name__}: that name is another's")
