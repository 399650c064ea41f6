"""What `kernels_pallas.check` compiles and runs of `int4_matmul`; as a program, times.

``python -m kernels_pallas.int4_matmul.bench``: XLA on the same packed weights, and the TPU kernel where there is a TPU,
against a product with bfloat16 weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import timing
from kernels_pallas.common import Case
from kernels_pallas.int4_matmul import tpu
from kernels_pallas.int4_matmul.api import NAME, int4_matmul
from kernels_pallas.int4_matmul.reference import Quantized, dequantize, quantize, shape

# M, K, N, bits, group, zero points: the matrices of a 7B Llama at decode, at verification of a draft, in a prompt.
Size = tuple[int, int, int, int, int, bool]
REAL: tuple[Size, ...] = (
    *((M, K, N, 4, 128, False) for K, N in ((4096, 11008), (11008, 4096), (4096, 4096)) for M in (1, 8, 64)),
    (2048, 4096, 11008, 4, 128, False),
    *((8, 4096, 4096, 4, group, True) for group in (32, 64, 128, 256)),
    (8, 4096, 11008, 8, 32, False),
    (8, 4096, 11008, 8, 128, True),
)
FEED = (4096, 11008, 4, 128, False)
SMALL: tuple[Size, ...] = ((1, 256, 512, 4, 128, False), (8, 512, 256, 4, 64, True), (20, 288, 200, 8, 32, False))


def gradients(x: jax.Array, weights: Quantized, **static: Any) -> tuple[jax.Array, jax.Array]:
    """The product, and the gradient of its sum to `x`."""
    out, pull = jax.vjp(lambda x: int4_matmul(x, weights, **static), x)
    return out, pull(jnp.ones_like(out))[0]


def _name(size: Size) -> str:
    M, K, N, bits, group, zeros = size
    return f"int{bits}g{group}{'z' if zeros else ''} {M}x{K}x{N}"


def _shapes(size: Size, dtype: Any = jnp.bfloat16) -> tuple[Any, Quantized]:
    M, K, N, bits, group, zeros = size
    array: Any = jax.ShapeDtypeStruct
    scales = array((K // group, N), jnp.bfloat16)
    return array((M, K), dtype), Quantized(array((K * bits // 8, N), jnp.int8), scales, scales if zeros else None)


def _draw(rng: np.random.Generator, shapes: tuple[Any, Quantized]) -> tuple[jax.Array, Quantized]:
    """Normal activations, and normal weights quantised."""
    x, packed = shapes
    K, N = x.shape[1], packed.scales_GN.shape[1]
    bits, group = shape(packed, K)
    weights = quantize(jnp.asarray(rng.standard_normal((K, N)), jnp.float32), bits, group, packed.zeros_GN is None)
    return jnp.asarray(rng.standard_normal(x.shape), x.dtype), jax.tree.map(
        lambda a, like: a.astype(like.dtype), weights, packed
    )


def cases(chip: str) -> list[Case]:
    """Real sizes for `chip`, to be compiled; the gradient is the same kernel and a product of XLA."""

    def case(size: Size, fn: Any, kind: str) -> Case:
        x, weights = _shapes(size)
        tiles = tpu.choose_tiles(x, weights, chip)
        assert tiles is not None
        memory = tpu.memory(size[1], tiles, *size[3:5], x.dtype, size[5])
        run = functools.partial(fn, implementation="tpu", chip=chip)
        return Case(f"{_name(size)} {kind}", run, (x, weights), memory, draw=_draw)

    forward = [case(size, int4_matmul, "forward") for size in REAL]
    return forward + [case(size, gradients, "backward") for size in REAL if size in ((64, *FEED), (2048, *FEED))]


def small_cases() -> list[Case]:
    """Sizes an interpreter can run, with the reference they must equal."""
    out = []
    for size in SMALL:
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
            fn, kind = (gradients, "backward") if size is SMALL[1] else (int4_matmul, "forward")
            run, truth = (functools.partial(fn, implementation=name) for name in ("interpret", "reference"))
            run = functools.partial(run, tiles=tpu.Tiles(16, 128))
            name = f"{_name(size)} {dtype.__name__} {kind}"
            out.append(Case(name, run, _shapes(size, dtype), 0, truth, tolerance, _draw))
    return out


def gpu_cases() -> list[Case]:
    """What a GPU runs: XLA operations."""
    kinds: dict[str, Callable[..., Any]] = {"forward": int4_matmul, "backward": gradients}
    return [
        Case(f"{_name(size)} {kind}", functools.partial(fn, implementation="xla"), _shapes(size), draw=_draw)
        for size in REAL
        if size in ((8, *FEED), (2048, *FEED))
        for kind, fn in kinds.items()
    ]


def _forms(small: bool, chip: str | None) -> Iterator[tuple[str, timing.Forms]]:
    for size in SMALL if small else REAL:
        x, weights = _draw(np.random.default_rng(0), _shapes(size))
        w = dequantize(weights, size[1]).astype(x.dtype)
        forms: dict[str, Any] = {"bfloat16": functools.partial(jax.jit(jnp.matmul), x, w)}
        for name in timing.names():
            forms[name] = functools.partial(
                jax.jit(functools.partial(int4_matmul, implementation=name, chip=chip)), x, weights
            )
        yield _name(size), forms


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    timing.main(NAME, "bfloat16", _forms, argv)


if __name__ == "__main__":
    main()
