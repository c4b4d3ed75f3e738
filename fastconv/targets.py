"""Networks as the command line names them, on PyTorch's `meta` device: nothing is computed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BackendError, GeometryError, UnsupportedError
from .published import Reading

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .nn.rules import Exceptions
    from .nn.trace import Layer

_FACTORY = re.compile(r"([\w.]+):([\w.]+)@(\d+(?:x\d+){2,3})")
_MEANT = re.compile(r"([\w.]+:[A-Za-z_][\w.]*)(@.*)?")  # what follows a layer's colon is a number


@dataclass(frozen=True, eq=False)
class Target:
    """A model on the `meta` device, its input there, and what is known of its published code."""

    name: str
    model: nn.Module
    x: Tensor
    exceptions: Exceptions

    @property
    def note(self) -> str:
        """The input, in words."""
        return "input " + "x".join(map(str, self.x.shape))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def layers(self) -> list[Layer]:
        """Its convolutions and linear layers as they run. Raises GeometryError if they do not."""
        from .nn.trace import trace

        try:
            return trace(self.model, self.x)
        except (RuntimeError, ValueError) as error:
            size = "x".join(map(str, self.x.shape[2:]))
            reason = str(error).splitlines()[0]
            raise GeometryError(f"count: {self.name} does not take {size}: {reason}") from error


def is_factory(text: str) -> bool:
    """Whether a target is written like package.module:factory@3x16x224x224.

    Raises GeometryError for one whose input is missing or is none.
    """
    if _FACTORY.fullmatch(text):
        return True
    meant = _MEANT.fullmatch(text)
    if meant:
        name = meant[1]
        raise GeometryError(f"count: expected {name}@CHANNELSx[FRAMESx]HEIGHTxWIDTH, got {text!r}")
    return False


def load(text: str) -> Target:
    """NETWORK, NETWORK@SIZE or PACKAGE.MODULE:FACTORY@CHANNELSxSIZE.

    Raises GeometryError for a size that does not fit, UnsupportedError for what is no network,
    BackendError without PyTorch.
    """
    _need_torch(text)
    return _imported(text) if is_factory(text) else _of_zoo(text)


def of_reading(reading: Reading) -> Target:
    """The network, or the part of one, that a published row is about."""
    _need_torch(reading.network)
    from .zoo import NETWORKS

    shape = reading.input_shape or NETWORKS[reading.network].input_shape
    target = _built(reading.network, shape, dict(reading.options), reading.part)
    if reading.without:
        from torch import nn

        target.model.set_submodule(reading.without, nn.Identity())
    return target


def _of_zoo(text: str) -> Target:
    from .zoo import NETWORKS

    name, _, size = text.partition("@")
    shape = NETWORKS[name].input_shape
    if size:
        axes = "x".join(("FRAMES", "HEIGHT", "WIDTH")[4 - len(shape) :])
        extents = tuple(int(part) for part in size.split("x") if part.isdecimal())
        if size != "x".join(map(str, extents)) or len(extents) != len(shape) - 1 or 0 in extents:
            raise GeometryError(f"count: expected {name}@{axes}, got {text!r}")
        shape = (shape[0], *extents)
    return _built(name, shape, {})


def _built(name: str, shape: Sequence[int], options: Mapping[str, Any], part: str = "") -> Target:
    import torch

    from .zoo import NETWORKS

    builder = NETWORKS[name].builder
    given = dict(options)
    if "clip" in inspect.signature(builder).parameters:
        given.setdefault("clip", tuple(shape[1:]))
    try:
        with torch.device("meta"):
            model = builder(**given).get_submodule(part)
            x = torch.empty(1, *shape)
    except (RuntimeError, ValueError) as error:
        size = "x".join(map(str, shape[1:]))
        reason = str(error).splitlines()[0]
        raise GeometryError(f"count: {name} does not take {size}: {reason}") from error
    return Target(name, model, x, _exceptions(name))


def _imported(text: str) -> Target:
    import torch
    from torch import nn

    match = _FACTORY.fullmatch(text)
    assert match is not None
    module, attribute, size = match.groups()
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"count: {module}:{attribute} cannot be imported: {error}"
        ) from error
    shape = tuple(map(int, size.split("x")))
    with torch.device("meta"):
        try:
            model = found if isinstance(found, nn.Module) else found()
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UnsupportedError(
                f"count: {module}:{attribute} made no model without arguments: {reason}"
            ) from error
        x = torch.empty(1, *shape)
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"count: {module}:{attribute} made a {type(model).__name__}, not a torch.nn.Module"
        )
    return Target(f"{module}:{attribute}", model, x, _exceptions(""))


def _exceptions(network: str) -> Exceptions:
    from .nn.rules import Exceptions
    from .published import exceptions_of

    return Exceptions(**exceptions_of(network))


def _need_torch(text: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"count: {text} needs PyTorch, which is not installed: pip install 'fastconv[torch]'"
        ) from error
