"""What `kernels_pallas.check` compiles and runs of `block_table`; as a program, times.

``python -m kernels_pallas.block_table.bench``: the gather in XLA operations, and the kernel where there is a TPU or a
Hopper GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernels_pallas import common, timing
from kernels_pallas.block_table import gpu_plan, tpu
from kernels_pallas.block_table.api import NAME, block_table
from kernels_pallas.block_table.problem import Problem
from kernels_pallas.common import AUTO, Case, How, sized


@dataclass(frozen=True)
class Size:
    """B rows, T queries in blocks of `q_block`, S slots in blocks of w, n listed, H query and K key heads of width d.

    `shared`: one list for the heads of a key head; `turns`: rows of angles; `lead`: heads lead in keys and values.
    """

    T: int
    S: int = 65536
    q_block: int = 1
    n: int = 16
    w: int = 256
    B: int = 1
    H: int = 32
    K: int = 8
    d: int = 128
    dtype: DTypeLike = jnp.bfloat16
    shared: bool = False
    turns: int = 0
    lead: bool = True

    def __str__(self) -> str:
        kind = "" if self.dtype == jnp.bfloat16 else " float32"
        words = [f"{self.turns} turns"] * (self.turns > 0) + ["shared"] * self.shared + ["copied"] * (not self.lead)
        sizes = f"{self.T}/{self.q_block}q {self.S}/{self.w} x{self.n} {self.B}x{self.H}:{self.K}x{self.d}{kind}"
        return " ".join([sizes, *words])

    @property
    def lists(self) -> int:
        return self.K if self.shared else self.H


REAL = (
    Size(1),
    Size(1, B=8, K=32),
    Size(1, B=8, shared=True),
    Size(1, turns=16),  # LongHeads, a token added to a cache
    Size(1, lead=False),
    Size(4096, turns=16),  # LongHeads, a list for every query
    Size(65536, q_block=128),
    Size(65536, q_block=128, shared=True),
    Size(65536, q_block=256, n=64, K=32, turns=256),
    Size(8000, 60000, q_block=128, w=128, n=32),  # the last blocks are not full
    Size(1024, 32768, q_block=64, w=64, n=64),
    *(Size(8192, 8192, q_block=128, H=16, K=4, d=d, turns=16) for d in (64, 96, 256)),
    Size(1, d=64, turns=16),
    Size(1, dtype=jnp.float32, turns=16),
    Size(8192, 8192, q_block=128, dtype=jnp.float32),
)
GPU = tuple(size for size in REAL if size.dtype == jnp.bfloat16)
SMALL = (
    Size(37, 100, 8, 4, 16, 2, 4, 2, 64, jnp.float32),
    Size(37, 100, 8, 4, 16, 2, 4, 2, 64, jnp.float32, shared=True, turns=3),
    Size(1, 100, 1, 5, 16, 2, 4, 1, 128, jnp.float32, turns=3, lead=False),
    Size(20, 90, 4, 4, 16, 1, 2, 1, 128, jnp.bfloat16, turns=3),
)
SMALL_GPU = Size(1, 100, 1, 4, 32, 1, 2, 1, 64, turns=2)


def shapes(size: Size) -> tuple[Any, ...]:
    """q, k, v, lists, lengths, and turns and angles where there are."""
    array: Any = jax.ShapeDtypeStruct
    B, K, S, d = size.B, size.K, size.S, size.d
    cache = array((B, K, S, d) if size.lead else (B, S, K, d), size.dtype)
    lists = array((B, size.lists, -(-size.T // size.q_block), size.n), jnp.int32)
    out = (array((B, size.T, size.H, d), size.dtype), cache, cache, lists, array((B,), jnp.int32))
    return (*out, lists, array((size.turns, d // 2), jnp.float32)) if size.turns else out


def draw(size: Size, rng: np.random.Generator, like: tuple[Any, ...]) -> tuple[Any, ...]:
    """Normal values; every query's own block and others at random, now and then none; the first row is full."""
    q, k, v, blocks, lengths, *turned = like
    arrays = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in (q, k, v)]
    N = -(-size.S // size.w)
    ids = rng.integers(-1, N, blocks.shape)
    valid = np.array([size.S, *rng.integers(size.S // 2, size.S, size.B - 1)])
    first = np.maximum(valid[:, None] - size.T + np.arange(blocks.shape[2]) * size.q_block, 0)
    ids[..., 0] = (first // size.w)[:, None]
    out = (*arrays, jnp.asarray(ids, jnp.int32), jnp.asarray(valid, jnp.int32))
    if not turned:
        return out
    turn, angles = rng.integers(0, size.turns, blocks.shape), rng.uniform(-3, 3, turned[1].shape)
    return *out, jnp.asarray(turn, jnp.int32), jnp.asarray(angles, jnp.float32)


def attend(
    size: Size, *args: jax.Array, how: How = AUTO, scale: float | None = None, softcap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Output, and log-sum-exp with 0 in the place of -inf, so that errors are finite."""
    q, k, v, blocks, lengths, *turned = args
    turn, angles = turned or (None, None)
    problem = Problem(
        block_size=size.w,
        q_block=size.q_block,
        lengths=lengths,
        turn=turn,
        angles=angles,
        scale=scale,
        softcap=softcap,
        heads_lead=size.lead,
    )
    out, lse = block_table(q, k, v, blocks, problem, how)
    return out, jnp.where(lse == -jnp.inf, 0.0, lse)


def _memory(size: Size, chip: str) -> int:
    R = tpu.rows(size.H, size.lists, size.q_block)
    row = common.blocks(NAME, chip)
    m = tpu.choose(size.n, size.w, R, size.d, size.dtype, row["entries"], row["mib"], size.turns)
    return tpu.memory(m, size.w, R, size.d, size.dtype, size.turns)


def cases(chip: str) -> list[Case]:
    """Real sizes for `chip`, to be compiled. There is no backward kernel."""
    return [
        Case(
            str(size),
            functools.partial(attend, size, how=How("tpu", chip)),
            shapes(size),
            _memory(size, chip),
            draw=functools.partial(draw, size),
        )
        for size in REAL
    ]


def small_cases() -> list[Case]:
    """Sizes an interpreter can run, with the reference they must equal."""
    runs = [(size, How("interpret", sizes=sized(entries=2))) for size in SMALL]
    runs += [(SMALL_GPU, How("interpret_gpu", sizes=sized(fill=4)))]
    return [
        Case(
            f"{size}{', gpu' if size is SMALL_GPU else ''}",
            functools.partial(attend, size, how=how),
            shapes(size),
            0,
            functools.partial(attend, size, how=How("reference")),
            1e-5 if size.dtype == jnp.float32 else 1e-2,
            functools.partial(draw, size),
        )
        for size, how in runs
    ]


def gpu_cases() -> list[Case]:
    """Real sizes for Mosaic GPU, and the gather in XLA operations."""
    out = []
    for form, size in (("xla", REAL[1]), *(("gpu", size) for size in GPU)):
        run = functools.partial(attend, size, how=How(form, "h100" if form == "gpu" else None))
        args = shapes(size)
        p = gpu_plan.choose(
            args[0], args[3].shape, size.w, size.q_block, size.d // 2 if size.turns else 0, How("gpu", "h100")
        )
        memory = 0 if p is None or form == "xla" else p.memory
        out.append(Case(f"{size}, {form}", run, args, memory, draw=functools.partial(draw, size)))
    return out


def _forms(small: bool, chip: str | None) -> Iterator[tuple[str, timing.Forms]]:
    for size in SMALL if small else REAL:
        arrays = draw(size, np.random.default_rng(0), shapes(size))
        forms = {}
        for name in (*timing.names(), *(("gpu",) if chip in common.GPUS and size in GPU else ())):
            form = functools.partial(attend, size, how=How(name, chip))
            forms[name] = functools.partial(jax.jit(form), *arrays)
        yield str(size), forms


def main(argv: Sequence[str] | None = None) -> None:
    """Times every case and prints the table."""
    timing.main(NAME, "xla", _forms, argv)


if __name__ == "__main__":
    main()
