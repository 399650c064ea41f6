"""Collectives of a compiled program, read off its text: kinds, how often they run, bytes through a chip's links."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lm.aot.program import Program, read

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_CALLS = ("calls", "to_apply", "true_computation", "false_computation", "async_execution_thread", "branch_computations")
# What crosses from slice to slice leaves through the host: a send that names what the slices do together.
_BETWEEN = re.compile(r'_xla_megascale_target="\{(?P<slices>[\d,:]*)\}.*_type="(?P<kind>\w+)"')
BETWEEN = "dcn-"
_BY_HAND = re.compile(r'op_name="[^"]*/(ppermute|all_to_all|ragged_all_to_all|all_gather|psum\w*|reduce_scatter)"')


@dataclass(frozen=True)
class Collective:
    """`times`: runs per program, loops counted. `group`: chips that take part. `sent`: bytes that leave a chip each
    time, by a ring: ``(n - 1) / n`` of the whole array for all-gather, reduce-scatter and all-to-all, twice that for
    all-reduce, the array for a permute. A kind that starts with `BETWEEN` runs between slices, `group` of them; a fused
    sum of which a chip keeps its part is a reduce-scatter."""

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
            between = _BETWEEN.search(i.rest) if i.opcode == "send" else None
            if between is not None:
                kind, group = between["kind"].lower().replace("_", "-"), _many(between["slices"])
                sent = _sent(kind, [i.arrays[0].bytes], False, group)
                found[kind, f"{name}:{n}"] = Collective(BETWEEN + kind, runs, group, sent)
                continue
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", i.rest)
            by_hand = _BY_HAND.search(i.rest) is not None
            key = kind, channel[1] if channel and not by_hand else f"{name}:{n}"
            group = _group(i.rest, n_devices)
            sent = _sent(kind, [a.bytes for a in i.arrays] or [0.0], kind != i.opcode, group)
            one = Collective(kind, runs, group, sent)
            if name.startswith("all-reduce-scatter") and kind == "all-reduce":
                one = Collective("reduce-scatter", runs, group, sent / 2)
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


def _sent(kind: str, sizes: list[float], started: bool, group: int) -> float:
    # All-reduces, and all-to-alls on CPUs, write several arrays; what has started names what it reads, too.
    size = sum(sizes) if kind == "all-reduce" or (kind == "all-to-all" and not started) else max(sizes)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":  # its result is a part of what is reduced
        size *= group
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _many(listed: str) -> int:
    """Numbers in ``1,2`` or ``1:4``."""
    ranges = (part.split(":") for part in listed.split(","))
    return sum(int(r[-1]) - int(r[0]) + 1 for r in ranges)


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
