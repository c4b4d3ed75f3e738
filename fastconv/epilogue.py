"""What happens to a value between the last sum and memory: bias, residual, activation."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnsupportedError

ACTIVATIONS = ("none", "relu", "silu", "hardswish", "sigmoid")


@dataclass(frozen=True)
class Epilogue:
    """y = activation(conv + bias + residual), the residual having the shape of y.

    none       z
    relu       max(z, 0)
    silu       z * sigmoid(z)
    hardswish  z * min(max(z + 3, 0), 6) / 6
    sigmoid    1 / (1 + exp(-z))

    NaN stays NaN under each of them.
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"unknown activation {self.activation!r}. Known: {', '.join(ACTIVATIONS)}"
            )

    @property
    def plain(self) -> bool:
        """Nothing but a bias at most."""
        return self.activation == "none" and not self.residual
