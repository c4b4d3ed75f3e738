"""What a model does with a clip, as a `torch.fx` graph of PyTorch's modules and functions.

The model runs once on tensors without memory: sizes are numbers, and what its code decides by them
is decided. So code that symbolic tracing cannot follow, such as loops over sizes, is followed.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastconv.errors import UnsupportedError

from . import conv

# Of layers over images and lines, which PyTorch refuses clips for without a word of where.
AXES: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2}


def trace_clip(model: nn.Module, clip: Tensor) -> fx.Graph:
    """The operations of `model(clip)` in eval mode; the model is not changed.

    Leaves are PyTorch's own modules, except containers, ours and continual ones. meta: `shape`,
    and `where`, the qualified name of the module whose code it is in.

    Raises what the model raises for this clip.
    """
    modes = {module: module.training for module in model.modules()}
    recorder = _Recorder(model)
    try:
        model.eval()
        with torch.no_grad(), torch.device("meta"):
            x = recorder.input(torch.empty_like(clip, device="meta"))
            with recorder:
                y = functional_call(model, recorder.places, (x,), tie_weights=False)
        return recorder.finish(y)
    finally:
        for handle in recorder.handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: one whose `forward` is PyTorch's, unless a container's, or
    a convolution of ours.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    where = type(module).forward.__module__
    own = where.startswith(("torch.nn.", conv.__name__)) and not isinstance(module, containers)
    return own or hasattr(module, "record")


class _Recorder(TorchFunctionMode):
    """Makes a node of every call that returns tensors, outside of leaves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.places: dict[str, Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []  # an id means its tensor as long as that lives
        self._stack = [""]
        self._inside = 0
        for name, tensor in (*model.named_parameters(remove_duplicate=False),
                             *model.named_buffers(remove_duplicate=False)):  # fmt: skip
            self.places[name] = torch.empty_like(tensor, device="meta")
        self._names = {id(tensor): name for name, tensor in self.places.items()}
        self.handles = []
        for name, module in model.named_modules(remove_duplicate=True):
            before, after = partial(self._enter, name), partial(self._leave, name)
            self.handles.append(module.register_forward_pre_hook(before))
            self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def input(self, x: Tensor) -> Tensor:
        self._made(self.graph.placeholder("clip"), x)
        return x

    def finish(self, y: Any) -> fx.Graph:
        self.graph.output(self._arguments(y))
        return self.graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        if not self._inside and _tensors(y):
            node = self.graph.call_function(func, self._arguments(args), self._arguments(kwargs))
            self._made(node, y)
        return y

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._stack.append(name)
        if is_leaf(module):
            self._inside += 1
            _check_axes(name, module, args)

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        self._stack.pop()
        if not is_leaf(module):
            return
        self._inside -= 1
        if not self._inside:
            with torch._C.DisableTorchFunction():
                node = self.graph.call_module(name, self._arguments(args), self._arguments(kwargs))
                self._made(node, y, name)

    def _made(self, node: fx.Node, y: Any, where: str | None = None) -> None:
        node.meta["where"] = self._stack[-1] if where is None else where
        if isinstance(y, Tensor):
            node.meta["shape"] = tuple(y.shape)
            self._nodes[id(y)] = node
            self._alive.append(y)
        elif isinstance(y, (tuple, list)):
            for i, part in enumerate(y):
                if _tensors(part):
                    self._made(self.graph.call_function(operator.getitem, (node, i)), part, where)

    def _arguments(self, value: Any) -> Any:
        """Tensors become the nodes that made them; the model's own become `get_attr`."""
        if isinstance(value, slice):
            return slice(*map(self._arguments, (value.start, value.stop, value.step)))
        return tree_map(self._argument, value)

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = self._nodes.get(id(value))
        if node is None:
            node = self.graph.create_node("get_attr", self._names.get(id(value), "constant"))
            self._made(node, value)
        return node


def _check_axes(name: str, module: nn.Module, args: Any) -> None:
    """Whether a layer over images is given clips."""
    axes = AXES.get(type(module))
    if axes and args and isinstance(args[0], Tensor) and args[0].dim() > axes + 2:
        raise UnsupportedError(
            f"to_continual: {name or 'the model'} ({type(module).__name__}) takes {axes + 2} axes, "
            f"(N, C, *size), and is given {args[0].dim()}: it is for images, which have no frames"
        )


def _tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_tensors, value))
    return isinstance(value, Tensor)
