"""Times every kernel on the accelerator that is here, against libraries and XLA, and says which goals are met.

``python -m kernels_pallas.bench [--kernel=NAME] [--json=FILE] [--repeats=20] [--size=real|small]``

One table per kernel, forms of one computation taking turns in one process, and the goals of `GOALS` with what was
measured. Without an accelerator, or where a form was not run, a goal is said to be not measured. The exit code is 1 if
a kernel could not be run. ``--size=small`` tries the program in seconds on a CPU; it measures nothing of interest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels_pallas.check import KERNELS, environment


@dataclass(frozen=True)
class Goal:
    """The seconds of form `peer` over those of `form` are at least `least`. `peer_case`: where the peer computes
    another case."""

    text: str
    kernel: str
    case: str
    form: str
    peer: str
    least: float
    peer_case: str | None = None

    def verdict(self, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What was measured, and whether it is enough; None for both where it was not measured."""
        rows = {row["case"]: row["seconds"] for row in tables.get(self.kernel, {}).get("rows", ())}
        own = rows.get(self.case, {}).get(self.form)
        other = rows.get(self.peer_case or self.case, {}).get(self.peer)
        ratio = None if own is None or other is None else other / own
        return {"goal": self.text, "measured": ratio, "met": None if ratio is None else ratio >= self.least}


GOALS = (
    Goal("causal 8k forward >= 0.9x cuDNN", "flash", "causal 8192 forward", "gpu", "cudnn", 0.9),
    Goal("causal 8k backward >= 0.9x cuDNN", "flash", "causal 8192 backward", "gpu", "cudnn", 0.9),
    Goal(
        "window + sinks 32k forward >= 5x cuDNN causal",
        "flash",
        "window + sinks 32768 forward",
        "gpu",
        "cudnn",
        5.0,
        "causal 32768 forward",
    ),
    Goal("int4 at batch 1 >= 2.5x bfloat16", "int4_matmul", "int4g128 1x4096x11008 x16", "gpu", "bfloat16", 2.5),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", choices=KERNELS, help="one kernel instead of all")
    parser.add_argument("--json", type=Path, help="file to write all tables to, with the versions they depend on")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each form (default 20)")
    parser.add_argument("--size", choices=("real", "small"), default="real")
    options = parser.parse_args(argv)
    tables: dict[str, Any] = {}
    failures = {}
    for kernel in (options.kernel,) if options.kernel else KERNELS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "table.json"
            passed_on = ["--json", str(file), "--repeats", str(options.repeats), "--size", options.size]
            try:
                importlib.import_module(f"kernels_pallas.{kernel}.bench").main(passed_on)
                tables[kernel] = json.loads(file.read_text(encoding="utf-8"))
            except Exception as error:  # one kernel that fails must not keep the others from being measured
                failures[kernel] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                print(f"{kernel}: FAILED: {failures[kernel]}", file=sys.stderr)
        print()
    verdicts = [goal.verdict(tables) for goal in GOALS if goal.kernel in tables]
    for one in verdicts:
        said = {True: "MET", False: "MISSED", None: "NOT MEASURED"}[one["met"]]
        print(f"{said}  {one['goal']}" + ("" if one["measured"] is None else f": {one['measured']:.2f}x"))
    if options.json is not None:
        content = {
            "schema": 1,
            "environment": environment(),
            "goals": verdicts,
            "failures": failures,
            "kernels": tables,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
