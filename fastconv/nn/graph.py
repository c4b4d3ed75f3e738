"""What a model computes from its inputs: a flat list of operations, recorded while it runs.

The model runs once on real tensors, and every operation that PyTorch dispatches is written down
with the values that it reads: modules, functions, methods and operators all look alike there.
Python's control flow has been followed, so a recording holds for inputs of the same shapes;
whatever looks at the numbers in a tensor is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from .conv import Conv1d, Conv2d, Conv3d

OURS: dict[type[nn.Module], Any] = {
    Conv1d: nn.Conv1d,
    Conv2d: nn.Conv2d,
    Conv3d: nn.Conv3d,
}
# Composite operations that stay whole; others are recorded as the operations that they consist of.
WHOLE = frozenset(
    (
        *(f"{kind}{n}d" for kind in ("conv", "max_pool", "avg_pool") for n in (1, 2, 3)),
        *(f"adaptive_avg_pool{n}d" for n in (1, 2, 3)),
        *("batch_norm", "group_norm", "instance_norm", "layer_norm"),
        *("dropout", "feature_dropout", "alpha_dropout"),
        *("linear", "matmul", "softmax", "log_softmax", "silu", "hardswish", "relu6"),
        *("chunk", "contiguous", "flatten", "pad", "reshape", "to"),
    )
)
# One at a time: a recording changes methods of modules that others may share.
_recording = threading.RLock()
_ESCAPES = frozenset({"numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "storage"})


class UntraceableError(RuntimeError):
    """A model, or the module in it, cannot be recorded; the message says why."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that a run computes, or an input of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str


@dataclass(frozen=True, eq=False)
class Ref:
    """A tensor that is there before a run: a parameter, a buffer, or a constant without a name."""

    tensor: Tensor
    name: str = ""


@dataclass(eq=False)
class Operation:
    """A call of an operator, or of a module that stays as it is.

    args, kwargs  as they were, with a Value or a Ref for every tensor
    result        the same of what was returned
    written       positions of the arguments that the operator writes: it gets copies of them
    aliases       the result may share memory with an argument
    """

    target: Any  # an OpOverload or a Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    module: str
    written: tuple[int, ...] = ()
    aliases: bool = False

    @property
    def opaque(self) -> bool:
        """A module, not an operator."""
        return isinstance(self.target, nn.Module)

    @property
    def name(self) -> str:
        """Of an operator, without its namespace, its overload and the mark of writing in place."""
        if self.opaque:
            return ""
        return str(self.target._schema.name).removeprefix("aten::").rstrip("_")

    @property
    def inputs(self) -> list[Value]:
        """Values that it reads."""
        return _values((self.args, self.kwargs))

    @property
    def outputs(self) -> list[Value]:
        """Values that it makes."""
        return _values(self.result)


@dataclass
class Recording:
    """One run: what came in, what was done, what went out.

    result   what the model returned, with a Value or a Ref for every tensor
    stays    modules that were called as they are, with the reason
    """

    inputs: list[Value]
    operations: list[Operation]
    result: Any
    stays: dict[nn.Module, str] = field(default_factory=dict)

    @property
    def sources(self) -> list[Tensor]:
        """Parameters, buffers and constants that operators read; modules see to their own."""
        operators = [(o.args, o.kwargs) for o in self.operations if not o.opaque]
        leaves = tree_leaves((operators, self.result))
        return list({leaf.tensor: None for leaf in leaves if isinstance(leaf, Ref)})


def _values(tree: Any) -> list[Value]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Value)]


