"""`to_continual`: a model for clips becomes one for streams, with its own weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastconv.errors import UnsupportedError

from . import continual_rules as rules
from .continual_graph import Graph
from .continual_network import Continual
from .continual_trace import trace_clip
from .to_continual_functions import FUNCTIONS, Traced, Zeros

# Their arguments are asked for a shape alone.
MAKE_ZEROS = ("zeros_like", "new_zeros", "zeros")


def to_continual(
    model: nn.Module,
    example_clip: Tensor,
    *,
    start: str = "wait",
    pool_window: int | None = None,
    squeeze_window: int = 1,
    backend: str = "auto",
    form: str = "ring",
) -> ContinualNetwork:
    """A copy of a model that takes its clips frame by frame, with the same parameters (not copies).

    example_clip    (N, C, T, *size), as the model takes it; values and precision do not matter, it
                    may be on the `meta` device
    start           'wait': a result needs all frames of its receptive field; the layers' temporal
                    padding is dropped. 'zeros': the padding in front of the clip is kept, and
                    results come as soon as they are the clip's. 'replicate': as if the first frame
                    had been there for ever
    pool_window     columns that a pooling over the whole clip takes in; those of the example clip
                    by default
    squeeze_window  the same where the pooled values scale what was pooled, as in squeeze and
                    excitation: 1, the frame alone, as published; clips are scaled by their own mean
    backend         of the convolutions
    form            of their memory: 'ring', frames, or 'sum', incomplete columns, or 'auto', for
                    every convolution what has fewer bytes; see `fastconv.continual_state`

    Branches that are joined again wait for each other, also those without a layer over time, so the
    stream's columns are the clip's. In eval mode batch norms, activations and residuals are done by
    the convolutions before them.

    Raises UnsupportedError for what has no meaning in a stream: it names the layer and says why.
    Whatever the model raises for the clip comes too.

    Source: Hedegaard and Iosifidis, Continual 3D Convolutional Neural Networks, ECCV 2022.
    """
    if example_clip.dim() < 3:
        raise UnsupportedError(
            "to_continual: the example clip must be (N, C, T, *size), "
            f"got {tuple(example_clip.shape)}"
        )
    if squeeze_window < 1 or (pool_window is not None and pool_window < 1):
        raise UnsupportedError(
            f"to_continual: windows must be at least 1, got {pool_window} and {squeeze_window}"
        )
    # Two entries, so that an axis that is not the batch does not look like it.
    shape = (2, *example_clip.shape[1:])
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(dtypes, example_clip.dtype)
    traced = trace_clip(model, torch.empty(shape, dtype=dtype, device="meta"))
    network = ContinualNetwork(
        model,
        traced,
        pool=pool_window,
        squeeze=squeeze_window,
        start=start,
        backend=backend,
        form=form,
    )
    network.graph()  # what is refused is refused now
    return network


class ContinualNetwork(Continual):
    """What `to_continual` returns: the model's modules under their names, run frame by frame."""

    def __init__(
        self,
        model: nn.Module,
        traced: fx.Graph,
        *,
        pool: int | None,
        squeeze: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        tensors = (*model.parameters(), *model.buffers())
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        self._modules.update(model._modules)
        self._parameters.update(model._parameters)
        self._buffers.update(model._buffers)
        self._non_persistent_buffers_set |= model._non_persistent_buffers_set
        self.pool_window, self.squeeze_window = pool, squeeze
        self._traced, self._own = traced, _Root(model)
        self.training = model.training

    def record(self, graph: Graph, value: int) -> int:
        return Converter(self, self._traced, graph, value).run()

    def part(self, name: str) -> nn.Module:
        """A module by its qualified name; `ContinualNetwork`'s own attributes hide none."""
        module: nn.Module = self
        if not name:
            return self._own.model
        for own in name.split("."):
            found = module._modules[own]
            assert found is not None
            module = found
        return module


class _Root:
    """The model itself, which is not a part of the network but may be all of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


class Converter:
    """Goes through a traced clip and adds to a graph what each operation is in a stream."""

    def __init__(
        self, network: ContinualNetwork, traced: fx.Graph, graph: Graph, value: int
    ) -> None:
        self.network, self.graph = network, graph
        self.nodes = list(traced.nodes)
        self.input = value
        self.found: dict[fx.Node, Any] = {}

    def run(self) -> int:
        needed = self._needed()
        for node in self.nodes:
            if node in needed:
                try:
                    self.found[node] = self._convert(node)
                except UnsupportedError as error:
                    if getattr(error, "placed", False):
                        raise
                    told = UnsupportedError(f"to_continual: {self._place(node)} {error}")
                    told.placed = True  # type: ignore[attr-defined]
                    raise told from error
        result = self.found[self.nodes[-1]]
        if not isinstance(result, Traced):
            raise UnsupportedError("to_continual: the model must return one tensor")
        return result.value

    def _needed(self) -> set[fx.Node]:
        """What the output depends on by value."""
        needed, open_nodes = set(), [self.nodes[-1]]
        while open_nodes:
            node = open_nodes.pop()
            if node not in needed:
                needed.add(node)
                if _name(node) not in MAKE_ZEROS:
                    open_nodes.extend(node.all_input_nodes)
        return needed

    def _place(self, node: fx.Node) -> str:
        where = node.meta.get("where", "")
        kind = type(self.network.part(where)).__name__
        called = f", {_name(node)}:" if node.op == "call_function" else ""
        return f"{where or 'the model'} ({kind}){called}"

    def _convert(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return Traced(self.input, node.meta["shape"], self)
        if node.op == "output":
            return self.found.get(node.args[0])  # type: ignore[arg-type]
        if node.op == "get_attr":
            return node
        if node.op == "call_module":
            return self._module(node)
        name = _name(node)
        if name in MAKE_ZEROS:
            return Zeros(node.meta["shape"])
        handler = FUNCTIONS.get(name.rstrip("_") if not name.startswith("__") else name)
        if handler is None:
            raise UnsupportedError("is a function without a rule for streams")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.found.get(n, n))
        return handler(self, node, *args, **kwargs)

    def _module(self, node: fx.Node) -> Any:
        module, name = self.network.part(str(node.target)), str(node.target)
        x = self.found[node.args[0]] if node.args else None  # type: ignore[index]
        if not isinstance(x, Traced):
            raise UnsupportedError("takes something that is not made of frames")
        if len(node.args) > 1 or node.kwargs:
            raise UnsupportedError("takes more than one argument")
        if isinstance(module, (nn.LSTM, nn.GRU)):
            if x.time != (1 if module.batch_first else 0):
                raise UnsupportedError("does not run along time")
            return (Traced(rules.record(self.graph, module, x.value, name), (), self), None)
        self._check_axes(module, x)
        if rules.kind_of(module) in rules.ADAPTIVE_POOLS:
            gate = self.is_gate(node)
            window = self.window(x, gate)
            value = rules.adaptive_pool(self.graph, module, x.value, name, window, gate=gate)
        else:
            value = rules.record(self.graph, module, x.value, name)
        return Traced(value, node.meta["shape"], self)

    def _check_axes(self, module: nn.Module, x: Traced) -> None:
        """Whether the frames are where the module has its first axis."""
        axis = x.time
        if axis is None:
            return
        pools = (*rules.AVERAGE_POOLS, *rules.MAX_POOLS, *rules.ADAPTIVE_POOLS)
        spatial = (*rules.CONVOLUTIONS, *pools)
        dims = rules.axes_of(module) + 2 if isinstance(module, spatial) else x.dims
        if isinstance(module, spatial) and (axis != 2 or x.dims != dims):
            raise UnsupportedError(f"takes frames along axis {axis} of {x.dims}, not 2")
        if isinstance(module, nn.Linear) and axis == x.dims - 1:
            raise UnsupportedError("mixes the frames of a clip")
        if isinstance(module, nn.Flatten):
            last = module.end_dim % x.dims
            if module.start_dim <= axis <= last and x.shape[axis] != 1:
                raise UnsupportedError(
                    f"makes features of {x.shape[axis]} columns; a clip as long as one column "
                    "would do"
                )

    def window(self, x: Traced, gate: bool) -> int:
        """Columns that a pooling over all of x takes in."""
        if gate:
            return self.network.squeeze_window
        if self.network.pool_window is not None:
            return self.network.pool_window
        return 1 if x.time is None else int(x.shape[x.time])

    def is_gate(self, node: fx.Node) -> bool:
        """Whether a pooled value comes to scale a larger one."""
        seen, open_nodes = {node}, [node]
        while open_nodes:
            value = open_nodes.pop()
            for user in value.users:
                shape = user.meta.get("shape")
                if user in seen or shape is None:
                    continue
                if _name(user).rstrip("_") == "mul" and shape != value.meta["shape"]:
                    return True
                if len(user.all_input_nodes) == 1:
                    seen.add(user)
                    open_nodes.append(user)
        return False


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
