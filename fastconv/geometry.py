"""What is convolved with what: the only validation and the only extent formula of the library.

Every public call passes through `Geometry.of` (or `SeparableGeometry.of`) before anything is
allocated or written; kernels downstream trust what they are given.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from .errors import GeometryError

Pair = tuple[int, int]
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Geometry:
    """A convolution (cross-correlation, as in PyTorch) of n = 1, 2 or 3 axes.

    x `(batch, in_channels, *in_size)`, w `(out_channels, in_channels / groups, *kernel)`,
    y `(batch, out_channels, *out_size)`. `padding` holds (before, after) zeros per axis.
    Build it with `Geometry.of`, which validates; the plain constructor trusts its caller.
    """

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    in_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[Pair, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        w_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[Any] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        op: str | None = None,
    ) -> Geometry:
        """Validate the arguments of a convolution, which mean what they mean in PyTorch.

        x_shape: (N, C, *size) or, without a batch, (C, *size)
        w_shape: (K, C / groups, *kernel)
        stride, dilation: an int, or one per axis
        padding: an int, one per axis, one (before, after) pair per axis, 'valid' or 'same'
        op: the name errors begin with; default conv1d, conv2d or conv3d

        Raises GeometryError.
        """
        xs, ws = tuple(x_shape), tuple(w_shape)
        n = len(ws) - 2
        if n not in (1, 2, 3):
            raise GeometryError(
                f"{op or 'conv'}: weight must have 3, 4 or 5 dimensions (1, 2 or 3 axes), "
                f"got shape {ws}"
            )
        op = op or f"conv{n}d"
        if len(xs) not in (n + 1, n + 2):
            raise GeometryError(
                f"{op}: input must have {n + 2} dimensions (batch, channels, {n} axes) "
                f"or {n + 1} without a batch, got shape {xs}"
            )
        batch, channels, size = (1, xs[0], xs[1:]) if len(xs) == n + 1 else (xs[0], xs[1], xs[2:])
        groups = _integer(op, "groups", groups, 1)
        _check_channels(op, channels, ws, groups)
        dilation_ = _per_axis(op, "dilation", dilation, n, 1)
        stride_ = _per_axis(op, "stride", stride, n, 1)
        geometry = cls(
            batch=batch,
            in_channels=channels,
            out_channels=ws[0],
            groups=groups,
            in_size=size,
            kernel=ws[2:],
            stride=stride_,
            padding=_padding(op, padding, ws[2:], stride_, dilation_),
            dilation=dilation_,
        )
        geometry._check_extents(op)
        return geometry

    def _check_extents(self, op: str) -> None:
        for axis, out in enumerate(self.out_size):
            if out < 1:
                before, after = self.padding[axis]
                raise GeometryError(
                    f"{op}: axis {axis} has {self.in_size[axis]} inputs and padding "
                    f"({before}, {after}), but kernel {self.kernel[axis]} with dilation "
                    f"{self.dilation[axis]} needs at least {self.span[axis]}"
                )
        padded = self.batch * self.in_channels * prod(self.padded_size)
        if max(padded, prod(self.y_shape), prod(self.w_shape)) * 8 > INT64_MAX:
            raise GeometryError(
                f"{op}: input {self.x_shape} or output {self.y_shape} exceeds 2^63 bytes of float64"
            )

    @property
    def n(self) -> int:
        """Number of convolved axes: 1, 2 or 3."""
        return len(self.kernel)

    @property
    def span(self) -> tuple[int, ...]:
        """Inputs that one output reaches per axis: dilation * (kernel - 1) + 1."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def padded_size(self) -> tuple[int, ...]:
        return tuple(s + a + b for s, (a, b) in zip(self.in_size, self.padding, strict=True))

    @property
    def out_size(self) -> tuple[int, ...]:
        return tuple(
            (p - s) // st + 1
            for p, s, st in zip(self.padded_size, self.span, self.stride, strict=True)
        )

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.in_size)

    @property
    def w_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.batch, self.out_channels, *self.out_size)

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the direct algorithm; taps on padding count, as in the papers."""
        return prod(self.y_shape) * (self.in_channels // self.groups) * self.taps

    @property
    def is_depthwise(self) -> bool:
        """Every output channel reads one input channel; out_channels / groups outputs share it."""
        return self.groups == self.in_channels

    def lifted(self) -> Geometry:
        """The same convolution over three axes: leading ones of size 1 and kernel 1 are added."""
        k = 3 - self.n
        ones = (1,) * k
        return replace(
            self,
            in_size=ones + self.in_size,
            kernel=ones + self.kernel,
            stride=ones + self.stride,
            padding=((0, 0),) * k + self.padding,
            dilation=ones + self.dilation,
        )


@dataclass(frozen=True)
class SeparableGeometry:
    """A fully separable block: temporal K x 1 x 1 (dense), then depthwise 1 x R x S, then pointwise
    1 x 1 x 1.
    """

    temporal: Geometry
    depthwise: Geometry
    pointwise: Geometry

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        temporal_shape: Sequence[int],
        depthwise_shape: Sequence[int],
        pointwise_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[Any] = "same",
        *,
        op: str = "separable_block",
    ) -> SeparableGeometry:
        """Validate a block; its first stage strides and pads time, its second stage space.

        x_shape: (N, C, T, H, W) or (C, T, H, W)
        temporal_shape: (M, C, KT, 1, 1)
        depthwise_shape: (M, 1, 1, KH, KW)
        pointwise_shape: (K, M, 1, 1, 1)
        padding: as in `Geometry.of`; with a stride, 'same' means k // 2 on both sides of each axis

        Raises GeometryError.
        """
        wt, wd, wp = (
            _stage_shape(op, name, shape)
            for name, shape in zip(
                _STAGES, (temporal_shape, depthwise_shape, pointwise_shape), strict=True
            )
        )
        if wd[0] != wt[0] or wp[1] != wt[0]:
            raise GeometryError(
                f"{op}: temporal stage makes {wt[0]} channels, "
                f"but depthwise weight has {wd[0]} and pointwise weight expects {wp[1]}"
            )
        st = _per_axis(op, "stride", stride, 3, 1)
        kernel = (wt[2], wd[3], wd[4])
        if padding == "same" and any(s != 1 for s in st):
            padding = tuple(k // 2 for k in kernel)
        pt, ph, pw = _padding(op, padding, kernel, st, (1, 1, 1))
        none = (0, 0)
        temporal = Geometry.of(x_shape, wt, (st[0], 1, 1), (pt, none, none), op=f"{op} (temporal)")
        depthwise = Geometry.of(
            temporal.y_shape, wd, (1, *st[1:]), (none, ph, pw), 1, wt[0], op=f"{op} (depthwise)"
        )
        pointwise = Geometry.of(depthwise.y_shape, wp, op=f"{op} (pointwise)")
        return cls(temporal, depthwise, pointwise)

    @property
    def stages(self) -> tuple[Geometry, Geometry, Geometry]:
        return (self.temporal, self.depthwise, self.pointwise)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.temporal.x_shape

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.pointwise.y_shape

    @property
    def macs(self) -> int:
        return sum(stage.macs for stage in self.stages)


# Name of a stage -> its weight's form and the axes of that weight that must be 1.
_STAGES = {
    "temporal": ("(M, C, KT, 1, 1)", (3, 4)),
    "depthwise": ("(M, 1, 1, KH, KW)", (1, 2)),
    "pointwise": ("(K, M, 1, 1, 1)", (2, 3, 4)),
}


def _stage_shape(op: str, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    form, ones = _STAGES[name]
    if len(shape) != 5 or any(shape[a] != 1 for a in ones):
        raise GeometryError(f"{op}: {name} weight must have shape {form}, got {tuple(shape)}")
    return tuple(shape)


def _check_channels(op: str, channels: int, ws: tuple[int, ...], groups: int) -> None:
    if channels < 1 or min(ws) < 1:
        raise GeometryError(
            f"{op}: channels and kernel must be at least 1, "
            f"got {channels} input channels and weight {ws}"
        )
    if channels % groups:
        raise GeometryError(f"{op}: {channels} input channels do not divide into {groups} groups")
    if ws[0] % groups:
        raise GeometryError(f"{op}: {ws[0]} output channels do not divide into {groups} groups")
    if ws[1] * groups != channels:
        plural = "group" if groups == 1 else "groups"
        raise GeometryError(
            f"{op}: weight expects {ws[1]} input channels per group, "
            f"input has {channels} channels in {groups} {plural} ({channels // groups} per group)"
        )


def _integer(op: str, name: str, value: Any, least: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise GeometryError(f"{op}: {name} must be an integer of at least {least}, got {value!r}")
    return number


def _per_axis(op: str, name: str, value: Any, n: int, least: int) -> tuple[int, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 1:
            value = tuple(value) * n
        if len(value) != n:
            raise GeometryError(f"{op}: {name} must be an int or {n} ints, got {tuple(value)}")
        return tuple(_integer(op, name, v, least) for v in value)
    return (_integer(op, name, value, least),) * n


def _padding(
    op: str,
    padding: Any,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Pair, ...]:
    n = len(kernel)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * n
        if padding != "same":
            raise GeometryError(
                f"{op}: padding must be 'same', 'valid', an int or {n} ints, got {padding!r}"
            )
        if any(s != 1 for s in stride):
            raise GeometryError(
                f"{op}: padding 'same' needs stride 1 on every axis, got stride {stride}"
            )
        # As in PyTorch, an odd total puts the extra zero behind.
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, Sequence) and any(isinstance(p, Sequence) for p in padding):
        if len(padding) != n or any(not isinstance(p, Sequence) or len(p) != 2 for p in padding):
            raise GeometryError(
                f"{op}: padding pairs must be {n} times (before, after), got {tuple(padding)}"
            )
        return tuple(
            (_integer(op, "padding", a, 0), _integer(op, "padding", b, 0)) for a, b in padding
        )
    return tuple((p, p) for p in _per_axis(op, "padding", padding, n, 0))