def hooked(module: nn.Module) -> bool:
    """Somebody wants to see, or change, what goes into or comes out of this very module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def record(model: nn.Module, forward: Callable[..., Any], args: Sequence[Tensor]) -> Recording:
    """Record a run of the model on tensors; modules that cannot be looked into stay as they are.

    Raises UntraceableError where that is the model itself.
    """
    names = {module: name for name, module in model.named_modules()}
    stays = {m: "has hooks" for m in names if m is not model and hooked(m)}
    stays |= {m: "a script" for m in names if isinstance(m, torch.jit.ScriptModule)}
    while True:
        recorder = _Recorder(model, names, stays)
        try:
            with _recording, torch.inference_mode():
                return recorder.run(forward, args)
        except Exception as error:
            culprit = _innermost(error.__traceback__, names)
            if culprit is None or culprit is model or culprit in stays:
                raise UntraceableError(_reason(error)) from error
            stays[culprit] = _reason(error)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return first if isinstance(error, UntraceableError) else f"{type(error).__name__}: {first}"


def _innermost(traceback: TracebackType | None, names: dict[nn.Module, str]) -> nn.Module | None:
    """The module of the model whose method ran last in a traceback."""
    found = None
    while traceback is not None:
        own = traceback.tb_frame.f_locals.get("self")
        if isinstance(own, nn.Module) and own in names:
            found = own
        traceback = traceback.tb_next
    return found


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to say so costs seconds of imports, and `record` runs outside of compiling

    def __init__(
        self, model: nn.Module, names: dict[nn.Module, str], stays: dict[nn.Module, str]
    ) -> None:
        super().__init__()
        self.names, self.stays = names, stays
        self.operations: list[Operation] = []
        self.paused = False
        self._touched: set[int] = set()  # memory that a module that stays wrote
        self._thread = threading.get_ident()
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._refs: dict[int, Ref] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self._refs.setdefault(id(tensor), Ref(tensor, name))

    def run(self, forward: Callable[..., Any], args: Sequence[Tensor]) -> Recording:
        # Views: the caller's own tensors may be inference tensors or require gradients.
        inputs = [self._new(x) for x in args]
        self._inputs = {x.untyped_storage().data_ptr() for x in args}
        with self._replaced(), _Escapes(self), self:
            result = forward(*args)
        return Recording(inputs, self.operations, tree_map(self._source, result), dict(self.stays))

    def _new(self, tensor: Tensor) -> Value:
        value = Value(tuple(tensor.shape), tensor.dtype, tensor.device.type)
        self._values[tensor] = value
        return value

    def _source(self, leaf: Any) -> Any:
        """What stands for a tensor; anything else as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        value = self._values.get(leaf)
        if value is not None:
            return value
        return self._refs.setdefault(id(leaf), Ref(leaf))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            self._watch(func, args, kwargs)
            return func(*args, **kwargs)
        self._check(func, args)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name not in WHOLE and func._can_decompose() and not func._schema.is_mutable:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        written = self._written(func, args, kwargs)
        sources = tree_map(self._source, (args, kwargs))
        result = func(*args, **kwargs)
        self._note(func, sources, result, written)
        return result

    @staticmethod
    def _check(func: Any, args: Any) -> None:
        unknown = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        # Indices that are numbers make a result of a known shape; masks do not.
        numbered = func._schema.name == "aten::index" and not any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if unknown & set(func.tags) and not numbered:
            raise UntraceableError(f"{func} depends on the numbers in a tensor")
        if "as_strided" in func._schema.name:
            raise UntraceableError(f"{func} depends on the memory layout of a tensor")

    def _written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Positions of the arguments that are written: nothing else may see the same memory."""
        if not func._schema.is_mutable:
            return ()
        positions = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            tensor = args[i] if i < len(args) else kwargs.get(argument.name)
            if tensor is None:
                continue
            if i >= len(args) or not isinstance(tensor, Tensor) or tensor not in self._values:
                raise UntraceableError(f"{func} writes a tensor that is there before the call")
            self._check_alone(func, tensor)
            positions.append(i)
        return tuple(positions)

    def _watch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notice whether a module that stays writes what it was given."""
        if not func._schema.is_mutable:
            return
        for i, argument in enumerate(func._schema.arguments):
            tensor = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if isinstance(tensor, Tensor):
                self._touched.add(tensor.untyped_storage().data_ptr())

    def _check_alone(self, func: Any, tensor: Tensor) -> None:
        memory = tensor.untyped_storage().data_ptr()
        if memory in self._inputs and memory:
            raise UntraceableError(f"{func} writes an input in place")
        for other in list(self._values):
            if other is not tensor and memory and other.untyped_storage().data_ptr() == memory:
                raise UntraceableError(f"{func} writes memory that another tensor sees")

    def _note(self, func: Any, sources: Any, result: Any, written: tuple[int, ...]) -> None:
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        reads = [s for s in tree_leaves(sources) if isinstance(s, (Value, Ref))]
        if not tensors:
            if result is None and not written:
                return
            if reads:
                raise UntraceableError(f"{func} depends on the numbers in a tensor")
            return
        if not written and all(self._values.get(t) is not None for t in tensors):
            return  # an argument itself came back
        for tensor in tensors:
            self._new(tensor)
        schema = func._schema
        aliases = any(r.alias_info is not None for r in schema.returns) and not written
        memory = {t.untyped_storage().data_ptr() for t in tensors}
        self.operations.append(
            Operation(
                func,
                sources[0],
                sources[1],
                tree_map(self._source, result),
                self._home(reads),
                written,
                aliases or func._can_decompose() or bool(memory & self._inputs),
            )
        )

    @staticmethod
    def _home(reads: list[Any]) -> str:
        """The module whose parameters are read."""
        names = [s.name for s in reads if isinstance(s, Ref) and s.name]
        return names[0].rpartition(".")[0] if names else ""

    def call_whole(
        self, module: nn.Module, normal: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call a module that stays as it is, and note it."""
        sources: tuple[Any, Any] = tree_map(self._source, (args, kwargs))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.paused, self._touched = True, set()
        try:
            result = normal(*args, **kwargs)
        finally:
            self.paused = False
        if self._touched & {t.untyped_storage().data_ptr() for t in given}:
            raise UntraceableError(f"{self.names[module]} writes its input in place")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._new(leaf)  # also where an argument itself came back
        noted = tree_map(self._source, result)
        name = self.names[module]
        self.operations.append(Operation(module, *sources, noted, name, aliases=True))
        return result

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """In this thread modules that stay are noted as calls, our convolutions are PyTorch's."""
        changed: list[tuple[nn.Module, str]] = []

        def replace(module: nn.Module, method: str, recorded: Callable[..., Any]) -> None:
            normal = getattr(module, method)

            def call(*args: Any, **kwargs: Any) -> Any:
                mine = threading.get_ident() == self._thread and not self.paused
                return (recorded if mine else normal)(*args, **kwargs)

            module.__dict__[method] = call
            changed.append((module, method))

        try:
            for module in self.names:
                if module in self.stays:
                    normal = module._call_impl

                    def whole(*a: Any, m: Any = module, n: Any = normal, **k: Any) -> Any:
                        return self.call_whole(m, n, *a, **k)

                    replace(module, "_call_impl", whole)
                elif type(module) in OURS:
                    theirs = OURS[type(module)]._conv_forward
                    replace(module, "_conv_forward", theirs.__get__(module))
            yield
        finally:
            for module, method in changed:
                module.__dict__.pop(method, None)


class _Escapes(TorchFunctionMode):
    """Refuses what takes the numbers of a tensor out of PyTorch."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ESCAPES and not self._recorder.paused:
            raise UntraceableError(f"{name} takes numbers out of PyTorch")
        return func(*args, **(kwargs or {}))
