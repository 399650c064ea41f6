"""``python -m kernels_pallas.check --platform tpu|gpu|interpret``; ``--help`` says what else.

``tpu`` compiles every kernel at real sizes ahead of time for every chip of `kernels_pallas.common.CHIPS`, without a TPU
(the extra ``aot`` has the compiler); ``gpu`` lowers for CUDA, or compiles and times where there is a GPU; ``interpret``
runs small sizes and compares them with the reference. Prints one line per case and exits with code 1 if any fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform as platform_module
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kernels_pallas.common import CHIPS, MIB, Case

# Each has a `bench` with `cases(chip)`, `small_cases()` and `gpu_cases()`.
KERNELS = ("flash", "branches", "block_table", "int4_matmul", "lightning", "tree_decode")
# Ordinary arrays live on the CPU; libtpu serves as a compiler, and other processes may load it as well.
COMPILER_ALONE = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
WIDTHS = (12, 36, 4, 27, 8, 8)
HEAD = ("kernel", "case", "chip", "result", "tile MiB", "seconds")


def compile_for(case: Case, chip: str) -> str:
    """Compiled by the real compiler of `chip`; memory of the program as it reports it."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), case.args)
    program = jax.jit(case.fn).lower(*args).compile()
    memory = program.memory_analysis()
    return "compiled" if memory is None else f"compiled, {memory.temp_size_in_bytes / MIB:.0f} MiB HBM temp"


def lower_for_gpu(case: Case) -> str:
    """Lowered for CUDA; compiled and run where there is a GPU."""
    if jax.default_backend() == "gpu":
        rng = np.random.default_rng(0)
        args = case.draw(rng, case.args)
        run = jax.jit(case.fn)
        jax.block_until_ready(run(*args))
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        return f"ran in {1e3 * (time.perf_counter() - start):.2f} ms"
    jax.jit(case.fn).trace(*case.args).lower(lowering_platforms=("cuda",))
    return "lowered"


def rms_ratio(got: object, want: object) -> float:
    """Root mean square of the error over that of `want`, over all arrays; NaN counts as infinite."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    a, b = (np.concatenate([np.asarray(p[i], np.float64).ravel() for p in pairs]) for i in (0, 1))
    ratio = float(np.sqrt(((a - b) ** 2).mean() / max((b**2).mean(), 1e-300)))
    return ratio if ratio == ratio else float("inf")


def run_small(case: Case) -> str:
    """Interpreted, against the reference."""
    assert case.reference is not None
    args = case.draw(np.random.default_rng(0), case.args)
    error = rms_ratio(jax.jit(case.fn)(*args), jax.jit(case.reference)(*args))
    if not error <= case.tolerance:
        raise AssertionError(f"RMS ratio {error:.1e}, at most {case.tolerance:.0e} allowed")
    return f"equal, RMS ratio {error:.1e}"


def _work(
    platform: str, kernels: tuple[str, ...], chips: tuple[str, ...]
) -> Iterator[tuple[str, str, Case, Callable[[], str]]]:
    for kernel in kernels:
        bench = importlib.import_module(f"kernels_pallas.{kernel}.bench")
        if platform == "interpret":
            for case in bench.small_cases():
                yield kernel, "-", case, functools.partial(run_small, case)
        elif platform == "gpu":
            for case in bench.gpu_cases():
                yield kernel, "-", case, functools.partial(lower_for_gpu, case)
        else:
            for chip in chips:
                for case in bench.cases(chip):
                    yield kernel, chip, case, functools.partial(compile_for, case, chip)


def environment() -> dict[str, str | None]:
    """What the results depend on."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = {name: version(name) for name in ("jax", "jaxlib", "libtpu", "numpy")}
    return {"python": platform_module.python_version(), **packages, "device": jax.devices()[0].device_kind}


def check(
    platform: str,
    kernels: tuple[str, ...] = KERNELS,
    chips: tuple[str, ...] = tuple(CHIPS),
    path: Path | None = None,
    text: str = "",
) -> int:
    """The cases whose names contain `text`: prints the table, writes it to `path` as JSON, returns the failures."""

    def line(*cells: object) -> None:
        print("  ".join(str(c).ljust(w) for c, w in zip(cells, WIDTHS, strict=True)).rstrip(), flush=True)

    line(*HEAD)
    failures = 0
    rows: list[dict[str, Any]] = []
    for kernel, chip, case, work in _work(platform, kernels, chips):
        if text not in case.name:
            continue
        start, passed = time.perf_counter(), True
        try:
            result = work()
        except Exception as error:  # a compiler's refusal may be of any type; every case gets its line
            failures, passed = failures + 1, False
            result = "FAILED: " + " ".join(f"{type(error).__name__}: {error}".split())[:300]
        tile, seconds = case.tile_bytes / MIB, time.perf_counter() - start
        line(kernel, case.name, chip, result, f"{tile:.1f}" if tile else "-", f"{seconds:.1f}")
        rows.append(
            {"kernel": kernel, "case": case.name, "chip": chip, "passed": passed, "result": result}
            | {"tile_mib": round(tile, 2), "seconds": round(seconds, 2)}
        )
    print(f"{len(rows) - failures} of {len(rows)} passed")
    if path is not None:
        head = {"check": platform, "schema": 1, "environment": environment(), "passed": len(rows) - failures}
        path.parent.mkdir(parents=True, exist_ok=True)
        body = ",\n".join("  " + json.dumps(row) for row in rows)  # a line per case, to be compared by a diff
        path.write_text(json.dumps(head | {"cases": len(rows)}, indent=1)[:-2] + f',\n "rows": [\n{body}\n ]\n}}\n')
    return failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.check", description=__doc__)
    parser.add_argument("--platform", choices=("tpu", "gpu", "interpret"), required=True)
    parser.add_argument("--kernel", choices=KERNELS, help="one kernel instead of all")
    parser.add_argument("--chip", choices=tuple(CHIPS), help="one TPU generation instead of all")
    parser.add_argument("--case", default="", help="only the cases whose names contain this")
    parser.add_argument("--json", type=Path, help="file to write the table to, with the versions it depends on")
    args = parser.parse_args(argv)
    if args.platform == "interpret":
        os.environ.setdefault("NPROC", "16")  # XLA's threads: the warpgroups of an interpreted GPU kernel wait in them
    if args.platform == "tpu":
        for name, value in COMPILER_ALONE.items():
            os.environ.setdefault(name, value)
        if importlib.util.find_spec("libtpu") is None:
            print(
                "error: --platform tpu: libtpu is not installed; valid: pip install 'decoder-lab[aot]'", file=sys.stderr
            )
            return 2
    kernels = (args.kernel,) if args.kernel else KERNELS
    chips = (args.chip,) if args.chip else tuple(CHIPS)
    return 1 if check(args.platform, kernels, chips, args.json, args.case) else 0


if __name__ == "__main__":
    sys.exit(main())
