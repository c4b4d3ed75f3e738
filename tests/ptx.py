"""What the kernels of a plan need of a GPU, read from their code: compiled here, without one."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from fastconv.geometry import SeparableGeometry
from fastconv.plan import Plan
from fastconv.triton_kernels.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block may use (CUDA C++ Programming Guide, compute capabilities;
# CDNA 3 instruction set: 64 KB of LDS).
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

# Attributes of .nv.info: pairs (index of the function's symbol, value).
_REGISTERS, _FRAME = 0x2F, 0x11
_SIZED = 4  # an attribute whose 16 bits are the size of what follows


@dataclass(frozen=True)
class Start:
    """A kernel start, and the dtypes of its arrays by name; None: not given."""

    launch: Launch
    dtypes: dict[str, str | None]

    def compiled(self, chip: str) -> Any:
        """Triton's compiled kernel, with the code of every stage in `.asm`."""
        start = self.launch
        if chip == "gfx942":  # AMD has no TF32 in three parts; its own float32 is IEEE
            constants = (
                (name, "ieee" if value == "tf32x3" else value) for name, value in start.constants
            )
            start = replace(start, constants=tuple(constants))
        source = start.source(self.dtypes)
        return triton.compile(source, target=TARGETS[chip], options=start.options)

    def ttir(self) -> str:
        """The kernel as Triton sees it, independent of a chip: much sooner than `compiled`."""
        backend = make_backend(TARGETS["sm_90"])
        options = backend.parse_options(dict(self.launch.options))
        source = self.launch.source(self.dtypes)
        context, stages = ir.context(), {}
        ir.load_dialects(context)
        backend.load_dialects(context)
        made_by = backend.get_codegen_implementation(options), backend.get_module_map()
        module = source.make_ir(TARGETS["sm_90"], options, *made_by, context)
        backend.add_stages(stages, options, source.language)
        return str(stages["ttir"](module, {}))


def starts(plan: Plan, gradient: str | None = None) -> list[Start]:
    """What `run` starts for a plan, or `input_gradient` or `weight_gradient` of its family.

    The arrays are PyTorch's meta tensors: of any size, and without memory.
    """
    plan = replace(plan, device="cpu")
    folder = "fastconv.triton_kernels"
    module = import_module(f"{folder}.{plan.family}{'_gradients' if gradient else ''}")
    found: list[Start] = []

    def record(start: Launch, arrays: dict[str, Any]) -> None:
        dtypes = {n: a if a is None else str(a.dtype)[6:] for n, a in arrays.items()}
        found.append(Start(start, dtypes))

    size = module.workspace_size(plan)
    scratch = torch.empty(size, dtype=getattr(torch, plan.dtype), device="meta")
    with mock.patch.object(Launch, "__call__", record):
        if gradient:
            getattr(module, gradient)(plan, *_gradient_arrays(plan, gradient), scratch)
        else:
            module.run(plan, *_arrays(plan, module), scratch)
    return found


def _empty(plan: Plan, shape: tuple[int, ...], dtype: str | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype or plan.dtype), device="meta")


def _gradient_arrays(plan: Plan, gradient: str) -> list[torch.Tensor]:
    g = plan.geometry
    shapes = [g.y_shape, g.w_shape, g.x_shape]
    if gradient == "weight_gradient":
        shapes = [g.x_shape, g.y_shape, g.w_shape]
    return [_empty(plan, shape) for shape in shapes]


def _arrays(plan: Plan, module: Any) -> list[Any]:
    """The arguments of `run` between plan and workspace."""
    g = plan.geometry
    block = isinstance(g, SeparableGeometry)
    stages = g.stages if block else (g,)
    epilogues = plan.epilogue if block else (plan.epilogue,)
    weights = tuple(np.zeros(s.w_shape, np.float32) for s in stages)
    packed = module.prepack(weights if block else weights[0], plan)
    biases = tuple(
        _empty(plan, (s.out_channels,)) if e.bias else None
        for s, e in zip(stages, epilogues, strict=True)
    )
    bias = biases if block else biases[0]
    residual = epilogues[-1].residual
    if plan.family != "continual":
        y = _empty(plan, g.y_shape)
        return [_empty(plan, g.x_shape), packed, bias, y if residual else None, y]
    batch, channels, frames, *frame = g.x_shape
    y = _empty(plan, (batch, g.out_channels, *g.out_size[1:]))
    x, state = ((batch, channels, *ring, *frame) for ring in ((), (frames - 1,)))
    steps = _empty(plan, (batch,), "int64")
    return [_empty(plan, x), packed, bias, y if residual else None, _empty(plan, state), steps, y]


@dataclass(frozen=True)
class Needs:
    """Per thread and per block; `stack_bytes` is where registers spill to: Triton has no arrays.

    stores  instructions that write to global memory
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    stores: int


def needs(code: Any, chip: str) -> Needs:
    """Of a compiled kernel."""
    shared = code.metadata.shared
    if chip == "gfx942":
        text = code.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1])
        stores = len(re.findall(r"(?:global|buffer|flat)_(?:store|atomic)", text))
        return Needs(registers, stack, shared, stores)
    attributes = _info(code.asm["cubin"])
    stores = len(re.findall(r"\b(?:st|red|atom)\.global", code.asm["ptx"]))
    return Needs(attributes[_REGISTERS], attributes[_FRAME], shared, stores)


def _info(cubin: bytes) -> dict[int, int]:
    """The largest value of each sized attribute in the section .nv.info of a 64-bit ELF file."""
    section = _sections(cubin)[".nv.info"]
    found: dict[int, int] = {}
    at = 0
    while at < len(section):
        kind, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if kind == _SIZED:
            if size == 8:
                value = struct.unpack_from("<II", section, at)[1]
                found[attribute] = max(found.get(attribute, 0), value)
            at += size
    return found


def _sections(elf: bytes) -> dict[str, bytes]:
    """Name -> bytes of every section."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = []
    for i in range(count):
        at = table + i * size
        (name,) = struct.unpack_from("<I", elf, at)
        headers.append((name, *struct.unpack_from("<QQ", elf, at + 24)))
    start = headers[names][1]
    found = {}
    for name, offset, length in headers:
        end = elf.index(b"\0", start + name)
        found[elf[start + name : end].decode()] = elf[offset : offset + length]
    return found
