"""Networks of the papers in plain PyTorch: what rewriting and counting are tried on.

They are untrained, with seeded weights, and use nothing of the rest of fastconv. Listing them needs
no PyTorch, building one does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .table import ALL, CONTINUAL, Network

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CONTINUAL", "NETWORKS", "Network", "build"]

NETWORKS: dict[str, Network] = {network.name: network for network in ALL}


def build(name: str, **options: Any) -> nn.Module:
    """Build a network by name; options are those of its builder, at least `num_classes` and `seed`.

    Raises ValueError for an unknown name, ImportError without PyTorch.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}. Known: {', '.join(sorted(NETWORKS))}")
    return NETWORKS[name].builder(**options)
