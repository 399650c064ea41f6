"""FLOPs and bytes of a compiled program, loops counted as often as they run, read off its text.

FLOPs are those of products: ``dot``; ``convolution``, as which TPU programs write them, of which only places inside the
(padded, dilated) input count; and sums over products, as which they write a matrix times a vector. Bytes are what
passes between a chip and its main memory if every instruction, a fusion being one, reads its operands and writes its
results once: slices read a slice, updates in place write the update, and what a program keeps in a chip's own memory is
free. Arrays count as they lie there, filled up to tiles. Of a conditional the dearest branch counts. A kernel counts
what it says of itself (`pallas.CostEstimate`); what says nothing is named.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from lm.aot.program import Computation, Instruction, Program

FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "domain", "add-dependency", "copy-done", "async-done", "async-update", "infeed", "outfeed"),
    *("send", "recv", "send-done", "recv-done"),
}
QUIET = (
    *("AllocateBuffer", "AsyncCollectiveDone", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"),
    "ConcatBitcast",
)
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Cost:
    """Of one device. `kernels`: FLOPs of kernels among `flops`; `silent`: targets of calls that say nothing of their
    work; `endless`: loops whose text does not say how often they run, counted once."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    silent: frozenset[str] = frozenset()
    endless: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            self.silent | other.silent,
            self.endless + other.endless,
        )

    def times(self, n: int) -> Cost:
        return Cost(n * self.flops, n * self.bytes, n * self.kernels, self.silent, self.endless)


def cost(program: Program) -> Cost:
    """What one run of the program costs one device."""
    seen: dict[tuple[str, bool], Cost] = {}

    def of(name: str, fused: bool) -> Cost:
        """Of a computation; inside a fusion nothing but products counts."""
        if (name, fused) not in seen:
            one = program.computations.get(name)
            total = Cost()
            for instruction in one.instructions.values() if one else ():
                total += step(one, instruction, fused) if one else Cost()
            seen[name, fused] = total
        return seen[name, fused]

    def step(inside: Computation, i: Instruction, fused: bool) -> Cost:
        if i.opcode in ("dot", "convolution"):
            own = Cost(flops=(_dot if i.opcode == "dot" else _convolution)(inside, i))
            return own if fused else own + Cost(bytes=_plain(inside, i))
        if i.opcode == "reduce":
            return Cost(_summed_products(inside, i), 0.0 if fused else _moved(inside, i))
        if i.opcode == "while":
            n = program.trips(i)
            body = sum((of(c, fused) for c in i.called("condition", "body")), Cost())
            return body.times(1 if n is None else n) + Cost(endless=int(n is None))
        if i.opcode == "conditional":
            branches = [of(c, fused) for c in i.called("branch_computations", "true_computation", "false_computation")]
            return max(branches, key=lambda c: (c.flops, c.bytes), default=Cost())
        if i.opcode == "fusion":
            (name,) = i.called("calls") or [""]
            moved = 0.0 if fused else traffic(program, name)
            return of(name, True) + Cost(bytes=moved)
        if i.opcode in ("call", "async-start"):
            return sum((of(c, fused) for c in i.called("calls", "to_apply", "called_computations")), Cost())
        if i.opcode == "custom-call":
            return _custom(inside, i, fused)
        return Cost() if fused else Cost(bytes=_moved(inside, i))

    return of(program.entry, False)


def _dot(inside: Computation, i: Instruction) -> float:
    left = inside.instructions[i.operands[0]].arrays[0].shape
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    inner = math.prod(left[int(n)] for n in summed[1].split(",") if n) if summed else 1
    return 2.0 * math.prod(i.arrays[0].shape) * inner


def _summed_products(inside: Computation, i: Instruction) -> float:
    made = inside.instructions.get(i.operands[0])
    shape = made.arrays[0].shape if made is not None and made.arrays else ()
    while made is not None and made.opcode in ("bitcast", "convert", "copy", "reshape", "transpose"):
        made = inside.instructions.get(made.operands[0])
    return 2.0 * math.prod(shape) if made is not None and made.opcode == "multiply" else 0.0


def _convolution(inside: Computation, i: Instruction) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    if labels is None:
        return 0.0
    left, right = (inside.instructions[name].arrays[0].shape for name in i.operands[:2])
    out = i.arrays[0].shape
    inner = right[labels[2].index("i")]  # already one group's
    rows = out[labels[3].index("b")]
    spatial = sorted(c for c in labels[3] if c.isdigit())
    window = _window(i.rest)
    pairs = 1
    for at, c in enumerate(spatial):
        size, reach = left[labels[1].index(c)], right[labels[2].index(c)]
        pairs *= _pairs(size, reach, out[labels[3].index(c)], *(window[key][at] for key in window))
    return 2.0 * rows * out[labels[3].index("f")] * inner * pairs


