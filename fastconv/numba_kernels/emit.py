"""Writing LLVM IR with operators: `Int` and `Vec` values, `Code` with memory, loops, conditions.

Floating-point instructions carry the flag `contract` alone, which lets a * b + c become one fused
operation. Nothing may be reordered or assumed finite, so NaN and Inf propagate and results do not
change from run to run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba.core.registry import cpu_target

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
ITEM_BYTES = {"float32": 4, "float64": 8}
LINE_BYTES = 64  # of a cache line
_FLAGS = ("contract",)


class _Registers(NamedTuple):
    width: int  # bytes
    number: int


@functools.cache
def _registers() -> _Registers:
    """Vector registers of the CPU that Numba compiles for.

    Its compiler is asked, by a look at what it makes of a wide addition; names and features of
    CPUs, which NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may override, are its business.
    """
    vector = ir.VectorType(ir.FloatType(), 16)
    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [vector.as_pointer()] * 2)
    function = ir.Function(module, kind, "probe")
    builder = ir.IRBuilder(function.append_basic_block())
    left, right = (builder.load(a, align=4) for a in function.args)
    builder.store(builder.fadd(left, right), function.args[0], align=4)
    builder.ret_void()
    machine = cpu_target.target_context.codegen()._tm
    module.triple = machine.triple
    text = machine.emit_assembly(binding.parse_assembly(str(module)))
    if "zmm" in text:
        return _Registers(64, 32)
    if "ymm" in text:
        return _Registers(32, 16)
    return _Registers(16, 16 if "xmm" in text else 32)


def vector_width(dtype: str) -> int:
    """Lanes of a register of this host: 16 float32 with AVX-512, 8 with AVX2, else 4."""
    return _registers().width // ITEM_BYTES[dtype]


def register_count() -> int:
    """Vector registers of this host: 32 with AVX-512 and on 64-bit ARM, otherwise 16."""
    return _registers().number


class Int:
    """An int64 at run time: + - * // % and comparisons, with others and with Python ints.

    // and % are for values that are not negative.
    """

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    def _pair(self, other: Int | int, operation: str, swapped: bool = False) -> Int:
        right = other.value if isinstance(other, Int) else I64(other)
        left, right = (right, self.value) if swapped else (self.value, right)
        return Int(self.builder, getattr(self.builder, operation)(left, right))

    def __add__(self, other: Int | int) -> Int:
        return self if isinstance(other, int) and other == 0 else self._pair(other, "add")

    __radd__ = __add__

    def __sub__(self, other: Int | int) -> Int:
        return self._pair(other, "sub")

    def __rsub__(self, other: int) -> Int:
        return self._pair(other, "sub", swapped=True)

    def __mul__(self, other: Int | int) -> Int:
        return self if isinstance(other, int) and other == 1 else self._pair(other, "mul")

    __rmul__ = __mul__

    def __floordiv__(self, other: Int | int) -> Int:
        return self._pair(other, "udiv")

    def __mod__(self, other: Int | int) -> Int:
        return self._pair(other, "urem")

    def _compare(self, sign: str, other: Int | int) -> Any:
        right = other.value if isinstance(other, Int) else I64(other)
        return self.builder.icmp_signed(sign, self.value, right)

    def __lt__(self, other: Int | int) -> Any:
        return self._compare("<", other)

    def __le__(self, other: Int | int) -> Any:
        return self._compare("<=", other)

    def __gt__(self, other: Int | int) -> Any:
        return self._compare(">", other)

    def __ge__(self, other: Int | int) -> Any:
        return self._compare(">=", other)

    def is_(self, other: Int | int) -> Any:
        """Equality, an i1 for `Code.when` and `Code.select`."""
        return self._compare("==", other)

    def minimum(self, other: Int | int) -> Int:
        right = other if isinstance(other, Int) else Int(self.builder, I64(other))
        return Int(self.builder, self.builder.select(self < right, self.value, right.value))


Index = Int | int
Count = int  # inside Code, `int` is a method
Constant = int | float | Fraction


class Vec:
    """A vector register: + - * / with others and with constants, minus, comparisons to masks."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def type(self) -> Any:
        return self.value.type

    def like(self, value: Any) -> Vec:
        return Vec(self.builder, value)

    def constant(self, c: Constant) -> Vec:
        """A constant in every lane, rounded once to the element type."""
        return self.like(ir.Constant(self.type, [float(c)] * self.type.count))

    def _other(self, other: Vec | Constant) -> Any:
        return (other if isinstance(other, Vec) else self.constant(other)).value

    def __add__(self, other: Vec | Constant) -> Vec:
        return self.like(self.builder.fadd(self.value, self._other(other), flags=_FLAGS))

    __radd__ = __add__

    def __sub__(self, other: Vec | Constant) -> Vec:
        return self.like(self.builder.fsub(self.value, self._other(other), flags=_FLAGS))

    def __rsub__(self, other: Constant) -> Vec:
        return self.like(self.builder.fsub(self._other(other), self.value, flags=_FLAGS))

    def __mul__(self, other: Vec | Constant) -> Vec:
        return self.like(self.builder.fmul(self.value, self._other(other), flags=_FLAGS))

    __rmul__ = __mul__

    def __truediv__(self, other: Vec | Constant) -> Vec:
        return self.like(self.builder.fdiv(self.value, self._other(other), flags=_FLAGS))

    def __neg__(self) -> Vec:
        return self.like(self.builder.fneg(self.value))

    def __lt__(self, other: Vec | Constant) -> Any:
        """Lanes where self < other; False where either is NaN."""
        return self.builder.fcmp_ordered("<", self.value, self._other(other))

    def __gt__(self, other: Vec | Constant) -> Any:
        return self.builder.fcmp_ordered(">", self.value, self._other(other))

    def shuffle(self, other: Vec, lanes: Sequence[int]) -> Vec:
        """Lanes picked from self (0 ..) and other (count ..)."""
        picks = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.like(self.builder.shuffle_vector(self.value, other.value, picks))

    def where(self, mask: Any, other: Vec | Constant) -> Vec:
        """self in the lanes of the mask, other elsewhere."""
        return self.like(self.builder.select(mask, self.value, self._other(other)))


