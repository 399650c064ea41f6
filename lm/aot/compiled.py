"""A lowered program through the TPU's compiler: the program, what memory it takes, and what takes most of it."""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 8
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*):$")
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)(\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\): ([^{]*)")
_OP_NAME = re.compile(r"^ *(?:ROOT )?%([\w.\-]+) = .*op_name=\"([^\"]*)\"")
_TOTAL = re.compile(r"^Total bytes: (\d+)", re.MULTILINE)
# What jax writes around the names of the model's parts.
_NOISE = re.compile(
    r"jit\([^)]*\)/|while/|body/|closed_call/|(re)?checkpoint/|rematted_computation/|Decoder\._blocks/|"
    r"(transpose\()?jvp\([^)]*\)\)?/|Decoder/|branch_\d+_fun/|cond/"
)


@dataclass(frozen=True)
class Compiled:
    """`text`: the program, optimised. `memory`: bytes of one device, ``arguments``, ``temporaries`` and ``peak``; only
    the last where the program does not fit, and then `refusal` is the compiler's line. `temporaries`: the largest, each
    with bytes, shape, and what it is for."""

    text: str
    memory: dict[str, float]
    temporaries: list[dict[str, Any]]
    seconds: float
    refusal: str | None = None


def compile_for(lowered: Any) -> Compiled:
    """Compiles; a program that exceeds the memory is no error.

    The text is the one that the compiler writes: jaxlib cannot read back every instruction of a TPU's program
    (transfers on a SparseCore), and nothing of one that does not fit.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder, refusal = Path(name), None
        memory: dict[str, float] = {}
        try:
            done = lowered.compile(compiler_options={"xla_dump_to": name, "xla_dump_hlo_as_text": True})
            found = done.memory_analysis()
            memory = {
                "arguments": found.argument_size_in_bytes,
                "temporaries": found.temp_size_in_bytes,
                "peak": found.argument_size_in_bytes
                + found.temp_size_in_bytes
                + found.output_size_in_bytes
                - found.alias_size_in_bytes,
            }
        except Exception as e:
            said = str(e)
            if "RESOURCE_EXHAUSTED" not in said and "hbm" not in said.lower():
                raise
            refusal = next((line.strip() for line in said.splitlines() if line.strip()), "")[:300]
            total = _TOTAL.search(_last(folder, "*memory-usage-report.txt"))
            if total:
                memory = {"peak": float(total[1])}
        text = _last(folder, "*after_optimizations.txt")
        temporaries = largest(_last(folder, "*after_optimizations-buffer-assignment.txt"), text)
        return Compiled(text, memory, temporaries, time.perf_counter() - start, refusal)


def _last(folder: Path, pattern: str) -> str:
    """The longest such file's text; a step compiles small programs beside its own."""
    files = sorted(folder.glob(pattern), key=lambda p: p.stat().st_size)
    return files[-1].read_text(encoding="utf-8", errors="replace") if files else ""


def largest(assignment: str, text: str) -> list[dict[str, Any]]:
    """The largest temporaries in a device's main memory, one for each place there, by the compiler's own list."""
    places: dict[tuple[int, int], tuple[int, str, str]] = {}
    n, main = -1, False
    for line in assignment.splitlines():
        opens = _ALLOCATION.match(line)
        if opens:
            n, main = n + 1, "preallocated-temp" in opens[2] and "color" not in opens[2]
        value = _VALUE.match(line) if main else None
        if value and (n, int(value[4])) not in places:
            places[n, int(value[4])] = (int(value[3]), value[1], value[5].strip())
    rows = sorted(places.values(), reverse=True)[:LARGEST]
    wanted = {name for _, name, _ in rows}
    said: dict[str, str] = {}
    for line in text.splitlines():
        named = _OP_NAME.match(line)
        if named and named[1] in wanted:
            said[named[1]] = kind(named[2])
    return [{"bytes": size, "shape": shape, "kind": said.get(name, name)} for size, name, shape in rows]


def kind(op_name: str) -> str:
    """What an operation is for, in few words: ``backward: Block/attn/q/dot_general``."""
    phase = "backward: " if "transpose(" in op_name else "forward: " if "jvp(" in op_name else ""
    if "rematted_computation" in op_name:
        phase = "recomputed: "
    return phase + re.sub(r"Block_\d+", "Block", _NOISE.sub("", op_name))[-90:]
