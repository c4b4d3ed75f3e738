"""What a kernel start needs of a GPU, read from its code: compiled here, without one."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

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
class Needs:
    """Per thread and per block; `stack_bytes` is where registers spill to: Triton has no arrays."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def compiled(launch: Any, dtypes: dict[str, str | None], chip: str) -> Any:
    """Triton's compiled kernel, with the code of every stage in `.asm`."""
    source = launch.source(dtypes)
    if chip == "gfx942":  # AMD has no TF32 in three parts; its own float32 is IEEE
        source.constants = {
            k: "ieee" if v == "tf32x3" else v for k, v in source.constants.items()
        }
    return triton.compile(source, target=TARGETS[chip], options=launch.options)


def needs(code: Any, chip: str) -> Needs:
    """Of a compiled kernel."""
    shared = code.metadata.shared
    if chip == "gfx942":
        text = code.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1])
        return Needs(registers, stack, shared)
    attributes = _info(code.asm["cubin"])
    return Needs(attributes[_REGISTERS], attributes[_FRAME], shared)


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