def _window(text: str) -> dict[str, list[int]]:
    """``stride``, ``pad`` (before), ``lhs_dilate`` and ``rhs_dilate`` of every spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", text)
    said = dict(part.split("=", 1) for part in found[1].split()) if found else {}
    n = len(said.get("size", "1").split("x"))

    def many(key: str, default: int) -> list[int]:
        return [int(p.split("_")[0]) for p in said[key].split("x")] if key in said else [default] * n

    return {
        "stride": many("stride", 1),
        "pad": many("pad", 0),
        "lhs": many("lhs_dilate", 1),
        "rhs": many("rhs_dilate", 1),
    }


@functools.lru_cache(maxsize=4096)
def _pairs(size: int, reach: int, out: int, stride: int, pad: int, lhs: int, rhs: int) -> int:
    """Pairs of a place in the output and one in the window that meet an element of the input."""
    total = 0
    for k in range(reach):
        # Output o meets k at o * stride + k * rhs - pad, which is an element where it is one of 0, lhs, 2 lhs, ...
        first = k * rhs - pad
        if lhs == 1:  # o from ceil(-first / stride) to floor((size - 1 - first) / stride)
            low, high = max(0, -(first // stride)), min(out - 1, (size - 1 - first) // stride)
            total += max(0, high - low + 1)
        else:
            places = (o * stride + first for o in range(out))
            total += sum(p >= 0 and p % lhs == 0 and p // lhs < size for p in places)
    return total


def _custom(inside: Computation, i: Instruction, fused: bool) -> Cost:
    target = re.search(r'custom_call_target="([^"]*)"', i.rest)
    name = target[1] if target else ""
    said = re.search(r'"?cost_estimate"?:\s*\{([^}]*)\}', i.rest.replace('\\"', '"'))
    if said:
        numbers = {k: float(v) for k, v in re.findall(r'"?(\w+)"?:\s*"?([\d.eE+]+)', said[1])}
        flops = numbers.get("flops", 0.0)
        return Cost(flops, numbers.get("bytes_accessed", _plain(inside, i)), flops)
    if name in QUIET or name == "AsyncCollectiveStart":
        return Cost()
    silent = frozenset([name])
    return Cost(silent=silent) if fused else Cost(bytes=_plain(inside, i), silent=silent)


def _plain(inside: Computation, i: Instruction) -> float:
    """Every operand read and every result written."""
    return i.far + sum(inside.instructions[name].far for name in i.operands if name in inside.instructions)


def _moved(inside: Computation, i: Instruction) -> float:
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0.0
    operands = [inside.instructions[name] for name in i.operands if name in inside.instructions]
    if i.opcode in SLICES:
        read = i.arrays[0].size if operands and not operands[0].arrays[0].near else 0.0
        return i.far + read
    if i.opcode == "dynamic-update-slice":
        return operands[1].far + (0.0 if i.arrays[0].near else operands[1].arrays[0].size)
    if i.opcode == "scatter":
        return sum(o.far for o in operands[1:]) + (0.0 if i.arrays[0].near else 2 * operands[-1].arrays[0].size)
    if i.opcode == "copy-start":  # its result is (copy, original, flag)
        return i.arrays[0].far + sum(o.far for o in operands)
    if i.opcode.endswith("-start"):  # of a collective: its result lists what it reads, too
        return i.far
    return _plain(inside, i)


def traffic(program: Program, name: str) -> float:
    """Bytes that a fusion reads and writes."""
    fused = program.computations.get(name)
    if fused is None or not fused.root:
        return 0.0
    read = sum(_read(program, fused, i.name) for i in fused.instructions.values() if i.opcode == "parameter")
    root = fused.instructions[fused.root]
    if root.opcode == "custom-call" and "AsyncCollectiveStart" in root.rest:  # (part, whole, flags): both are moved
        return root.far
    if root.opcode != "tuple":
        return read + (0.0 if root.arrays and root.arrays[0].near else _written(program, fused, root.name))
    wrote = 0.0
    for array, operand in zip(root.arrays, root.operands, strict=False):
        wrote += 0.0 if array.near else _written(program, fused, operand)
    return read + wrote


def _read(program: Program, fused: Computation, name: str) -> float:
    """Bytes of the array `name` that the computation reads from the main memory."""
    whole = fused.instructions[name]
    if whole.far == 0.0:
        return 0.0
    total = 0.0
    for user in fused.users.get(name, []):
        first = bool(user.operands) and user.operands[0] == name
        if user.opcode in SLICES and first:
            total += user.arrays[0].size
        elif (user.opcode in ("dynamic-update-slice", "scatter") and first) or user.opcode == "tuple":
            continue
        elif user.opcode == "bitcast":
            total += _read(program, fused, user.name)
        elif user.opcode == "fusion":
            inner = program.computations.get((user.called("calls") or [""])[0])
            for at, operand in enumerate(user.operands):
                if operand == name and inner is not None:
                    total += sum(
                        _read(program, inner, p.name)
                        for p in inner.instructions.values()
                        if p.opcode == "parameter" and p.inside.strip() == str(at)
                    )
        elif (
            user.opcode.startswith(("all-", "reduce-scatter", "collective-", "ragged-"))
            or "AsyncCollective" in user.rest
        ):
            continue  # a step of a collective, counted where it starts
        else:
            return whole.far
    return min(total, whole.far)


def _written(program: Program, fused: Computation, name: str) -> float:
    """Bytes that the computation writes for its result `name`."""
    made = fused.instructions[name]
    if made.opcode in ("parameter", "get-tuple-element") or "AsyncCollective" in made.rest:
        return 0.0
    if made.opcode.startswith(("all-gather", "all-reduce", "reduce-scatter", "collective-", "ragged-")):
        return 0.0
    if made.opcode == "bitcast" and made.operands:
        return _written(program, fused, made.operands[0])
    if made.opcode == "dynamic-update-slice":
        return fused.instructions[made.operands[1]].arrays[0].size
    if made.opcode == "scatter":
        return 2 * fused.instructions[made.operands[-1]].arrays[0].size
    if made.opcode == "fusion":
        inner = program.computations.get((made.called("calls") or [""])[0])
        if inner is not None and inner.root and inner.instructions[inner.root].opcode != "tuple":
            return _written(program, inner, inner.root)
    return sum(a.size for a in made.arrays)
