"""Timing for ``python -m kernels_pallas.<kernel>.bench``: forms of one computation, interleaved in one process."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.common import CHIPS, GPUS, chip

Forms = Mapping[str, Callable[[], Any]]


def main(
    kernel: str,
    base: str,
    forms: Callable[[bool, str | None], Iterable[tuple[str, Forms]]],
    argv: Sequence[str] | None = None,
) -> None:
    """Times the cases of ``forms(small, chip)``: names, and forms with `base` among them. Prints, and writes JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m kernels_pallas.{kernel}.bench")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each form (default 20)")
    parser.add_argument("--size", choices=("real", "small"), default="real", help="small: seconds on a CPU")
    parser.add_argument("--chip", choices=(*CHIPS, *GPUS), help="block sizes of the kernel (default: the chip here)")
    options = parser.parse_args(argv)
    rows = []
    for name, calls in forms(options.size == "small", options.chip or chip(jax.devices()[0])):
        rows.append({"case": name, "seconds": seconds(calls, options.repeats)})
    report(kernel, rows, base, options.json)


def names() -> tuple[str, ...]:
    """Implementations that can be timed here: XLA operations, and the kernel where there is a chip that it is for."""
    here = chip(jax.devices()[0])
    return ("xla", *(["tpu"] if here in CHIPS else ["gpu"] if here in GPUS else []))


def seconds(forms: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each form. The forms take turns, so that a slow minute of the machine meets all of them."""
    for form in forms.values():
        jax.block_until_ready(form())  # compiles
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(max(1, repeats)):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def report(kernel: str, rows: Sequence[Mapping[str, Any]], base: str, path: Path | None) -> None:
    """Prints a row per case, and writes JSON.

    A cell is the milliseconds of a form, and the time of `base` over its own: above 1 the form is faster. Where `base`
    was not run, the first form takes its place.
    """
    device = jax.devices()[0].device_kind
    forms = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    print(f"{kernel} on {device} (jax {jax.__version__}); in brackets: times faster than {base}")
    print(f"{'case':28s}" + "".join(f"{name:>24s}" for name in forms))
    for row in rows:
        cells, against = [], row["seconds"][base if base in row["seconds"] else next(iter(row["seconds"]))]
        for name in forms:
            if name in row["seconds"]:
                found = row["seconds"][name]
                cells.append(f"{found * 1e3:12.3f} ms ({against / found:5.2f})")
            else:
                cells.append("-")
        print(f"{row['case']:28s}" + "".join(f"{cell:>24s}" for cell in cells))
    if path is not None:
        table = {"kernel": kernel, "device": device, "jax": jax.__version__, "base": base, "rows": list(rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
