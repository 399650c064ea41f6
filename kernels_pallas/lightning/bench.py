"""``python -m kernels_pallas.lightning.bench``: the kernel and the chunked form in XLA operations, also in training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import timing
from kernels_pallas.common import Case
from kernels_pallas.lightning.api import CASES, gradients, lightning


def _small(T: int, train: bool) -> Case:
    array: Any = jax.ShapeDtypeStruct
    x = array((1, T, 2, 16), jnp.float32)
    arguments = (x, x, x, array((2,), jnp.float32), array((1, 2, 16, 16), jnp.float32))
    return Case(f"{'train' if train else 'forward'}-{T}x2x16", gradients if train else lightning, arguments, 0)


def _row(case: Case, chip: str | None, repeats: int) -> dict[str, Any]:
    q, _, _, decay, state = case.arguments
    arrays = [jax.random.normal(key, q.shape, q.dtype) / 8 for key in jax.random.split(jax.random.key(0), 3)]
    arrays += [jnp.exp(-jnp.exp2(-jnp.arange(1.0, 1 + decay.shape[0]) / 4)), jnp.zeros(state.shape, state.dtype)]
    forms = {}
    for name in ("xla", "tpu") if timing.on_tpu() else ("xla",):
        form = functools.partial(case.function, implementation=name, chip=chip)
        forms[name] = functools.partial(jax.jit(form), *arrays)
    return {"case": case.name, "seconds": timing.seconds(forms, repeats)}


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    options = timing.parser("lightning").parse_args(argv)
    cases = CASES if options.size == "real" else (_small(100, False), _small(100, True))
    rows = [_row(case, options.chip, options.repeats) for case in cases]
    timing.report("lightning", rows, "xla", options.json)


if __name__ == "__main__":
    main()
