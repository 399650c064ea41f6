"""``python -m kernels_pallas.int4_matmul.bench``: the kernel, XLA on the same packed weights, and bfloat16 weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import timing
from kernels_pallas.int4_matmul.api import CASES, int4_matmul
from kernels_pallas.int4_matmul.reference import Quantized, dequantize, quantize

SMALL = ((1, 256, 512), (8, 512, 256))


def _inputs(M: int, K: int, N: int, bits: int, group: int, symmetric: bool) -> tuple[jax.Array, Quantized]:
    x = jax.random.normal(jax.random.key(0), (M, K), jnp.bfloat16)
    weights = quantize(jax.random.normal(jax.random.key(1), (K, N)), bits, group, symmetric)
    zeros = None if weights.zeros_GN is None else weights.zeros_GN.astype(jnp.bfloat16)
    return x, Quantized(weights.packed_RN, weights.scales_GN.astype(jnp.bfloat16), zeros)


def _row(name: str, x: jax.Array, weights: Quantized, chip: str | None, repeats: int) -> dict[str, Any]:
    w = dequantize(weights, x.shape[1]).astype(x.dtype)
    names = ("xla", "tpu") if timing.on_tpu() else ("xla",)
    forms = {n: functools.partial(jax.jit(functools.partial(int4_matmul, implementation=n, chip=chip)), x, weights)
             for n in names}  # fmt: skip
    forms = {"bfloat16": functools.partial(jax.jit(jnp.matmul), x, w), **forms}
    return {"case": name, "seconds": timing.seconds(forms, repeats)}


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    options = timing.parser("int4_matmul").parse_args(argv)
    rows = []
    if options.size == "small":
        for M, K, N in SMALL:
            rows.append(_row(f"int4g128-{M}x{K}x{N}", *_inputs(M, K, N, 4, 128, True), options.chip, options.repeats))
    else:
        for case in CASES:
            x, weights = case.arguments
            (M, K), (G, N) = x.shape, weights.scales_GN.shape
            bits = 8 * weights.packed_RN.shape[0] // K
            arrays = _inputs(M, K, N, bits, K // G, weights.zeros_GN is None)
            rows.append(_row(case.name, *arrays, options.chip, options.repeats))
    timing.report("int4_matmul", rows, "bfloat16", options.json)


if __name__ == "__main__":
    main()
