"""Many streams through one continual network: they join, leave and stall as they like.

Each stream has a slot of the network's batch and a queue; a tick takes one frame from every queue
that has one and runs them as one batch. What happens to a frame that finds its queue full, that is
missing or that comes out of order is the caller's choice, and there is no default for it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import GeometryError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from .nn.continual_network import Continual

FULL = ("refuse", "drop_oldest", "drop_newest")
LOST = ("refuse", "skip", "repeat", "reset")
LATE = ("refuse", "drop")


class StreamError(RuntimeError):
    """A frame or a stream that the pool was told to refuse."""


@dataclass(frozen=True)
class Policy:
    """What to do with frames that do not come as they should.

    full   the queue has no room: 'refuse' raises StreamError, 'drop_oldest' gives up the frame that
           waits longest, 'drop_newest' the one that comes
    lost   a number was left out: 'refuse' raises StreamError, 'skip' goes on as if nothing had been
           there, 'repeat' puts the last frame in its place, 'reset' begins the stream anew. Frames
           dropped from a queue are lost ones
    late   a number that was passed already: 'refuse' raises StreamError, 'drop' ignores it
    queue  frames that may wait in a stream's queue
    reorder  frames that may wait for one with a lower number before that one counts as lost
    """

    full: str
    lost: str
    late: str
    queue: int = 4
    reorder: int = 0

    def __post_init__(self) -> None:
        for name, known in (("full", FULL), ("lost", LOST), ("late", LATE)):
            if getattr(self, name) not in known:
                raise UnsupportedError(
                    f"Policy: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.full != "refuse" and self.lost == "refuse":
            raise UnsupportedError(
                f"Policy: full {self.full!r} loses frames, which lost 'refuse' forbids"
            )
        if self.queue < 1 or self.reorder < 0:
            raise UnsupportedError(
                "Policy: expected queue >= 1 and reorder >= 0, "
                f"got queue {self.queue} and reorder {self.reorder}"
            )


@dataclass(frozen=True)
class Result:
    """What a frame brought.

    number   of the frame, counted from 0 or as `push` was told
    output   (K, *frame), the stream's own row; None while the network warms up, or has no column
    latency_ms  from `push` to here
    """

    number: int
    output: Tensor | None
    latency_ms: float


@dataclass
class _Frame:
    """A frame in a queue; `missing` were lost right before it."""

    number: int
    data: Any
    came: float
    missing: int = 0


@dataclass
class _Stream:
    """Where a stream stands.

    expected  number of the next frame for the queue
    early     frames that wait for one before them
    last      the frame that the network had last
    dropped   frames given up since the last one in the queue
    """

    slot: int
    expected: int = 0
    waiting: deque[_Frame] = field(default_factory=deque)
    early: dict[int, _Frame] = field(default_factory=dict)
    last: Any = None
    dropped: int = 0
    lost: int = 0


class StreamPool:
    """Slots of a continual network, handed out to streams.

    model   any module of `fastconv.nn` with `forward_step`, as `to_continual` returns it; the pool
            starts it and is the only one to step it
    slots   streams at the same time
    frame   (C, *size), an example: its shape, precision and device are those of all frames
    policy  see Policy
    """

    def __init__(self, model: Continual, slots: int, frame: Tensor, *, policy: Policy) -> None:
        if slots < 1:
            raise UnsupportedError(f"StreamPool: slots must be at least 1, got {slots}")
        self.model, self.policy = model, policy
        batch = frame.new_zeros(slots, *frame.shape)
        if batch.dim() == 4:
            import torch

            batch = batch.contiguous(memory_format=torch.channels_last)
        self._batch = batch
        model.start(batch)
        self._free = list(range(slots - 1, -1, -1))
        self._streams: dict[int, _Stream] = {}
        self._next = 0

    @property
    def streams(self) -> tuple[int, ...]:
        """The streams that are in the pool, by the names that `join` gave."""
        return tuple(self._streams)

    @property
    def free(self) -> int:
        """Slots without a stream."""
        return len(self._free)

    @property
    def state_bytes(self) -> int:
        """Bytes of state of all slots, taken or free."""
        return self.model.state_bytes

    def join(self, saved: dict[str, Any] | None = None) -> int:
        """A new stream, or one that goes on from what `leave` returned; the stream's name.

        Raises StreamError if no slot is free.
        """
        if not self._free:
            raise StreamError(f"join: all {len(self._streams)} slots are taken")
        slot = self._free[-1]
        if saved is None:
            self.model.reset(slot)
        else:
            self.model.restore(slot, saved["model"])
        self._free.pop()
        name, self._next = self._next, self._next + 1
        expected = 0 if saved is None else int(saved["expected"])
        self._streams[name] = _Stream(slot, expected)
        return name

    def leave(self, stream: int, *, save: bool = False) -> dict[str, Any] | None:
        """Give a stream's slot back; frames that wait are dropped.

        save  return what `join` needs to go on, here or in another pool of the same network
        """
        found = self._stream(stream)
        first = found.waiting[0].number if found.waiting else found.expected
        kept = {"model": self.model.save(found.slot), "expected": first} if save else None
        del self._streams[stream]
        self._free.append(found.slot)
        return kept

    def waiting(self, stream: int) -> int:
        """Frames in a stream's queue."""
        return len(self._stream(stream).waiting)

    def lost(self, stream: int) -> int:
        """Frames of a stream that never got to the network."""
        return self._stream(stream).lost

    def push(self, stream: int, frame: Tensor, number: int | None = None) -> bool:
        """Put a frame (C, *size) into a stream's queue; whether it got in, or may still.

        number  of the frame in its stream; the next one if None. The frame is not copied until its
                tick

        Raises StreamError where the policy says 'refuse', GeometryError for a frame of another
        shape or precision; the queue is then as before.
        """
        found, like, policy = self._stream(stream), self._batch, self.policy
        if frame.shape != like.shape[1:] or frame.dtype != like.dtype:
            raise GeometryError(
                f"push: the pool takes frames {tuple(like.shape[1:])} {like.dtype}, "
                f"got {tuple(frame.shape)} {frame.dtype}"
            )
        expected = found.expected
        number = max(found.early, default=expected - 1) + 1 if number is None else number
        if number < expected or number in found.early:
            if policy.late == "refuse":
                raise StreamError(f"push: stream {stream} had frame {number} or a later one")
            return False
        held = {**found.early, number: _Frame(number, frame, time.perf_counter())}
        at = expected if len(held) <= policy.reorder else min(held)
        chain = []
        while at in held:
            chain.append(held.pop(at))
            at += 1
        if chain and chain[0].number > expected and policy.lost == "refuse":
            raise StreamError(
                f"push: stream {stream} lost frames {expected} to {chain[0].number - 1}"
            )
        room = policy.queue - len(found.waiting)
        if len(chain) > room and policy.full == "refuse":
            raise StreamError(f"push: stream {stream} has {policy.queue} frames in its queue")
        found.early = held
        taken = {one.number for one in chain if self._enqueue(found, one)}
        return number in held or number in taken

    def _enqueue(self, found: _Stream, one: _Frame) -> bool:
        """Whether the frame got in."""
        missing = one.number - found.expected
        found.lost += missing
        found.expected = one.number + 1
        if len(found.waiting) >= self.policy.queue:
            found.lost += 1
            if self.policy.full == "drop_newest":
                found.dropped += missing + 1
                return False
            oldest = found.waiting.popleft()
            heir = found.waiting[0] if found.waiting else one
            heir.missing += oldest.missing + 1
        one.missing += missing + found.dropped
        found.dropped = 0
        found.waiting.append(one)
        return True

    def tick(self) -> dict[int, Result]:
        """Run one frame of every stream that has one; what each brought, by stream."""
        import torch

        taken: dict[int, _Frame] = {}
        active = np.zeros(len(self._batch), bool)
        for name, found in self._streams.items():
            if not found.waiting:
                continue
            taken[name] = frame = self._next_frame(found)
            self._batch[found.slot].copy_(frame.data)
            active[found.slot] = True
        if not taken:
            return {}
        output, ready = self.model.forward_step(self._batch, torch.from_numpy(active))
        now, there = time.perf_counter(), ready.tolist()
        return {
            name: Result(
                frame.number,
                output[slot].clone() if there[slot := self._streams[name].slot] else None,
                1e3 * (now - frame.came),
            )
            for name, frame in taken.items()
        }

    def _next_frame(self, found: _Stream) -> _Frame:
        """From the queue, or what stands for a lost one."""
        frame = found.waiting[0]
        if frame.missing and self.policy.lost == "repeat" and found.last is not None:
            number = frame.number - frame.missing
            frame.missing -= 1
            return _Frame(number, found.last, frame.came)
        if frame.missing and self.policy.lost == "reset":
            self.model.reset(found.slot)
        found.last = frame.data
        return found.waiting.popleft()

    def _stream(self, name: int) -> _Stream:
        if name not in self._streams:
            raise StreamError(f"there is no stream {name}; `join` makes one")
        return self._streams[name]
