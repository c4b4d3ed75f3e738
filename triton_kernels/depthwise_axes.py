"""Which inputs a tile of outputs reads along one axis, and how a program walks along time.

Both directions are the same kernel: a forward pass reads inputs o * stride + tap * dilation, the
gradient of the input reads those outputs that a tap brings to it. In a tile whose extent is a
multiple of the stride, which taps these are depends on the place in the tile alone.
"""

from __future__ import annotations

from dataclasses import dataclass

# Per output of a tile: (tap, position of the input relative to the tile's first).
Reads = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Axis:
    """A tile along height or width.

    reads    per output its (tap, position) pairs
    in_step  positions from one tile to the next
    """

    reads: Reads
    in_step: int

    @property
    def outs(self) -> int:
        """Outputs of a tile."""
        return len(self.reads)

    @property
    def positions(self) -> tuple[int, ...]:
        """What a tile reads, in order."""
        return tuple(sorted({p for pairs in self.reads for _, p in pairs}))


def forward(outs: int, kernel: int, stride: int, dilation: int) -> Axis:
    """A tile of `outs` outputs; its position 0 is the input under the first output's first tap."""
    reads = tuple(tuple((k, i * stride + k * dilation) for k in range(kernel)) for i in range(outs))
    return Axis(reads, outs * stride)


def backward(steps: int, kernel: int, stride: int, dilation: int) -> Axis:
    """A tile of `steps * stride` gradients of (padded) inputs, as a function of the outputs'."""
    reads = tuple(
        tuple(
            (k, (i - k * dilation) // stride)
            for k in range(kernel)
            if (i - k * dilation) % stride == 0
        )
        for i in range(steps * stride)
    )
    return Axis(reads, steps)


@dataclass(frozen=True)
class Stream:
    """A program's walk along time: at every step it reads frames and adds them to `ring` frames of
    sums, the oldest of which are then complete.

    frames    what a step reads, relative to its first frame
    terms     (which of `frames`, age of the sum it goes to, which output of the step, tap)
    ring      steps that add to one sum
    in_step   input frames from one step to the next
    out_step  output frames from one step to the next; `outs` of them are completed per step
    residues  output frames r, r + residues, ... are walks of their own
    """

    frames: tuple[int, ...]
    terms: tuple[tuple[int, int, int, int], ...]
    ring: int
    in_step: int
    out_step: int
    outs: int = 1
    residues: int = 1


def streamed(kernel: int, stride: int, dilation: int, reverse: bool = False) -> Stream:
    """Every input frame is read once; for stride 1 or dilation 1.

    reverse: the first tap is the last one, as in the gradient of a convolution with stride 1
    """
    group = min(stride, kernel)
    terms = tuple(
        (k % stride, k // stride, 0, kernel - 1 - k if reverse else k) for k in range(kernel)
    )
    step = dilation if stride == 1 else stride
    out_step = dilation if stride == 1 else 1
    return Stream(
        tuple(range(group)), terms, -(-kernel // stride), step, out_step, residues=out_step
    )


def gathered(axis: Axis) -> Stream:
    """All frames that a tile of outputs needs are read in one step."""
    frames = axis.positions
    terms = tuple(
        (frames.index(p), 0, i, k) for i, pairs in enumerate(axis.reads) for k, p in pairs
    )
    return Stream(frames, terms, 1, axis.in_step, axis.outs, axis.outs)


def forward_stream(kernel: int, stride: int, dilation: int) -> Stream:
    """The walk of a forward pass."""
    if stride == 1 or dilation == 1:
        return streamed(kernel, stride, dilation)
    return gathered(forward(1, kernel, stride, dilation))


def backward_stream(kernel: int, stride: int, dilation: int) -> Stream:
    """The walk of the gradient of the input."""
    if stride == 1:
        return streamed(kernel, 1, dilation, reverse=True)
    return gathered(backward(1, kernel, stride, dilation))
