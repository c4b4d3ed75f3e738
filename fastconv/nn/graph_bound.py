"""The calls of a program's kernels with their addresses, and the memory between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastconv import backends, torch_ops
from fastconv.plan import CHANNELS_LAST, Plan, Request

from .graph import Operation, Ref, Value
from .graph_memory import Life, block, offsets
from .graph_steps import Blend, Block, Conv, Join, Means, Other, Pool, Step

if TYPE_CHECKING:
    from .graph_program import Program

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "hardswish": nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
}


@dataclass
class Work:
    """A step and what it needs at run time.

    request, plan  of a convolution or block
    packed         weights in the plan's form; of a Blend scale and shift, or None
    bias           (K,) in the order of the plan: an array, a tensor, or three of them
    in_c           whether it runs on addresses
    """

    step: Step
    request: Request | None = None
    plan: Plan | None = None
    packed: Any = None
    bias: Any = None
    in_c: bool = False


Place = int  # index into the environment of a run


class Bound:
    """A program with memory: every call of a kernel with its addresses, in order.

    Values of C kernels lie in one block, channels last. Others are tensors of a run, which the
    environment holds by index.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._env: list[Any] = list(program.inputs)
        self._tensors: dict[Value, Tensor] = {}  # in the block, or views of it
        self._places: dict[Value, Place] = {v: i for i, v in enumerate(program.inputs)}
        self._dense: dict[Value, Place] = {}
        self._made: set[Value] = set()  # by kernels, in memory of their own
        self._calls: list[Callable[[], Any]] = []
        self._ends: list[int] = []  # calls up to the end of every step
        self._leaves, self._form = tree_flatten(program.result)
        self._lay_out()
        for work in program.works:
            self._add(work)
            self._ends.append(len(self._calls))
        for i in range(len(self._env)):
            self._env[i] = None

    def __call__(self, args: Sequence[Tensor]) -> Any:
        env = self._env
        env[: len(args)] = args
        try:
            for call in self._calls:
                call()
            return self._leave(args)
        finally:
            env[:] = [None] * len(env)

    def timed(self, args: Sequence[Tensor]) -> list[float]:
        """Run, and return the milliseconds of every step."""
        env, start, found = self._env, 0, []
        wait = torch.cuda.synchronize if self._program.device == "cuda" else None
        env[: len(args)] = args
        for end in self._ends:
            began = perf_counter()
            for call in self._calls[start:end]:
                call()
            if wait is not None:
                wait()
            found.append(1e3 * (perf_counter() - began))
            start = end
        env[:] = [None] * len(env)
        return found

    # Memory.

    def _lay_out(self) -> None:
        works = self._program.works
        self._fresh = self._leaving()
        parents: dict[Value, list[Value]] = {}
        lives: dict[Value, Life] = {}
        scratch = 0
        # A contiguous input is transposed into the block.
        for v in self._program.inputs:
            if v.dtype == torch.float32 and len(v.shape) > 3 and self._program.uses_c:
                lives[v] = Life(prod(v.shape), -1, -1)
        for i, work in enumerate(works):
            step = work.step
            if work.in_c:
                scratch = max(scratch, self._scratch_of(work))
                for v in step.outputs:
                    if v not in self._fresh:
                        lives[v] = Life(prod(v.shape), i, i)
            elif isinstance(step, Other) and step.operation.aliases:
                for v in step.outputs:
                    parents[v] = step.inputs
            for v in step.inputs:
                self._extend(v, i, lives, parents)
        for leaf in self._leaves:
            if isinstance(leaf, Value):
                self._extend(leaf, len(works), lives, parents)
        starts, total = offsets(lives)
        self._memory = block(total + scratch)
        self._scratch = self._memory[total:].numpy()
        self._scratch_at = self._memory.data_ptr() + 4 * total
        self._turned: dict[Value, Tensor] = {}
        for v, at in starts.items():
            memory = (v.shape[0], *v.shape[2:], v.shape[1])
            tensor = self._memory[at : at + prod(memory)].view(memory).movedim(-1, 1)
            (self._turned if v in self._places else self._tensors)[v] = tensor

    def _leaving(self) -> set[Value]:
        """Values that users get to see: they never lie in memory that is used again."""
        kept = {leaf for leaf in self._leaves if isinstance(leaf, Value)}
        for work in self._program.works:
            if isinstance(work.step, Other) and work.step.operation.opaque:
                kept.update(work.step.inputs)
        return kept

    @staticmethod
    def _extend(
        value: Value, until: int, lives: dict[Value, Life], parents: dict[Value, list[Value]]
    ) -> None:
        if value in lives:
            lives[value] = replace(lives[value], last=max(lives[value].last, until))
        for parent in parents.get(value, ()):
            Bound._extend(parent, until, lives, parents)

    def _scratch_of(self, work: Work) -> int:
        if isinstance(work.step, (Conv, Block)):
            return int(work.packed.workspace_size())
        if isinstance(work.step, Means):
            small = _small()
            return int(small.means_size(small.means(work.step.x.shape)))
        return 0

    # Values.

    def _new_place(self) -> Place:
        self._env.append(None)
        return len(self._env) - 1

    def _place(self, value: Value) -> Place:
        """Where a run keeps the tensor of a value that is not in the block."""
        if value not in self._places:
            self._places[value] = self._new_place()
        return self._places[value]

    def _read(self, value: Value) -> int | Place:
        """The address of a value for a kernel, negative - 1 for a place: dense, channels last."""
        tensor = self._tensors.get(value)
        if tensor is not None:
            address = tensor.data_ptr()
            if torch_ops.dense(tensor, CHANNELS_LAST).data_ptr() == address:
                return address
        if value not in self._dense:
            self._dense[value] = self._make_dense(value, tensor)
        return -1 - self._dense[value]

    def _make_dense(self, value: Value, tensor: Tensor | None) -> Place:
        if value in self._made:
            return self._place(value)
        env, to = self._env, self._new_place()
        if tensor is not None:  # a view of the block with gaps

            def copy() -> None:
                env[to] = torch_ops.dense(tensor, CHANNELS_LAST)

            self._calls.append(copy)
            return to
        place, turned = self._place(value), self._turned.get(value)
        turn = None if turned is None else _turn(value, turned)

        def enter() -> None:
            x = env[place]
            if turn is not None and x.is_contiguous() and x.stride(1) != 1:
                env[to] = turn(x)
            else:
                env[to] = torch_ops.dense(x, CHANNELS_LAST)

        self._calls.append(enter)
        return to

    def _write(self, value: Value) -> int | Place:
        """The address that a kernel writes, or - 1 - the place of a new tensor."""
        tensor = self._tensors.get(value)
        if tensor is not None:
            return tensor.data_ptr()
        env, to, shape, like = self._env, self._place(value), value.shape, self._memory

        def make() -> None:
            env[to] = torch_ops.new_dense(shape, like, CHANNELS_LAST)

        self._calls.append(make)
        self._made.add(value)
        return -1 - to

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        """Add a call; negative integers among the arguments are places of tensors."""
        holes = [(i, -1 - a) for i, a in enumerate(args) if isinstance(a, int) and a < 0]
        if not holes:
            self._calls.append(partial(function, *args))
            return
        env, given = self._env, list(args)

        def call() -> None:
            for i, place in holes:
                given[i] = env[place].data_ptr()
            function(*given)

        self._calls.append(call)

    # Steps.

    def _add(self, work: Work) -> None:
        step = work.step
        if isinstance(step, Other):
            self._add_other(step.operation)
        elif isinstance(step, (Conv, Block)):
            self._add_conv(work)
        elif work.in_c:
            self._add_small(work)
        else:
            self._add_torch(work)

    def _add_conv(self, work: Work) -> None:
        step, plan = work.step, work.plan
        assert plan is not None
        assert isinstance(step, (Conv, Block))
        last = step if isinstance(step, Conv) else step.stages[2]
        x, residual = step.inputs[0], last.residual
        if work.in_c:
            biases = work.bias if isinstance(step, Block) else (work.bias, None, None)
            addresses = [0 if b is None else b.data_ptr() for b in biases]
            given = self._read(x)
            if isinstance(step, Conv) and step.scale is not None:
                addresses[1] = self._read(step.scale)
            added = 0 if residual is None else self._read(residual)
            c_plan, weights, threads = work.packed.constants(self._scratch)
            tail = (added, self._write(last.y), self._scratch_at, threads)
            self._call(_fc_run(), c_plan, given, weights, *addresses, *tail)
            return
        runner, env = torch_ops.runner(plan), self._env
        source = self._tensor_of(x)
        other = None if residual is None else self._tensor_of(residual)
        to, shape = self._place(last.y), last.y.shape
        packed, bias, x_shape = work.packed, work.bias, plan.geometry.x_shape

        def run() -> None:
            added = None if other is None else other()
            env[to] = runner(source().reshape(x_shape), packed, bias, added).reshape(shape)

        self._calls.append(run)

    def _tensor_of(self, value: Value) -> Callable[[], Tensor]:
        """What gives the tensor of a value at run time."""
        tensor, env = self._tensors.get(value), self._env
        if tensor is not None:
            return lambda: tensor
        place = self._place(value)
        return lambda: env[place]

    def _add_small(self, work: Work) -> None:
        small, step = _small(), work.step
        threads = torch.get_num_threads()
        lib = small.lib
        if isinstance(step, Join):
            at = 0
            y, channels = self._write(step.y), step.y.shape[1]
            for part in step.parts:
                params = small.blend(part.shape, y_step=channels)
                x = self._read(part)
                if y < 0:
                    self._call(_shifted, lib, params, x, y, 4 * at, threads)
                else:
                    self._call(lib.fc_run_blend, params, x, 0, 0, 0, y + 4 * at, threads)
                at += part.shape[1]
            return
        x = self._read(step.inputs[0])
        if isinstance(step, Means):
            params = small.means(step.x.shape)
            self._call(lib.fc_run_means, params, x, self._write(step.y), self._scratch_at, threads)
        elif isinstance(step, Pool):
            params = small.pool(step.geometry, mean=step.mean, counted=step.counted)
            self._call(lib.fc_run_pool, params, x, self._write(step.y), threads)
        elif isinstance(step, Blend):
            params = small.blend(step.x.shape, step.activation, per_image=step.scale is not None)
            scale = shift = residual = 0
            if work.packed is not None:
                scale, shift = (t.data_ptr() for t in work.packed)
            elif step.scale is not None:
                scale = self._read(step.scale)
            if step.residual is not None:
                residual = self._read(step.residual)
            y = self._write(step.y)
            self._call(lib.fc_run_blend, params, x, scale, shift, residual, y, threads)

    def _add_torch(self, work: Work) -> None:
        step, env = work.step, self._env
        function = _torch_function(work)
        sources = [self._tensor_of(v) for v in step.inputs]
        to = self._place(step.outputs[0])

        def run() -> None:
            env[to] = function(*(source() for source in sources))

        self._calls.append(run)

    def _add_other(self, operation: Operation) -> None:
        target = _layout_free(operation)
        inputs = operation.inputs
        held = all(v in self._tensors for v in inputs) and inputs
        if held and operation.aliases and not operation.opaque and not operation.written:
            args, kwargs = self._filled(operation, lambda v: self._tensors[v])
            result = tree_flatten(target(*args, **kwargs))[0]
            values = tree_flatten(operation.result)[0]
            memory = self._memory.untyped_storage().data_ptr()
            if all(t.untyped_storage().data_ptr() == memory for t in result):
                self._tensors.update(zip(values, result, strict=True))
                return
        env = self._env
        sources = {v: self._tensor_of(v) for v in inputs}
        opaque, contiguous = operation.opaque, self._program.contiguous
        memory = self._memory.untyped_storage().data_ptr()

        def tensor(v: Value) -> Tensor:
            t = sources[v]()
            if opaque and t.untyped_storage().data_ptr() == memory:
                t = t.clone()
            return t.contiguous() if opaque and contiguous else t

        places = [
            self._place(v) if isinstance(v, Value) else None
            for v in tree_flatten(operation.result)[0]
        ]

        def run() -> None:
            args, kwargs = self._filled(operation, tensor)
            for i in operation.written:
                args[i] = args[i].clone()
            result = tree_flatten(target(*args, **kwargs))[0]
            for place, leaf in zip(places, result, strict=True):
                if place is not None:
                    env[place] = leaf

        self._calls.append(run)

    @staticmethod
    def _filled(operation: Operation, tensor: Callable[[Value], Tensor]) -> tuple[list[Any], Any]:
        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return tensor(leaf)
            return leaf.tensor if isinstance(leaf, Ref) else leaf

        return list(tree_map(fill, operation.args)), tree_map(fill, operation.kwargs)

    # The way out.

    def _leave(self, args: Sequence[Tensor]) -> Any:
        layout = any(a.dim() > 3 and not a.is_contiguous() for a in args)
        leaves = [self._left(leaf, layout) for leaf in self._leaves]
        return tree_unflatten(leaves, self._form)

    def _left(self, leaf: Any, channels_last: bool) -> Any:
        if isinstance(leaf, Ref):
            return leaf.tensor
        if not isinstance(leaf, Value):
            return leaf
        tensor = self._tensors.get(leaf)
        if tensor is None:
            tensor = self._env[self._places[leaf]]
            if tensor.untyped_storage().data_ptr() != self._memory.untyped_storage().data_ptr():
                return tensor if channels_last or tensor.dim() < 3 else tensor.contiguous()
        kept = torch.preserve_format if channels_last else torch.contiguous_format
        return tensor.clone(memory_format=kept)


