"""Can integer arithmetic in a kernel overflow? Intervals of every value in Triton's own code.

Triton IR is in SSA form, and a kernel start knows its integers and its number of programs. So an
interval per value proves that no sum or product leaves its type: the offsets of all programs are
right, without memory of that size. Values that come from memory are taken to lie in LOADED.
"""

from __future__ import annotations

import re
from typing import Any

LOADED = (0, 1 << 15)
SAME = ("splat", "broadcast", "expand_dims", "reshape", "trans", "extsi", "extui", "trunci")

Interval = tuple[int, int]

_ARGUMENT = re.compile(r"(%[\w-]+): (!tt\.ptr<\w+>|i\d+)")
_STEP = re.compile(r"\s*(%[\w-]+)(?::\d+)? = (\w+)\.(\w+) (.*)")
_FOR = re.compile(r"(%[\w-]+) = (%[\w-]+) to (%[\w-]+) step (%[\w-]+)(.*)")
_PLACE = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
_LIMIT = {"i32": 2**31, "i64": 2**63}


def overflows(ttir: str, launch: Any) -> list[str]:
    """The steps of a kernel that may overflow for the integers of its start."""
    lines = [_PLACE.sub("", line) for line in ttir.splitlines()]
    names = [n for n in launch.kernel.arg_names if n not in dict(launch.constants)]
    scalars = dict(zip(names[len(launch.arrays) :], launch.scalars, strict=True))
    known: dict[str, Interval] = {}
    found = []
    for line in lines:
        if "tt.func" in line:
            for name, kind in _ARGUMENT.findall(line):
                if kind in _LIMIT:
                    value = scalars[name[1:]]
                    known[name] = (value, value)
            continue
        step = _STEP.match(line)
        if not step:
            loop = re.match(r"\s*scf\.for (.*)", line)
            if loop:
                _loop(loop[1], known)
            continue
        result, dialect, op, rest = step.groups()
        if (dialect, op) == ("scf", "for"):
            _loop(rest, known)
            continue
        kind = re.search(r"(i\d+)>?\s*$", rest)
        value = _value(dialect, op, rest, known, launch.programs)
        if value is None:
            if op == "addptr" and _operands(rest)[1] not in known:
                found.append(f"unknown offset: {line.strip()}")
            continue
        limit = _LIMIT.get(kind[1]) if kind else None
        inside = limit is None or -limit <= value[0] <= value[1] < limit
        if not inside and op in ("addi", "subi", "muli", "trunci", "shli"):
            found.append(f"{value[0]}..{value[1]}: {line.strip()}")
        known[result] = value
    return found


def _operands(rest: str) -> list[str]:
    return re.findall(r"%[\w-]+(?:#\d+)?", rest)


def _loop(rest: str, known: dict[str, Interval]) -> None:
    variable, low, high, _, _ = _FOR.match(rest).groups()
    if low in known and high in known:
        known[variable] = known[low][0], max(known[low][0], known[high][1] - 1)


def _value(
    dialect: str, op: str, rest: str, known: dict[str, Interval], programs: int
) -> Interval | None:
    """The interval of a step's result, None if it is no integer or cannot be told."""
    if op == "constant":
        number = re.match(r"(?:dense<)?(-?\d+)>? : .*i\d+>?$", rest)
        truth = re.match(r"(?:dense<)?(true|false)>?", rest)
        if number:
            return int(number[1]), int(number[1])
        return (0, 1) if truth else None
    if op == "get_program_id":
        return 0, programs - 1
    if op == "get_num_programs":
        return programs, programs
    if op == "make_range":
        end, start = (int(re.search(rf"{k} = (\d+)", rest)[1]) for k in ("end", "start"))
        return start, end - 1
    if op in ("cmpi", "cmpf"):
        return 0, 1
    if op == "load":
        return LOADED if re.search(r"ptr<i\d+>", rest) else None
    operands = [known.get(name) for name in _operands(rest)]
    if op == "select":
        operands = operands[1:]
    if not operands or any(o is None for o in operands):
        return None
    return _arithmetic(op, [o for o in operands if o is not None])


def _arithmetic(op: str, operands: list[Interval]) -> Interval | None:
    a, b = operands[0], operands[-1]
    if op in SAME:
        return a
    if op == "addi":
        return a[0] + b[0], a[1] + b[1]
    if op == "subi":
        return a[0] - b[1], a[1] - b[0]
    if op == "muli":
        products = [x * y for x in a for y in b]
        return min(products), max(products)
    if op == "divsi" and b[0] > 0:
        quotients = [int(x / y) if abs(x) < 2**50 else x // y for x in a for y in b]
        return min(quotients), max(quotients)
    if op == "remsi" and b[0] > 0:
        most = b[1] - 1
        return (-min(most, -a[0]) if a[0] < 0 else 0), max(0, min(most, a[1]))
    if op == "minsi":
        return min(a[0], b[0]), min(a[1], b[1])
    if op == "maxsi":
        return max(a[0], b[0]), max(a[1], b[1])
    if op == "select":
        return min(a[0], b[0]), max(a[1], b[1])
    if op in ("andi", "ori", "xori") and min(a[0], b[0]) >= 0:
        return 0, (1 << max(a[1], b[1]).bit_length()) - 1
    return None