def fma(a: Vec, b: Vec, c: Vec) -> Vec:
    """a * b + c, fused where the CPU can."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = _declare(a.builder, f"llvm.fmuladd.{_suffix(a.type)}", kind)
    return a.like(a.builder.call(function, [a.value, b.value, c.value], fastmath=_FLAGS))


def _suffix(vector: Any) -> str:
    return f"v{vector.count}{vector.element.intrinsic_name}"


def _declare(builder: ir.IRBuilder, name: str, kind: Any) -> Any:
    module = builder.module
    return module.globals.get(name) or ir.Function(module, kind, name)


class Code:
    """What a building block writes with: an LLVM builder, an element type, a register width.

    Addresses are in bytes; offsets, strides and counts are in elements. Nothing needs more
    alignment than an element.
    """

    def __init__(self, builder: ir.IRBuilder, dtype: str, lanes: Count | None = None) -> None:
        self.builder, self.dtype = builder, dtype
        self.item = ITEM_BYTES[dtype]
        self.lanes = lanes or vector_width(dtype)
        self.element = ir.FloatType() if dtype == "float32" else ir.DoubleType()
        self.vector = ir.VectorType(self.element, self.lanes)

    def int(self, value: Index) -> Int:
        return value if isinstance(value, Int) else Int(self.builder, I64(value))

    def select(self, condition: Any, yes: Index, no: Index) -> Int:
        chosen = self.builder.select(condition, self.int(yes).value, self.int(no).value)
        return Int(self.builder, chosen)

    def within(self, low: Int, index: Index, high: Int) -> Any:
        """The condition low <= index < high."""
        return self.both(low <= index, high > index)

    def both(self, left: Any, right: Any) -> Any:
        """The condition that two conditions hold."""
        return self.builder.and_(left, right)

    def splat(self, c: Constant) -> Vec:
        """A constant in every lane."""
        return Vec(self.builder, ir.Constant(self.vector, [float(c)] * self.lanes))

    def zero(self) -> Vec:
        return self.splat(0)

    def first(self, count: Int) -> Any:
        """The mask of lanes below count."""
        counts = self._spread(self.builder.trunc(count.value, I32), I32)
        numbers = ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", numbers, counts)

    def _spread(self, value: Any, element: Any) -> Any:
        vector = ir.VectorType(element, self.lanes)
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        lanes = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)

    def pointer(self, address: Int, offset: Index = 0, to: Any = None) -> Any:
        """address + offset elements, as an LLVM pointer to `to` (an element by default)."""
        start = self.builder.inttoptr(address.value, self.element.as_pointer())
        moved = self.builder.gep(start, [self.int(offset).value])
        return self.builder.bitcast(moved, to.as_pointer()) if to is not None else moved

    def load(self, address: Int, offset: Index = 0, mask: Any = None) -> Vec:
        """The vector at address + offset; lanes outside the mask are not read, and are zero."""
        pointer = self.pointer(address, offset, self.vector)
        if mask is None:
            return Vec(self.builder, self.builder.load(pointer, align=self.item))
        masks = ir.VectorType(I1, self.lanes)
        kind = ir.FunctionType(self.vector, [pointer.type, I32, masks, self.vector])
        function = self._masked("load", kind)
        arguments = [pointer, I32(self.item), mask, self.zero().value]
        return Vec(self.builder, self.builder.call(function, arguments))

    def store(self, vector: Vec, address: Int, offset: Index = 0, mask: Any = None) -> None:
        """Write a vector to address + offset; lanes outside the mask are not touched."""
        pointer = self.pointer(address, offset, self.vector)
        if mask is None:
            self.builder.store(vector.value, pointer, align=self.item)
            return
        masks = ir.VectorType(I1, self.lanes)
        kind = ir.FunctionType(ir.VoidType(), [self.vector, pointer.type, I32, masks])
        arguments = [vector.value, pointer, I32(self.item), mask]
        self.builder.call(self._masked("store", kind), arguments)

    def _masked(self, operation: str, kind: Any) -> Any:
        name = _suffix(self.vector)
        return _declare(self.builder, f"llvm.masked.{operation}.{name}.p0{name}", kind)

    def broadcast(self, address: Int, offset: Index = 0) -> Vec:
        """The element at address + offset in every lane."""
        element = self.builder.load(self.pointer(address, offset), align=self.item)
        return Vec(self.builder, self._spread(element, self.element))

    def prefetch(
        self, address: Int, offset: Index = 0, write: bool = False, level: Count = 1
    ) -> None:
        """Ask for the line of address + offset into cache level 1, 2 or 3; any address will do."""
        pointer = self.pointer(address, offset, I8)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = _declare(self.builder, "llvm.prefetch.p0i8", kind)
        self.builder.call(function, [pointer, I32(int(write)), I32(4 - level), I32(1)])

    def scratch(self, vectors: Count) -> Int:
        """Address of stack memory for some vectors, aligned to a cache line, not initialised."""
        with self.builder.goto_entry_block():
            memory = self.builder.alloca(self.vector, size=I32(vectors))
            memory.align = LINE_BYTES
        return Int(self.builder, self.builder.ptrtoint(memory, I64))

    @contextlib.contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Run the body if the i1 condition holds; values made inside stay inside."""
        with self.builder.if_then(condition):
            yield

    def loop(
        self,
        stop: Index,
        body: Callable[[Int, list[Vec]], Sequence[Vec] | None],
        carry: Sequence[Vec] = (),
        step: Index = 1,
    ) -> list[Vec]:
        """`for i in range(0, stop, step): carry = body(i, carry)`; returns the last carry."""
        b = self.builder
        stop, step = self.int(stop), self.int(step)
        before = b.block
        head, inside, done = (b.append_basic_block(f"loop.{n}") for n in ("head", "body", "done"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        phis = [b.phi(v.type) for v in carry]
        b.cbranch(b.icmp_signed("<", index, stop.value), inside, done)
        b.position_at_end(inside)
        after = list(body(Int(b, index), [Vec(b, p) for p in phis]) or ())
        if len(after) != len(phis):
            raise ValueError(f"loop: body must return {len(phis)} vectors, got {len(after)}")
        following = b.add(index, step.value)
        index.add_incoming(I64(0), before)
        index.add_incoming(following, b.block)
        for phi, first, last in zip(phis, carry, after, strict=True):
            phi.add_incoming(first.value, before)
            phi.add_incoming(last.value, b.block)
        b.branch(head)
        b.position_at_end(done)
        return [Vec(b, p) for p in phis]