def _fc_run() -> Any:
    from fastconv.c_kernels import launch

    return launch.lib.fc_run


def _small() -> Any:
    from fastconv.c_kernels import elementwise

    return elementwise


def _shifted(lib: Any, params: Any, x: int, y: int, by: int, threads: int) -> None:
    lib.fc_run_blend(params, x, 0, 0, 0, y + by, threads)


def _turn(value: Value, to: Tensor) -> Callable[[Tensor], Tensor]:
    """Transposes a contiguous tensor into a channels-last one."""
    small = _small()
    params = small.turn(value.shape[0], value.shape[1], prod(value.shape[2:]))
    address, threads = to.data_ptr(), torch.get_num_threads()

    def turn(x: Tensor) -> Tensor:
        small.lib.fc_run_turn(params, x.data_ptr(), address, threads)
        return to

    return turn


def _layout_free(operation: Operation) -> Callable[..., Any]:
    """The operation for tensors in another memory layout than it was recorded with."""
    if operation.name in ("view", "_unsafe_view", "_reshape_alias") and not operation.opaque:
        if operation.target._overloadname == "dtype":
            return lambda x, *rest: operation.target(x.contiguous(), *rest)
        return lambda x, shape, *_: x.reshape(shape)
    return operation.target


def _torch_function(work: Work) -> Callable[..., Tensor]:
    """A small step by PyTorch, on the tensors of its inputs."""
    step = work.step
    if isinstance(step, Means):
        shape = step.y.shape
        return lambda x: x.mean(tuple(range(2, x.dim()))).reshape(shape)
    if isinstance(step, Join):
        return lambda *parts: torch.cat(parts, 1)
    if isinstance(step, Pool):
        g = step.geometry
        kind = "avg" if step.mean else "max"
        function = getattr(nn.functional, f"{kind}_pool{g.n}d")
        more = {"count_include_pad": step.counted} if step.mean else {}
        return partial(
            function, kernel_size=g.kernel, stride=g.stride,
            padding=tuple(before for before, _ in g.padding), **more,
        )  # fmt: skip
    assert isinstance(step, Blend)
    if step.x.device == "cuda" and backends.why_not("triton") is None:
        return _on_gpu(work)
    ones = (1,) * (len(step.x.shape) - 2)
    packed = None if work.packed is None else [t.reshape(-1, *ones) for t in work.packed]
    scaled, added, act = step.scale is not None, step.residual is not None, step.activation

    def blend(x: Tensor, *rest: Tensor) -> Tensor:
        more = list(rest)
        if packed is not None:
            x = x * packed[0] + packed[1]
        if scaled:
            x = x * more.pop(0)
        if added:
            x = x + more.pop(0)
        return ACTIVATIONS[act](x)

    return blend


def _on_gpu(work: Work) -> Callable[..., Tensor]:
    """A Blend in one pass of our own kernel."""
    from fastconv.triton_kernels import elementwise

    step = work.step
    assert isinstance(step, Blend)
    factor, shift = (None, None) if work.packed is None else work.packed
    scaled, added, act = step.scale is not None, step.residual is not None, step.activation

    def blend(x: Tensor, *rest: Tensor) -> Tensor:
        more = list(rest)
        x = torch_ops.dense(x, CHANNELS_LAST)
        scale = more.pop(0).reshape(x.shape[:2]) if scaled else factor
        residual = torch_ops.dense(more.pop(0), CHANNELS_LAST) if added else None
        y = torch.empty_like(x)
        elementwise.blend(x, y, scale, shift, residual, act)
        return y

    return blend
