"""What the tests of `block_table` call it with, on processors and GPUs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from kernels_pallas import common
from kernels_pallas.block_table import bench
from kernels_pallas.block_table.bench import Size


@functools.cache
def drawn(size: Size) -> Any:
    return bench.draw(size, np.random.default_rng(0), bench.shapes(size))


def call(size: Size, how: common.How, args: Any, **given: Any) -> Any:
    return jax.jit(functools.partial(bench.attend, size, how=how, **given))(*args)
