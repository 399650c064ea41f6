"""Attention of a tree of draft nodes on Hopper: the kernel interpreted, its lowering for CUDA, what it refuses."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_checks import assert_as_good, exact, how, without_races
from tree_decode_arrays import arrays_of

from kernels_pallas import common
from kernels_pallas.tree_decode import bench, gpu, reference
from kernels_pallas.tree_decode.api import tree_decode
from kernels_pallas.tree_decode.bench import Size, tree
from kernels_pallas.tree_decode.problem import Problem
from lm.compat import auto_mesh
from lm.errors import UserError

# Two stages, filled more than once; blocks of threads to split for.
GRID = [
    (Size(20, 520, 2, 4, 2, 64), (520, 387), 8),  # 520: the last tile overlaps; 387: it is partial
    (Size(40, 392, 1, 4, 2, 96, packed=True), (300,), 4),  # two compute warpgroups share tiles
    (Size(3, 100, 3, 1, 1, 256), (0, 999, 37), 4),  # a cache shorter than a tile; wide heads
]


def _lowered(fn: Any, *args: Any) -> str:
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("size", "lengths", "ctas"), GRID, ids=lambda x: str(x))
def test_kernel_is_the_reference(
    size: Size, lengths: tuple[int, ...], ctas: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Output and log-sum-exp; NaN in every slot that is not valid reaches neither; no race."""

    def filled(rubbish: float, like: Any) -> Any:
        q, k, v, problem = like(arrays_of(size, lengths, rubbish=rubbish))
        return q, k, v, replace(problem, scale=0.1).filled(q, k, v)

    given = filled(float("nan"), lambda x: x)
    kernel = jax.jit(functools.partial(gpu.tree_decode, how=how(stages=2, ctas=ctas)))
    found = without_races(lambda: kernel(*given), capfd)
    truth = jax.jit(reference.reference)(*filled(0.0, exact))
    xla = jax.jit(reference.xla)(*given)
    assert found[0].dtype == size.dtype and found[1].dtype == jnp.float32
    for part in zip(found, xla, truth, strict=True):
        assert_as_good(*part, size.dtype)


def test_a_tree_for_each_row_and_nodes_that_see_nothing() -> None:
    *arrays, problem = arrays_of(Size(20, 136, 2, 2, 1, 64), (0, 136))
    mask = problem.ancestors
    masks = jnp.stack([mask.at[3].set(False), tree(np.random.default_rng(1), 20)])
    call = jax.jit(tree_decode, static_argnames="how")
    problem = replace(problem, ancestors=masks)
    out, lse = call(*arrays, problem, how("interpret_gpu", "h100"))
    *clean, of_clean = exact(arrays_of(Size(20, 136, 2, 2, 1, 64), (0, 136), rubbish=0.0))
    want_out, want = call(*clean, replace(of_clean, ancestors=masks), how("reference"))
    xla_out, xla = call(*arrays, problem, how("xla"))
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want))
    assert np.isneginf(lse[0, 3]).all() and not np.any(out[0, 3])
    assert_as_good(out, xla_out, want_out, out.dtype)
    assert_as_good(jnp.exp(lse), jnp.exp(xla), jnp.exp(want), out.dtype)


def test_lowers_for_cuda_at_real_sizes() -> None:
    cases = {case.name: case for case in bench.gpu_cases()}
    for name in ("256n 131072 1x32:8x128 gpu", "64n 8192 1x16:16x256 gpu"):
        assert "mosaic_gpu" in _lowered(cases[name].fn, *cases[name].args), name
    args = cases["64n 32768 1x32:8x128 gpu"].args
    assert "mosaic_gpu" in _lowered(functools.partial(tree_decode, how=how(chip="h100")), *args)
    assert "mosaic_gpu" not in _lowered(tree_decode, *args)  # the chip is said, never looked up
    float32 = bench.shapes(Size(64, 32768, dtype=jnp.float32))
    assert "mosaic_gpu" not in _lowered(functools.partial(tree_decode, how=how(chip="h100")), *float32)


def test_key_heads_over_eight_devices() -> None:
    """Lowered only: eight interpreted devices wait for each other's callbacks."""
    heads, cache = P(None, None, "tensor"), P(None, "tensor")
    split = jax.shard_map(
        functools.partial(tree_decode, how=how(chip="h100")),
        mesh=auto_mesh((8,), ("tensor",)),
        in_specs=(heads, cache, cache, Problem(P(), heads, heads, P())),
        out_specs=(heads, heads),
        check_vma=False,
    )
    assert "mosaic_gpu" in _lowered(split, *bench.shapes(Size(64, 32768)))


def test_one_row_fills_the_chip_and_a_block_fits() -> None:
    for size in (*bench.GPU, *bench.REAL):
        if size.dtype == jnp.float32:
            continue
        q, k = bench.shapes(size)[:2]
        cut = gpu.plan(q, k)
        work = size.B * size.K * cut.blocks
        assert cut.blocks * cut.warpgroups * gpu.ROWS >= size.N * size.H // size.K
        assert work * cut.splits >= 120 or cut.splits == -(-size.S // cut.tile)
        assert cut.stages >= 2 and gpu.memory(cut, size.d) + 1024 <= common.GPUS["h100"].smem


@pytest.mark.parametrize(
    ("size", "tile_s", "message"),
    [
        (Size(4, 256, dtype=jnp.float32), None, "dtype float32, the kernel takes bfloat16; use 'auto'"),
        (Size(4, 256, d=40), None, "head width 40, the kernel has multiples of 16 up to 256"),
        (Size(4, 300), None, "a cache of 300 slots, the kernel takes multiples of 8"),
        (Size(4, 256), 256, "tiles of 256 slots, the kernel has 128"),
    ],
)
def test_it_refuses_in_one_line(size: Size, tile_s: int | None, message: str) -> None:
    with pytest.raises(UserError) as found:
        jax.eval_shape(functools.partial(tree_decode, how=how("gpu", tile_s=tile_s)), *bench.shapes(size))
    assert message in str(found.value) and "\n" not in str(found.value)
    assert "mosaic_gpu" not in _lowered(
        functools.partial(tree_decode, how=how(chip="h100", tile_s=tile_s)), *bench.shapes(size)
    )


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU: the compiled kernel")
def test_compiled_kernel_is_the_reference() -> None:
    more = [(Size(64, 4096, 2, 32, 8, 128), (4096, 1000), 0), (Size(256, 1024, 1, 8, 2, 128, packed=True), (777,), 0)]
    for size, lengths, _ in (*GRID, *more):
        arrays, clean = (arrays_of(size, lengths, rubbish=r) for r in (float("nan"), 0.0))
        found = tree_decode(*arrays, how("gpu", "h100"))
        xla = tree_decode(*arrays, how("xla"))
        truth = tree_decode(*exact(clean), how("reference"))
        for part in zip(found, xla, truth, strict=True):
            assert_as_good(*part, size.dtype)
