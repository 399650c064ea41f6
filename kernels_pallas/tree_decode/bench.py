"""What `kernels_pallas.check` compiles and runs of `tree_decode`; as a program, times.

``python -m kernels_pallas.tree_decode.bench``: the running softmax over chunks in XLA operations, and the kernel where
there is a TPU or a Hopper GPU, against one softmax over everything in float32. On a GPU against the XLA operations, for
that softmax would not fit; beside cuDNN over the same keys, all of them, without the tree's mask or lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernels_pallas import timing
from kernels_pallas.common import Case, How, sized
from kernels_pallas.tree_decode import gpu, tpu
from kernels_pallas.tree_decode.api import NAME, tree_decode
from kernels_pallas.tree_decode.masks import ancestors_of, pack_mask
from kernels_pallas.tree_decode.problem import Problem


@dataclass(frozen=True)
class Size:
    """B rows, N nodes, S slots of the cache, H query heads, K key heads, head width d; `packed`: ancestors as bits."""

    N: int
    S: int
    B: int = 1
    H: int = 32
    K: int = 8
    d: int = 128
    dtype: DTypeLike = jnp.bfloat16
    packed: bool = False

    def __str__(self) -> str:
        kind = "" if self.dtype == jnp.bfloat16 else " float32"
        return f"{self.N}n {self.S} {self.B}x{self.H}:{self.K}x{self.d}{kind}{' bits' if self.packed else ''}"


REAL = (
    *(Size(64, S, K=K) for S in (32768, 131072) for K in (8, 32)),
    *(Size(N, 32768) for N in (1, 8, 16, 256)),
    Size(64, 32768, B=8, packed=True),
    Size(64, 32000),  # the last tile is not full
    *(Size(64, 8192, H=16, K=16, d=d) for d in (64, 96, 256)),
    Size(64, 8192, dtype=jnp.float32),
)
# Of a GPU: trees of 16, 64 and 256 nodes.
GPU = tuple(Size(N, S, B) for S in (32768, 131072) for B in (1, 8) for N in (16, 64, 256))
SMALL = (
    Size(8, 200, 2, 4, 2, 64, jnp.float32),
    Size(40, 256, 2, 2, 2, 96, jnp.float32, packed=True),
    Size(64, 300, 2, 4, 1, 128, jnp.bfloat16),
)


def tree(rng: np.random.Generator, N: int) -> jax.Array:
    """Ancestors bool [N, N] of a tree drawn at random: a parent is any earlier node, now and then a new root."""
    return ancestors_of(jnp.asarray([int(rng.integers(-1, i)) if i else -1 for i in range(N)], jnp.int32))


def shapes(size: Size) -> tuple[Any, ...]:
    """Shapes of the arguments of `tree_decode`."""
    array: Any = jax.ShapeDtypeStruct
    B, N, K, d = size.B, size.N, size.K, size.d
    cache, new = array((B, K, size.S, d), size.dtype), array((B, N, K, d), size.dtype)
    seen = array((N, -(-N // 32)), jnp.uint32) if size.packed else array((N, N), jnp.bool_)
    return array((B, N, size.H, d), size.dtype), cache, cache, Problem(array((B,), jnp.int32), new, new, seen)


def draw(rng: np.random.Generator, like: tuple[Any, ...]) -> tuple[Any, ...]:
    """Normal values; the first row's cache is full, every other row's shorter by a random length; one tree."""
    q, k, v, problem = like
    given = (q, k, v, problem.new_k, problem.new_v)
    *cached, new_k, new_v = (jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in given)
    full = k.shape[2]
    valid = jnp.asarray([full, *rng.integers(0, full, q.shape[0] - 1)], jnp.int32)
    mask = tree(rng, q.shape[1])
    packed = problem.ancestors.dtype == jnp.uint32
    return *cached, Problem(valid, new_k, new_v, pack_mask(mask) if packed else mask)


def cases(chip: str) -> list[Case]:
    """Real sizes for `chip`, to be compiled. Inference: there is no backward."""
    out = []
    for size in REAL:
        rows = tpu.padded(size.N) * size.H // size.K
        tile = tpu.choose_tile(size.S, rows, chip)
        memory = tpu.memory(tile, rows, tpu.padded(size.N), size.d, size.dtype)
        run = functools.partial(tree_decode, how=How("tpu", chip))
        out.append(Case(str(size), run, shapes(size), memory, draw=draw))
    return out


def small_cases() -> list[Case]:
    """Sizes an interpreter can run, with the reference they must equal."""
    truth = functools.partial(tree_decode, how=How("reference"))
    out = []
    for size in SMALL:
        tolerance = 1e-5 if size.dtype == jnp.float32 else 1e-2
        run = functools.partial(tree_decode, how=How("interpret", sizes=sized(tile_s=128)))
        out.append(Case(str(size), run, shapes(size), 0, truth, tolerance, draw))
        if size.dtype == jnp.bfloat16:
            whole = replace(size, S=size.S // 8 * 8)
            run = functools.partial(tree_decode, how=How("interpret_gpu", "h100"))
            out.append(Case(f"{whole} gpu", run, shapes(whole), 0, truth, tolerance, draw))
    return out


def gpu_cases() -> list[Case]:
    """What a GPU runs: the kernel, and XLA operations in chunks."""
    sizes = [size for size in GPU if size.B == 1 or size.N == 64]
    more = [Size(1, 32768), Size(64, 32000), replace(GPU[0], N=64, B=8, packed=True)]
    more += [size for size in REAL if size.d != 128]
    out = []
    for size in (*sizes, *more):
        args = shapes(size)
        run = functools.partial(tree_decode, how=How("gpu", "h100"))
        out.append(Case(f"{size} gpu", run, args, gpu.memory(gpu.plan(*args[:2]), size.d), draw=draw))
    run = functools.partial(tree_decode, how=How("xla"))
    return [*out, *(Case(f"{size} xla", run, shapes(size), draw=draw) for size in (REAL[0], more[2]))]


def _library(arrays: tuple[Any, ...]) -> Any:
    """cuDNN over cache and tree, every key for every node, in the layout it wants."""
    q, k, v, problem = arrays
    new_k, new_v = problem.new_k, problem.new_v
    keys, values = (jnp.concatenate([jnp.swapaxes(a, 1, 2), b], axis=1) for a, b in ((k, new_k), (v, new_v)))
    return functools.partial(
        jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn")), q, keys, values
    )


def _forms(small: bool, chip: str | None) -> Iterator[tuple[str, timing.Forms]]:
    on_gpu = jax.default_backend() == "gpu"
    names = ("gpu",) if on_gpu and chip == "h100" else ()
    for size in SMALL if small else GPU if on_gpu else REAL:
        arrays = draw(np.random.default_rng(0), shapes(size))
        forms = {}
        for name in (*(() if on_gpu else ("reference",)), *timing.names(), *names):
            if name == "gpu" and gpu.refusal(*arrays[:2]):
                continue
            form = functools.partial(tree_decode, how=How(name, chip))
            forms[name] = functools.partial(jax.jit(form), *arrays)
        if on_gpu and size.dtype == jnp.bfloat16 and size.d <= 128:
            forms["cudnn, no mask"] = _library(arrays)
        yield str(size), forms


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    timing.main(NAME, "xla" if jax.default_backend() == "gpu" else "reference", _forms, argv)


if __name__ == "__main__":
    main()
