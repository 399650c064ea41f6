"""What `kernels_pallas.check` compiles and runs of `int4_matmul`; as a program, times.

``python -m kernels_pallas.int4_matmul.bench``: XLA on the same packed weights, and the kernel where there is a TPU or a
Hopper GPU, against a product with bfloat16 weights. On a GPU a call may take less than its launch from Python: there
one program makes `CALLS` of them, each with weights of its own (a cache would hold one matrix), and is timed whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernels_pallas import timing
from kernels_pallas.common import AUTO, Case, How, sized
from kernels_pallas.int4_matmul import gpu, tpu
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
# Of a GPU: batch 1, 8, 64 and 512.
GPU: tuple[Size, ...] = tuple(
    (M, K, N, 4, 128, False) for K, N in ((4096, 4096), (4096, 11008), (11008, 4096)) for M in (1, 8, 64, 512)
)
CALLS = 16
FEED = (4096, 11008, 4, 128, False)
SMALL: tuple[Size, ...] = ((1, 256, 512, 4, 128, False), (8, 512, 256, 4, 64, True), (20, 288, 200, 8, 32, False))


def gradients(x: jax.Array, weights: Quantized, how: How = AUTO) -> tuple[jax.Array, jax.Array]:
    """The product, and the gradient of its sum to `x`."""
    out, pull = jax.vjp(lambda x: int4_matmul(x, weights, how), x)
    return out, pull(jnp.ones_like(out))[0]


def _name(size: Size) -> str:
    M, K, N, bits, group, zeros = size
    return f"int{bits}g{group}{'z' if zeros else ''} {M}x{K}x{N}"


def _shapes(size: Size, dtype: DTypeLike = jnp.bfloat16) -> tuple[Any, Quantized]:
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

    def case(size: Size, fn: Callable[..., Any], kind: str) -> Case:
        x, weights = _shapes(size)
        tiles = tpu.choose_tiles(x, weights, chip)
        assert tiles is not None
        memory = tpu.memory(size[1], tiles, *size[3:5], x.dtype, size[5])
        run = functools.partial(fn, how=How("tpu", chip))
        return Case(f"{_name(size)} {kind}", run, (x, weights), memory, draw=_draw)

    forward = [case(size, int4_matmul, "forward") for size in REAL]
    return forward + [case(size, gradients, "backward") for size in REAL if size in ((64, *FEED), (2048, *FEED))]


def small_cases() -> list[Case]:
    """Sizes an interpreter can run, with the reference they must equal."""
    out = []
    for size in SMALL:
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
            fn, kind = (gradients, "backward") if size is SMALL[1] else (int4_matmul, "forward")
            truth = functools.partial(fn, how=How("reference"))
            run = functools.partial(fn, how=How("interpret", sizes=sized(tile_m=16, tile_n=128)))
            name = f"{_name(size)} {dtype.__name__}"
            out.append(Case(f"{name} {kind}", run, _shapes(size, dtype), 0, truth, tolerance, _draw))
            if dtype == jnp.bfloat16 and size[2] % 64 == 0:
                run = functools.partial(fn, how=How("interpret_gpu", "h100"))
                out.append(Case(f"{name} gpu {kind}", run, _shapes(size, dtype), 0, truth, tolerance, _draw))
    return out


def gpu_cases() -> list[Case]:
    """What a GPU runs: the kernel, forward at real sizes and once backward, and XLA operations."""

    def case(size: Size, implementation: str, fn: Callable[..., Any], kind: str) -> Case:
        x, weights = _shapes(size)
        cut = gpu.plan(x, weights)
        tile = gpu.memory(cut, *size[3:5], weights.scales_GN.dtype, size[5]) if implementation == "gpu" else 0
        run = functools.partial(fn, how=How(implementation, "h100"))
        return Case(f"{_name(size)} {implementation} {kind}", run, (x, weights), tile, draw=_draw)

    more = [size for size in REAL if size[0] == 8 and size[5]]  # groups of 32 to 256, zero points, 8 bits
    sizes = [size for size in GPU if size[1:] == FEED or size[0] in (1, 512)]
    return [
        *(case(size, "gpu", int4_matmul, "forward") for size in (*sizes, *more)),
        case((512, *FEED), "gpu", gradients, "backward"),
        *(case((8, *FEED), "xla", fn, kind) for fn, kind in ((int4_matmul, "forward"), (gradients, "backward"))),
    ]


def _chain(fn: Callable[..., jax.Array], x: jax.Array, weights: Sequence[Any]) -> jax.Array:
    """`fn` of `x` and each of the weights, one call after the other."""
    for w in weights:
        y = fn(x, w)
        x = x + (0 * y[:, :1]).astype(x.dtype)  # not 0 for all the compiler knows
    return y


def _forms(small: bool, chip: str | None) -> Iterator[tuple[str, timing.Forms]]:
    on_gpu = jax.default_backend() == "gpu"
    names, calls = timing.names(), CALLS if on_gpu else 1
    for size in SMALL if small else GPU if on_gpu else REAL:
        rng = np.random.default_rng(0)
        x, first = _draw(rng, _shapes(size))
        weights = [first, *(jax.tree.map(jnp.copy, first) for _ in range(calls - 1))]
        w = dequantize(first, size[1]).astype(x.dtype)
        plain = [w, *(jnp.copy(w) for _ in range(calls - 1))]
        forms: dict[str, Any] = {
            "bfloat16": functools.partial(jax.jit(functools.partial(_chain, jnp.matmul)), x, plain)
        }
        for name in names:
            call = functools.partial(int4_matmul, how=How(name, chip))
            if name == "gpu" and gpu.refusal(x, first):
                continue
            forms[name] = functools.partial(jax.jit(functools.partial(_chain, call)), x, weights)
        yield _name(size) + (f" x{calls}" if calls > 1 else ""), forms


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    timing.main(NAME, "bfloat16", _forms, argv)


if __name__ == "__main__":
    main()
