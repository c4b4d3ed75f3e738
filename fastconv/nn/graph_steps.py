"""The kinds of steps that a recording is made of, each one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastconv.geometry import Geometry, SeparableGeometry

from .graph import Operation, Ref, Value

# Precisions that the steps know, by device.
DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


@dataclass(frozen=True, eq=False)
class Norm:
    """y = x * scale + shift per channel, from the statistics of a batch norm."""

    weight: Ref | None
    bias: Ref | None
    mean: Ref
    variance: Ref
    eps: float


@dataclass(eq=False)
class Conv:
    """activation(norm(conv(x) + bias) + residual), x being input_activation(x * scale) if scaled.

    geometry  of x as (N, C, *size); a linear layer has one axis of one point
    fused     what was taken in, for people
    """

    x: Value
    y: Value
    geometry: Geometry
    weight: Ref
    bias: Ref | None
    name: str
    norm: Norm | None = None
    residual: Value | None = None
    activation: str = "none"
    scale: Value | None = None
    input_activation: str = "none"
    fused: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> list[Value]:
        return [v for v in (self.x, self.scale, self.residual) if v is not None]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]

    @property
    def finished(self) -> bool:
        """Nothing can be added behind an activation."""
        return self.activation != "none"


@dataclass(eq=False)
class Block:
    """Three convolutions that run as one separable block."""

    stages: tuple[Conv, Conv, Conv]
    geometry: SeparableGeometry

    @property
    def inputs(self) -> list[Value]:
        residual = self.stages[2].residual
        return [self.stages[0].x, *([residual] if residual else [])]

    @property
    def outputs(self) -> list[Value]:
        return [self.stages[2].y]


@dataclass(eq=False)
class Blend:
    """activation(z + residual), z being norm(x), x * scale or x: never norm and scale together."""

    x: Value
    y: Value
    norm: Norm | None = None
    scale: Value | None = None
    residual: Value | None = None
    activation: str = "none"

    @property
    def inputs(self) -> list[Value]:
        return [v for v in (self.x, self.scale, self.residual) if v is not None]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]

    @property
    def finished(self) -> bool:
        return self.activation != "none"

    @property
    def parts(self) -> set[str]:
        """Which of its parts it has."""
        given = {"norm": self.norm, "scale": self.scale, "residual": self.residual}
        return {name for name, part in given.items() if part is not None} | (
            {"activation"} if self.finished else set()
        )


@dataclass(eq=False)
class Means:
    """The mean over all points of every channel."""

    x: Value
    y: Value

    @property
    def inputs(self) -> list[Value]:
        return [self.x]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]


@dataclass(eq=False)
class Pool:
    """Largest value, or mean, of windows; counted: zeros of the padding count in a mean."""

    x: Value
    y: Value
    geometry: Geometry
    mean: bool = False
    counted: bool = False

    @property
    def inputs(self) -> list[Value]:
        return [self.x]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]


@dataclass(eq=False)
class Join:
    """Channels of several values behind each other."""

    parts: list[Value]
    y: Value

    @property
    def inputs(self) -> list[Value]:
        return self.parts

    @property
    def outputs(self) -> list[Value]:
        return [self.y]


@dataclass(eq=False)
class Pad:
    """Zeros round x; `pairs` (before, after) per axis behind the channels."""

    operation: Operation
    pairs: tuple[tuple[int, int], ...]

    @property
    def x(self) -> Value:
        return self.operation.inputs[0]

    @property
    def y(self) -> Value:
        return self.operation.outputs[0]

    @property
    def inputs(self) -> list[Value]:
        return [self.x]

    @property
    def outputs(self) -> list[Value]:
        return [self.y]


@dataclass(eq=False)
class Other:
    """What PyTorch, or a module that stays, does."""

    operation: Operation

    @property
    def inputs(self) -> list[Value]:
        return self.operation.inputs

    @property
    def outputs(self) -> list[Value]:
        return self.operation.outputs


Step = Conv | Block | Blend | Means | Pool | Join | Pad | Other
