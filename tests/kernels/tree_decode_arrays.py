"""What the tests of `tree_decode` call it with, on processors and GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels_pallas.tree_decode import bench
from kernels_pallas.tree_decode.bench import Size


def arrays_of(size: Size, lengths: tuple[int, ...], seed: int = 0, rubbish: float = float("nan")) -> tuple[Any, ...]:
    """What `bench.draw` gives, with these lengths and `rubbish` in every slot of the cache that is not valid."""
    q, *cache, problem = bench.draw(np.random.default_rng(seed), bench.shapes(size))
    k, v = (np.array(x) for x in cache)
    for row, length in enumerate(lengths):
        k[row, :, length:] = v[row, :, length:] = rubbish
    return q, jnp.asarray(k), jnp.asarray(v), replace(problem, lengths=jnp.asarray(lengths, jnp.int32))
