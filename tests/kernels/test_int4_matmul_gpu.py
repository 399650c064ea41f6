"""The product with packed weights on Hopper: the kernel interpreted, its lowering for CUDA, what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_checks import assert_as_good, exact, how, rms_ratio, without_races

from kernels_pallas import common
from kernels_pallas.int4_matmul import bench, gpu, reference
from kernels_pallas.int4_matmul.api import int4_matmul
from kernels_pallas.int4_matmul.reference import Quantized, quantize
from lm.compat import auto_mesh
from lm.errors import UserError

# M, K, N, bits, group, symmetric; blocks of threads to split for. Two stages: each is filled more than once.
GRID = [
    ((1, 768, 64, 4, 128, True), 1),
    ((9, 288, 128, 4, 32, False), 2),  # nine steps in two shares; two compute warpgroups
    ((70, 192, 64, 8, 64, False), 1),  # two tiles of rows, the second not full
]


def _arrays(size: tuple[Any, ...]) -> tuple[jax.Array, Quantized]:
    M, K, N, bits, group, symmetric = size
    for_x, for_w = jax.random.split(jax.random.key(0))
    weights = quantize(jax.random.normal(for_w, (K, N)), bits, group, symmetric)
    return jax.random.normal(for_x, (M, K), jnp.bfloat16), weights


def _lowered(fn: Any, *args: Any) -> str:
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("size", "ctas"), GRID, ids=lambda x: str(x))
def test_kernel_is_the_reference(size: tuple[Any, ...], ctas: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Closer to it than XLA, which rounds the weights; and no race."""
    x, weights = _arrays(size)
    two = how(stages=2, ctas=ctas)
    cut = gpu.plan(x, weights, two)
    assert cut.stages == 2 < cut.turns and cut.splits == ctas
    kernel = jax.jit(functools.partial(gpu.int4_matmul, how=two))
    found = without_races(lambda: kernel(x, weights), capfd)
    truth = jax.jit(reference.reference)(exact(x), weights)
    assert found.shape == truth.shape and found.dtype == x.dtype
    assert_as_good(found, jax.jit(reference.xla)(x, weights), truth, x.dtype)


def test_every_code_is_exact() -> None:
    """Of 4 and 8 bits: a product with the identity is the codes, and a power of two or a half on top."""
    for bits, span in ((4, 16), (8, 256)):
        codes = np.arange(64 * 64).reshape(64, 64) * 5 % span
        packed = reference.pack(jnp.asarray(codes), 64) if bits == 4 else jnp.asarray(codes - 128, jnp.int8)
        weights = Quantized(packed, jnp.full((1, 64), 0.5), jnp.full((1, 64), 1.5))
        found = int4_matmul(jnp.eye(64, dtype=jnp.bfloat16), weights, how("interpret_gpu", "h100"))
        want = (codes - (1.5 if bits == 4 else 129.5)) / 2
        np.testing.assert_array_equal(found, jnp.asarray(want, jnp.bfloat16))


def test_gradient_goes_to_the_activations() -> None:
    x, weights = _arrays((3, 64, 64, 4, 32, True))
    matmul = functools.partial(int4_matmul, how=how("interpret_gpu", "h100"))
    found, pull = jax.vjp(lambda x: matmul(x, weights), x)
    truth, back = jax.vjp(lambda x: reference.reference(x, weights), exact(x))
    assert rms_ratio(found, truth) < 5e-3
    assert rms_ratio(pull(found)[0], back(exact(found))[0]) < 5e-3


def test_over_eight_devices() -> None:
    """The production call, outputs split. Lowered only: eight interpreted devices wait for each other's callbacks."""
    x, weights = bench._shapes((3, 4096, 8 * 512, 4, 128, False))
    split = jax.shard_map(
        functools.partial(int4_matmul, how=how(chip="h100")),
        mesh=auto_mesh((8,), ("tensor",)),
        in_specs=(P(), Quantized(P(None, "tensor"), P(None, "tensor"))),
        out_specs=P(None, "tensor"),
        check_vma=False,
    )
    assert "mosaic_gpu" in _lowered(split, x, weights)


def test_lowers_for_cuda_at_real_sizes() -> None:
    cases = {case.name: case for case in bench.gpu_cases()}
    for name in ("int4g128 1x4096x4096 gpu forward", "int4g128 512x4096x11008 gpu backward"):
        assert _lowered(cases[name].fn, *cases[name].args).count("mosaic_gpu") > 0, name
    args = cases["int4g128 1x4096x4096 gpu forward"].args
    assert "mosaic_gpu" in _lowered(functools.partial(int4_matmul, how=how(chip="h100")), *args)
    assert "mosaic_gpu" not in _lowered(int4_matmul, *args)  # the chip is said, never looked up
    assert "mosaic_gpu" not in _lowered(
        functools.partial(int4_matmul, how=how(chip="h100")), args[0].update(dtype=jnp.float32), args[1]
    )


def test_a_small_matrix_fills_the_chip_and_a_block_fits() -> None:
    for size in (*bench.GPU, *bench.REAL):
        x, weights = bench._shapes(size)
        cut = gpu.plan(x, weights)
        tiles = size[2] // cut.tile_n * -(-size[0] // cut.tile_m)
        assert tiles * cut.splits >= 132 or cut.turns == 1
        assert (cut.splits - 1) * cut.turns < size[1] // cut.step <= cut.splits * cut.turns  # no share is empty
        needed = gpu.memory(cut, *size[3:5], weights.scales_GN.dtype, size[5])
        assert needed <= common.GPUS["h100"].smem and (size[0] > 8 or 2 * needed <= common.GPUS["h100"].smem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 64))}, "x has dtype float32, the kernel takes bfloat16; use 'auto'"),
        ({"scales_GN": jnp.zeros((2, 64), jnp.float16)}, "scales and zeros of dtype float16"),
        ({"scales_GN": jnp.zeros((4, 64))}, "group 16, the kernel has 32, 64, 128, 256"),
        ({"packed_RN": jnp.zeros((32, 48), jnp.int8), "scales_GN": jnp.zeros((2, 48))}, "N=48 outputs"),
        ({"sizes": {"tile_m": 16, "tile_n": 512}}, "the kernel has tile_m 8, 16, 32, 64, 128 and tile_n 64, 128"),
    ],
)
def test_it_refuses_in_one_line(change: dict[str, Any], message: str) -> None:
    x, weights = _arrays((2, 64, 64, 4, 32, True))
    fields = {k: change.pop(k) for k in list(change) if k in Quantized._fields}
    x, sizes = change.pop("x", x), change.pop("sizes", {})
    with pytest.raises(UserError) as found:
        int4_matmul(x, weights._replace(**fields), how("gpu", **sizes))
    assert message in str(found.value) and "\n" not in str(found.value)
    assert int4_matmul(x, weights._replace(**fields), how(chip="h100")).shape[0] == 2  # 'auto' serves it all the same


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU: the compiled kernel")
def test_compiled_kernel_is_the_reference() -> None:
    for size in [size for size, _ in GRID] + [(8, 4096, 4096, 4, 128, True), (512, 4096, 512, 4, 64, False)]:
        x, weights = _arrays(size)
        found = int4_matmul(x, weights, how("gpu", "h100"))
        assert_as_good(found, reference.xla(x, weights), reference.reference(exact(x), weights), x.dtype)
