"""The forward of an accelerated module: a program where that is right, else the modules one by one.

It takes the place of `forward` on one module; class, parameters, buffers, hooks and state dict stay
what they are.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastconv import torch_ops

from .conv import Conv1d, Conv2d, Conv3d
from .graph import UntraceableError, hooked, record
from .graph_program import Options, Program
from .graph_steps import DTYPES

MAX_PROGRAMS = 16  # input shapes with memory and packed weights of their own; others run modules
_TRAINING, _VERSION = attrgetter("training"), attrgetter("_version")
_BOTH = itemgetter(0, 1)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NaN equals NaN
Key = tuple[TreeSpec | None, tuple[tuple[torch.Size, torch.dtype, torch.device, str], ...]]


class Forward:
    """Calls a module: tensors of known shapes, without a gradient, through a program. They may lie
    in lists, tuples and dictionaries, which a program does not write.

    The modules run one by one, as PyTorch would run them, in training mode, where a gradient may be
    asked for, under autocast, compiling and tracing, for other arguments than tensors of one device
    in a precision that kernels there know, when hooks were added, and where the module cannot be
    recorded; then this is tried for its children. Programs are made again when a parameter or
    buffer was replaced or written.

    contiguous  modules that stay as they are get contiguous arguments
    """

    def __init__(self, module: nn.Module, options: Options, contiguous: bool = False) -> None:
        self.module, self.options, self.contiguous = module, options, contiguous
        self._own = module.__dict__.get("forward")  # somebody else's replacement
        self._reset()
        self.refused = ""  # why the module itself cannot be recorded

    def _reset(self) -> None:
        self._programs: dict[Key, Program] = {}
        self._lock = threading.RLock()
        self._watched: _Watched | None = None
        self._state: _State | None = None

    @property
    def modules(self) -> Callable[..., Any]:
        """The forward that runs the modules one by one."""
        if self._own is not None:
            return self._own
        return functools.partial(type(self.module).forward, self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward."""
        return inspect.signature(self.modules)

    @property
    def __code__(self) -> Any:
        """That of the class's forward: `torch.export` looks at it."""
        return type(self.module).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, form = tensors_of(args)
        program = self._program(tensors, form) if not kwargs and _can_run(tensors) else None
        if program is None:
            return self.modules(*args, **kwargs)
        return program(tensors)

    def _program(self, args: Sequence[Tensor], form: TreeSpec | None) -> Program | None:
        """The program for such arguments, or None where the modules have to run."""
        if self.refused:
            return None
        watched = self._watched or self._watch()
        if any(map(_TRAINING, watched.modules)) or any(watched.hooks):
            return None
        if torch.is_grad_enabled() and self._may_need_gradient(args):
            return None
        key = _key(args, form)
        program = self._programs.get(key)
        if program is None or self._state is None or not self._state.holds():
            return self._made(key, args, form)
        return program

    def _watch(self) -> _Watched:
        modules = list(self.module.modules())
        # Those of the module itself run around `forward`; who had some was recorded as a call.
        quiet = (m for m in modules if m is not self.module and not hooked(m))
        hooks = [table for m in quiet for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._watched = _Watched(modules, hooks)
        return self._watched

    def _may_need_gradient(self, args: Sequence[Tensor]) -> bool:
        return any(x.requires_grad for x in (*args, *self.module.parameters()))

    def _made(self, key: Key, args: Sequence[Tensor], form: TreeSpec | None) -> Program | None:
        with self._lock:
            if self._state is not None and not self._state.holds():
                self._programs.clear()
                self._watched = None
            program = self._programs.get(key)
            if program is not None or len(self._programs) >= MAX_PROGRAMS:
                return program
            try:
                recording = record(self.module, self._of_tensors(form), args)
            except UntraceableError as error:
                self.refused = str(error)
                self._programs.clear()
                self._delegate(list(self.module.children()))
                return None
            for module in recording.stays:
                self._delegate(list(module.children()))
            program = Program(recording, self.options, self.contiguous)
            earlier = [] if self._state is None else self._state.tensors
            state = _State(self.module, [*earlier, *program.sources])
            if not state.holds():  # tensors that nobody can tell a write of
                return None
            self._programs[key], self._state = program, state
            return program

    def _of_tensors(self, form: TreeSpec | None) -> Callable[..., Any]:
        """`modules` for the tensors of its arguments."""
        if form is None:
            return self.modules
        return lambda *tensors: self.modules(*tree_unflatten(tensors, form))

    def _delegate(self, modules: list[nn.Module]) -> None:
        for module in modules:
            install(module, self.options, self.contiguous)

    def program_of(self, args: Sequence[Tensor]) -> Program | None:
        """The program that a call ran, if one did."""
        tensors, form = tensors_of(args)
        return self._programs.get(_key(tensors, form)) if _can_run(tensors) else None

    @property
    def programs(self) -> list[Program]:
        """Those made so far."""
        return list(self._programs.values())

    def forget_plans(self) -> None:
        """Plan, and pack weights, anew in the next call, here and in the modules that stay."""
        for forward in forwards(self.module):
            with forward._lock:
                forward._programs.clear()
        for module in self.module.modules():
            if isinstance(module, (Conv1d, Conv2d, Conv3d)):
                module.forget_plans()

    def __getstate__(self) -> dict[str, Any]:
        skipped = ("_programs", "_lock", "_watched", "_state")
        return {name: value for name, value in self.__dict__.items() if name not in skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def install(module: nn.Module, options: Options, contiguous: bool = False) -> None:
    """Give a module a Forward, unless there is nothing in it that it could help."""
    if isinstance(module.__dict__.get("forward"), Forward):
        return
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        for child in module.children():
            install(child, options, contiguous)
    elif any(True for _ in module.children()):
        module.__dict__["forward"] = Forward(module, options, contiguous)


def forwards(model: nn.Module) -> list[Forward]:
    """Every Forward in a model, its own first."""
    found = (module.__dict__.get("forward") for module in model.modules())
    return [forward for forward in found if isinstance(forward, Forward)]


def tensors_of(args: Sequence[Any]) -> tuple[Sequence[Any], TreeSpec | None]:
    """Arguments, those within lists, tuples and dictionaries too, and how they lie there; None
    where nothing lies in anything."""
    if not any(isinstance(x, (list, tuple, dict)) for x in args):
        return args, None
    return tree_flatten(args)


def _key(args: Sequence[Tensor], form: TreeSpec | None) -> Key:
    tensors = ((x.shape, x.dtype, x.device, torch_ops.precision_of(x)) for x in args)
    return form, tuple(tensors)


def _can_run(args: Sequence[Any]) -> bool:
    """Plain tensors of one device that kernels may read, nobody tracing."""
    for x in args:
        if type(x) is not Tensor or x.dtype not in DTYPES.get(x.device.type, ()):
            return False
        if x.device != args[0].device:
            return False
        if not x.numel() or x.layout != torch.strided:
            return False
    return bool(args) and not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled(args[0].device.type)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@dataclass(frozen=True)
class _Watched:
    """Modules whose mode matters, and tables of hooks that were empty."""

    modules: list[nn.Module]
    hooks: list[Any]


class _State:
    """The modules of a module, and the tensors that its programs read: which, where, how often
    written, and two elements of each on a CPU, since writes through `.data` are not counted."""

    def __init__(self, module: nn.Module, sources: Sequence[Tensor]) -> None:
        used = set(map(id, sources))
        self._homes: list[tuple[dict[str, Any], str, Tensor]] = []
        for owner in module.modules():
            for table in (owner._parameters, owner._buffers):
                found = ((table, name, t) for name, t in table.items() if id(t) in used)
                self._homes += found  # type: ignore[arg-type]  # no None has such an id
        self.tensors = list({id(t): t for t in sources}.values())
        families = (m._modules for m in module.modules() if m._modules)
        self._children = [(children, list(children.values())) for children in families]
        # Inference tensors do not count their writes.
        self._countable = not any(t.is_inference() for t in self.tensors)
        seen = self.tensors if self._countable else []
        self._samples = [part for t in seen for part in _first_and_last(t)]
        self._marks = self._now() if self._countable else ([], [], [])

    def _now(self) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        pointers = list(map(Tensor.data_ptr, self.tensors))
        return list(map(_VERSION, self.tensors)), pointers, list(map(_BOTH, self._samples))

    def holds(self) -> bool:
        """Whether nothing was replaced or written since."""
        if not self._countable or self._now() != self._marks:
            return False
        for table, name, tensor in self._homes:
            if table.get(name) is not tensor:
                return False
        return all(list(children.values()) == kept for children, kept in self._children)


def _first_and_last(tensor: Tensor) -> Iterator[memoryview]:
    """A view of two elements in memory, as integers; none where the CPU sees none."""
    integers = _INTEGERS.get(tensor.element_size())
    dense = tensor.layout is torch.strided and not tensor.is_quantized
    if tensor.is_cpu and dense and tensor.numel() and integers is not None:
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        ends = tensor.detach().as_strided((2,), (reach,))
        yield ends.view(integers).numpy().data
