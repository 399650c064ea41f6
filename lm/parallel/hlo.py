"""Collectives of a compiled program, read off its text: kinds, how often they run, bytes through a chip's links."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lm.parallel.program import Instruction, Program, read

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_CALLS = ("calls", "to_apply", "true_computation", "false_computation", "async_execution_thread", "branch_computations")
_BY_HAND = re.compile(r'op_name="[^"]*/(ppermute|all_to_all|ragged_all_to_all|all_gather|psum\w*|reduce_scatter)"')


@dataclass(frozen=True)
class Collective:
    """`times`: runs per program, loops counted. `group`: chips that take part. `sent`: bytes that leave a chip each
    time, by a ring: ``(n - 1) / n`` of the whole array for all-gather, reduce-scatter and all-to-all, twice that for
    all-reduce, the array for a permute."""

    kind: str
    times: int
    group: int
    sent: float


def collectives(text: str | Program, n_devices: int) -> list[Collective]:
    """Every collective of a compiled program, or of its text (``compiled.as_text()``).

    A collective that the compiler has split into a start, steps and an end is one: they share a channel. Those written
    by hand (`jax.shard_map`) all have the same channel, and each is one. A loop runs as
    often as its text says, or as the constant that its condition compares with; once where it says neither.
    """
    program = read(text) if isinstance(text, str) else text
    times: dict[str, int] = {}
    _count(program.entry, 1, program, times)
    found: dict[tuple[str, str], Collective] = {}
    for name, runs in times.items():
        for n, i in enumerate(program.computations[name].instructions.values()):
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", i.rest)
            by_hand = _BY_HAND.search(i.rest) is not None
            key = kind, channel[1] if channel and not by_hand else f"{name}:{n}"
            group = _group(i.rest, n_devices)
            one = Collective(kind, runs, group, _sent(kind, i, kind != i.opcode, group))
            # The steps of a split one may run inside a loop that it overlaps with; its start runs as often as it does.
            if key not in found or one.times < found[key].times:
                found[key] = one
    return list(found.values())


def _count(name: str, times: int, program: Program, found: dict[str, int]) -> None:
    """Adds `times` runs of a computation and of what it calls."""
    if name not in program.computations:
        return
    found[name] = found.get(name, 0) + times
    for i in program.computations[name].instructions.values():
        if i.opcode == "while":
            for other in i.called("body"):
                _count(other, times * (program.trips(i) or 1), program, found)
        elif "=%" in i.rest or "computations={" in i.rest:
            for other in i.called(*_CALLS):
                _count(other, times, program, found)


def _sent(kind: str, i: Instruction, started: bool, group: int) -> float:
    sizes = [a.bytes for a in i.arrays] or [0.0]
    # All-reduces, and all-to-alls on CPUs, write several arrays; what has started names what it reads, too.
    size = sum(sizes) if kind == "all-reduce" or (kind == "all-to-all" and not started) else max(sizes)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":  # its result is a part of what is reduced
        size *= group
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _group(line: str, n_devices: int) -> int:
    """Devices in one group, from any of the three ways in which the text writes groups."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(name, 1)) for name in re.findall(r"'([^']+)'", mesh[2])) or 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed[1].split(",")) if listed and listed[1] else n_devices
