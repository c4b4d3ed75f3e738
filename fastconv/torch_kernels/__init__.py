"""The families on PyTorch's own convolution: the fallback on every device, and the baseline."""
