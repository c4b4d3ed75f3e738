"""Models with statistics that are not 0 and 1, and whether two of them compute the same."""

from __future__ import annotations

import torch

nn = torch.nn


def randomized(model: nn.Module) -> nn.Module:
    """Eval mode, with statistics and affine parameters that are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            with torch.no_grad():
                for t, low in ((module.weight, 0.5), (module.running_var, 0.5)):
                    t.copy_(torch.rand(t.shape, generator=generator) + low)
                for t in (module.bias, module.running_mean):
                    t.copy_(torch.randn(t.shape, generator=generator))
    return model.eval()


def close(got, want) -> None:
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * scale)


def leaves(output):
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def run(model, *args):
    with torch.no_grad():
        return model(*args)
