"""Collectives of a compiled program, read off its text: kinds, how often they run, bytes through a chip's links."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_OP = re.compile(rf" = (?P<out>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_SHAPE = re.compile(r"\b(pred|[fsuc]\d+\w*|bf16)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation|async_execution_thread)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


# What crosses from slice to slice leaves through the host: a send that names what the slices do together.
_BETWEEN = re.compile(
    r' = \((?P<out>\w+\[[\d,]*\]).*? send\(.*_xla_megascale_target="\{(?P<slices>[\d,:]*)\}.*_type="(?P<kind>\w+)"'
)
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


def collectives(text: str, n_devices: int) -> list[Collective]:
    """Every collective of a compiled program's text (``compiled.as_text()``).

    A collective that the compiler has split into a start, steps and an end is one: they share a channel. Those written
    by hand (`jax.shard_map`) all have the same channel, and each is one. A loop runs as
    often as its text says, or as the constant that its condition compares with; once where it says neither.
    """
    bodies = dict(_computations(text))
    entry = next((name for name in bodies if name.startswith("ENTRY ")), "")
    times: dict[str, int] = {}
    _count(entry, 1, bodies, times)
    found: dict[tuple[str, str], Collective] = {}
    for name, lines in bodies.items():
        for n, line in enumerate(lines):
            if name not in times:
                continue
            between = _BETWEEN.search(line)
            if between is not None:
                kind, group = between["kind"].lower().replace("_", "-"), _many(between["slices"])
                one = Collective(BETWEEN + kind, times[name], group, _sent(kind, between["out"], False, group))
                found[kind, f"{name}:{n}"] = one
                continue
            m = _OP.search(line)
            if m is None:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            by_hand = _BY_HAND.search(line) is not None
            key = m["kind"], channel[1] if channel and not by_hand else f"{name}:{n}"
            group = _group(line, n_devices)
            sent = _sent(m["kind"], m["out"], m["start"] is not None, group)
            one = Collective(m["kind"], times[name], group, sent)
            if name.startswith("all-reduce-scatter") and m["kind"] == "all-reduce":
                one = Collective("reduce-scatter", times[name], group, sent / 2)
            # The steps of a split one may run inside a loop that it overlaps with; its start runs as often as it does.
            if key not in found or one.times < found[key].times:
                found[key] = one
    return list(found.values())


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in text.splitlines():
        opens = re.match(r"^(ENTRY )?%([\w.\-]+) .*\{$", line)
        if opens:
            name, lines = (opens[1] or "") + opens[2], []
        elif line == "}" and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _count(name: str, times: int, bodies: dict[str, list[str]], found: dict[str, int]) -> None:
    """Adds `times` runs of a computation and of what it calls."""
    if name not in bodies:
        return
    found[name] = found.get(name, 0) + times
    for line in bodies[name]:
        loop = re.search(r"condition=%([\w.\-]+)", line)
        n = _trips(line, bodies.get(loop[1], [])) if loop else 1
        called = _CALLS.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"%([\w.\-]+)", branches)
        for other in called:
            _count(other, times * n, bodies, found)


def _trips(line: str, condition: list[str]) -> int:
    said = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if said:
        return int(said[1])
    constants = [int(n) for text in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(constants, default=1)


def _sizes(text: str) -> list[float]:
    """Bytes of every array in a type."""
    sizes = [0.0]
    for kind, shape in _SHAPE.findall(text):
        width = _BYTES.get(kind) or int(re.sub(r"\D.*", "", kind[1:]) or 8) / 8
        sizes.append(width * math.prod(int(n) for n in shape.split(",") if n))
    return sizes


def _sent(kind: str, out: str, started: bool, group: int) -> float:
    sizes = _sizes(out)
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
