"""What the kernels share: chips and their block sizes, how an implementation is chosen, and the cases of a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

NEG = -1e30  # finite stand-in for -inf, the same as `lm.attention.branches.NEG`
MIB = 2**20

# "tpu": Mosaic TPU. "interpret": the TPU kernel interpreted, slowly. "gpu": see each gpu.py. "xla": the reference.
IMPLEMENTATIONS = ("tpu", "gpu", "interpret", "xla")


@dataclass(frozen=True)
class Chip:
    """A TPU generation: a topology that ahead-of-time compilation knows, and the fast memory a program may ask for.

    `vmem`: bytes a kernel may use (`vmem_limit_bytes`), below what the chip has because XLA keeps some of it. The chip
    is always an argument, never looked up: a program may be compiled for a chip that is not there.
    """

    topology: str
    vmem: int


CHIPS = {
    "v4": Chip("v4:2x2x1", 16 * MIB),
    "v5e": Chip("v5e:2x2", 64 * MIB),
    "v5p": Chip("v5p:2x2x1", 64 * MIB),
    "v6e": Chip("v6e:2x2", 64 * MIB),
}

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}


def chip(device: jax.Device) -> str | None:
    """The name in `CHIPS` of a device that is there, None if it has none; for callers, never for kernels."""
    return KINDS.get(device.device_kind) if device.platform == "tpu" else None


# kernel -> chip -> block sizes by name; "default" serves chips without a row. Sizes a caller gives win.
BLOCKS: dict[str, dict[str, dict[str, int]]] = {
    "flash": {
        "default": {"block_q": 512, "block_k": 512},
        "v5e": {"block_q": 512, "block_k": 1024},
        "v5p": {"block_q": 512, "block_k": 1024},
        "v6e": {"block_q": 512, "block_k": 1024},
    },
}


def blocks(kernel: str, chip: str | None = None, **given: int | None) -> dict[str, int]:
    """Block sizes of `kernel` on `chip`; those `given` that are not None win. `KeyError` for an unknown size."""
    rows = BLOCKS[kernel]
    out = dict(rows.get(chip or "default", rows["default"]))
    for name, value in given.items():
        own = out[name]
        out[name] = own if value is None else value
    return out


def pick(implementation: str | None, platform: str | None = None) -> str:
    """`implementation`, or by platform: Mosaic on a TPU, gpu.py on a GPU, XLA elsewhere. `ValueError` if unknown."""
    if implementation is None:
        platform = platform or jax.default_backend()
        return {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}.get(platform, "xla")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: found {implementation!r}; valid: {', '.join(IMPLEMENTATIONS)}")
    return implementation


def interpret(implementation: str, given: Any = None) -> Any:
    """The argument `interpret` of `pallas_call`; `given` (a bool or `pltpu.InterpretParams`) wins."""
    return given if given is not None else implementation == "interpret"


def strict() -> pltpu.InterpretParams:
    """The TPU interpreter that looks for races (on two cores), reads outside a buffer and memory nobody wrote (NaN)."""
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
    )


def normal(rng: np.random.Generator, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Standard normal arrays of the given shapes and dtypes."""
    return tuple(jax.numpy.asarray(rng.standard_normal(x.shape), x.dtype) for x in shapes)


@dataclass(frozen=True)
class Case:
    """One line of a check: `fn` of arrays shaped like `args`.

    `tile_bytes`: fast memory of one grid step (blocks in flight, scratch, intermediate tiles), an estimate. Small cases
    also have `reference`, which `fn` must equal to `tolerance` (RMS ratio over every output), on what `draw` returns.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    tile_bytes: int = 0
    reference: Callable[..., Any] | None = None
    tolerance: float = 1e-5
    draw: Callable[[np.random.Generator, tuple[Any, ...]], tuple[Any, ...]] = field(default=normal)
