"""Scale, shift, residual and activation in one pass, against PyTorch in float64."""

from __future__ import annotations

import pytest

from fastconv import backends
from fastconv.epilogue import ACTIVATIONS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    backends.why_not("triton") is not None, reason="needs a GPU or Triton's interpreter"
)
DEVICE = "cpu" if backends.interpreted() else "cuda"


def array(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("per_image", [True, False])
def test_is_what_pytorch_computes(activation, last, per_image):
    from fastconv.torch_kernels import grouped
    from fastconv.triton_kernels import elementwise

    x, residual = array(2, 7, 3, 5, 11), array(2, 7, 3, 5, 11, seed=1)
    scale, shift = array(*((2, 7) if per_image else (7,)), seed=2), array(7, seed=3)
    if last:
        x, residual = (a.contiguous(memory_format=torch.channels_last_3d) for a in (x, residual))
    y = torch.full_like(x, torch.nan)
    elementwise.blend(x, y, scale, shift, residual, activation)
    ones = (1, 1, 1)
    want = x.double() * scale.double().reshape(-1, 7, *ones) + shift.double().reshape(7, *ones)
    grouped.finish(want, residual.double(), activation, want)
    assert (y - want).abs().max() < 1e-5
    elementwise.blend(x, y)
    assert torch.equal(y, x)


def test_nan_stays_where_it_was():
    from fastconv.triton_kernels import elementwise

    x = array(1, 3, 2, 2, 2)
    x[0, 1, 0, 0, 0] = torch.nan
    for activation in ACTIVATIONS:
        y = torch.empty_like(x)
        elementwise.blend(x, y, activation=activation)
        assert torch.equal(y.isnan(), x.isnan())
