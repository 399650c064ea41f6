"""A compiled program's text, as data: computations, their instructions, and how often loops run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_WIDTHS = {"pred": 1.0, "s4": 0.5, "u4": 0.5, "bf16": 2.0, "token": 0.0, "opaque": 0.0}
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_OPENS = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_NAMED = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Array:
    """One array of a type. `size`: bytes where it lies, filled up to the layout's tiles; `near`: not in the chip's main
    memory (TPU programs say of each array which memory it lives in)."""

    kind: str
    shape: tuple[int, ...]
    size: float
    near: bool

    @property
    def bytes(self) -> float:
        """Without what fills up tiles."""
        return _width(self.kind) * math.prod(self.shape)

    @property
    def far(self) -> float:
        """Bytes of it in the main memory."""
        return 0.0 if self.near else self.size


@dataclass(frozen=True)
class Instruction:
    """`operands`: names, within the computation; `rest`: the text after them."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    rest: str

    def called(self, *keys: str) -> list[str]:
        """The computations that it names under any of `keys`."""
        out = []
        for key in keys:
            for one in re.findall(rf"\b{key}=\{{([^}}]*)\}}|\b{key}=%([\w.\-]+)", self.rest):
                out += _NAME.findall(one[0]) if one[0] else [one[1]]
        return out

    @property
    def far(self) -> float:
        return sum(a.far for a in self.arrays)


@dataclass
class Computation:
    """Instructions by name, in order; the last one named ROOT is `root`."""

    name: str
    lines: list[str] = field(default_factory=list)
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""
    users: dict[str, list[Instruction]] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs: as its text says, or until its counter, from 0 on and by the step that the body adds,
        comes to the constant that the condition compares with (the compiler unrolls loops, and then counts by twos).
        None where the text says none of it."""
        said = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if said:
            return int(said[1])
        names = loop.called("condition")
        condition = self.computations.get(names[0]) if names else None
        if condition is None:
            return None
        limits = [n for n in map(_constant, condition.instructions.values()) if n is not None]
        return -(-max(limits) // self._step(loop, condition)) if limits else None

    def _step(self, loop: Instruction, condition: Computation) -> int:
        """What the body adds to the counter; 1 where it cannot be found."""
        body = self.computations.get((loop.called("body") or [""])[0])
        test = condition.instructions.get(condition.root)
        made = body.instructions.get(body.root) if body else None
        if body is None or test is None or made is None or made.opcode != "tuple":
            return 1
        for name in test.operands:
            counter = condition.instructions.get(name)
            at = (
                re.search(r"\bindex=(\d+)", counter.rest) if counter and counter.opcode == "get-tuple-element" else None
            )
            added = body.instructions.get(made.operands[int(at[1])]) if at else None
            if added is not None and added.opcode == "add":
                steps = [_constant(body.instructions[o]) for o in added.operands if o in body.instructions]
                return max((n for n in steps if n), default=1)
        return 1


def _constant(i: Instruction) -> int | None:
    """The value of an integer scalar that the text writes out."""
    whole = i.opcode == "constant" and bool(i.arrays) and i.arrays[0].kind[0] in "su" and not i.arrays[0].shape
    return int(i.inside) if whole and i.inside.lstrip("-").isdigit() else None


def read(text: str) -> Program:
    """The program of ``compiled.as_text()``, or of what the compiler writes."""
    found: dict[str, Computation] = {}
    entry = ""
    for name, first, lines in _computations(text):
        one = Computation(name, lines)
        for line in lines:
            made = _instruction(line)
            if made is None:
                continue
            one.instructions[made.name] = made
            for operand in dict.fromkeys(made.operands):
                one.users.setdefault(operand, []).append(made)
            if line.lstrip().startswith("ROOT "):
                one.root = made.name
        found[name] = one
        entry = name if first else entry
    return Program(found, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, those of a tuple in order."""
    out = []
    for kind, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(n) for n in dims.split(",") if n)
        space = _SPACE.search(layout)
        out.append(Array(kind, shape, _width(kind) * _filled(shape, layout), bool(space and int(space[1]))))
    return tuple(out)


def _width(kind: str) -> float:
    digits = re.match(r"\D+(\d+)", kind)
    return _WIDTHS[kind] if kind in _WIDTHS else int(digits[1]) / 8 if digits else 1.0


def _filled(shape: tuple[int, ...], layout: str) -> float:
    """Elements of an array where it lies: its last axes in memory are filled up to whole tiles."""
    order = [int(n) for n in layout.split(":")[0].split(",") if n.strip().isdigit()]
    tile = _TILE.search(layout)
    if not tile or len(order) != len(shape):
        return math.prod(shape)
    sides = [int(n) for n in tile[1].split(",")][::-1]  # minor first, as in `order`
    sizes = [shape[axis] for axis in order]
    for i, side in enumerate(sides[: len(sizes)]):
        sizes[i] = -(-sizes[i] // side) * side
    return math.prod(sizes)


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    name, first, lines = "", False, list[str]()
    for line in text.splitlines():
        opens = _OPENS.match(line)
        if opens:
            name, first, lines = opens[2], opens[1] is not None, []
        elif line == "}" and name:
            yield name, first, lines
            name = ""
        elif name:
            lines.append(line)


def _instruction(line: str) -> Instruction | None:
    named = _NAMED.match(line)
    if named is None:
        return None
    start = named.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    return Instruction(
        named[2], arrays(line[start:end]), opcode[1], tuple(_NAME.findall(inside)), inside, line[close + 1 :]
    )


def _closing(line: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if depth == 0:
            return at
    return len(line)
