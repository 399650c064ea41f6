"""The product with packed weights: the packing, the kernel against float32, its lowering, its refusals."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_checks import STRICT, assert_as_good, exact, how, lowered_for_tpu, rms_ratio, without_races

from kernels_pallas.int4_matmul import bench, reference, tpu
from kernels_pallas.int4_matmul.api import int4_matmul
from kernels_pallas.int4_matmul.reference import Quantized, dequantize, pack, quantize, unpack
from lm.compat import auto_mesh
from lm.errors import UserError

# M, K, N, bits, group, symmetric, dtype. One group; ragged M over tiles; K of 9 groups (one turn of 8, then one).
GRID = [
    (1, 64, 128, 4, 64, True, jnp.float32),
    (5, 288, 160, 4, 32, False, jnp.bfloat16),
    (40, 1152, 128, 4, 128, True, jnp.bfloat16),
    (3, 576, 128, 8, 64, False, jnp.float32),
    (20, 512, 200, 8, 256, True, jnp.bfloat16),
    (2, 512, 64, 4, 256, False, jnp.float32),
]


call = jax.jit(int4_matmul, static_argnames="how")


def _arrays(
    M: int, K: int, N: int, bits: int, group: int, symmetric: bool, dtype: Any, seed: int = 0
) -> tuple[jax.Array, Quantized]:
    for_x, for_w = jax.random.split(jax.random.key(seed))
    x, w = jax.random.normal(for_x, (M, K)), jax.random.normal(for_w, (K, N))
    return x.astype(dtype), quantize(w, bits, group, symmetric)


def test_packing_keeps_every_code_where_it_says() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (128, 3))
    packed = np.asarray(pack(jnp.asarray(codes), 64)).view(np.uint8)
    assert packed.shape == (64, 3)
    assert packed[40, 1] == codes[64 + 8, 1] + 16 * codes[64 + 8 + 32, 1]  # group 1, byte 8: codes 8 and 40
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(codes), 64), 64), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantization_errs_by_half_a_step(bits: int, symmetric: bool) -> None:
    w = jax.random.normal(jax.random.key(0), (128, 8)) + 0.3
    weights = quantize(w, bits, 32, symmetric)
    assert (weights.zeros_GN is None) == symmetric
    step = jnp.repeat(weights.scales_GN, 32, axis=0)
    assert float(jnp.max(jnp.abs(dequantize(weights, 128) - w) / step)) <= 0.5001
    assert rms_ratio(dequantize(weights, 128), w) < (0.15 if bits == 4 else 0.01)


def test_exact_weights_are_the_plain_product() -> None:
    """Weights that are codes times a power of two: nothing is lost, and the product is that of the matrix."""
    w = jnp.asarray(np.random.default_rng(0).integers(-7, 8, (64, 16)), jnp.float32).at[::32].set(7) / 4
    x = jax.random.normal(jax.random.key(0), (3, 64))
    weights = quantize(w, 4, 32)
    np.testing.assert_array_equal(dequantize(weights, 64), w)
    np.testing.assert_allclose(int4_matmul(x, weights), jnp.matmul(x, w, precision="highest"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(str(getattr(v, "__name__", v)) for v in c))
def test_kernel_is_the_reference(case: tuple[Any, ...]) -> None:
    x, weights = _arrays(*case)
    found = call(x, weights, how("interpret", tile_m=16, tile_n=128))  # more than one tile of rows and of outputs
    truth = call(exact(x), weights, how("reference"))
    assert found.dtype == x.dtype
    assert_as_good(found, call(x, weights, how("xla")), truth, x.dtype)


def test_no_race_and_nothing_uninitialised(capfd: pytest.CaptureFixture[str]) -> None:
    x, weights = _arrays(20, 288, 200, 4, 32, False, jnp.float32)
    kernel = functools.partial(tpu.int4_matmul, how=how(interpret=STRICT, tile_m=16, tile_n=128))
    found = without_races(lambda: kernel(x, weights), capfd)
    assert rms_ratio(found, reference.reference(x, weights)) < 1e-6


def test_gradient_goes_to_the_activations() -> None:
    x, weights = _arrays(3, 64, 32, 4, 32, False, jnp.float32)

    def loss(x: jax.Array, implementation: str) -> jax.Array:
        return jnp.sum(jnp.sin(int4_matmul(x, weights, how(implementation))))

    truth = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(reference.reference(x, weights)))))(x)
    for implementation in ("auto", "interpret"):
        assert rms_ratio(jax.jit(jax.grad(loss), static_argnums=1)(x, implementation), truth) < 1e-5
    frozen = jax.jit(jax.grad(lambda s: jnp.sum(int4_matmul(x, weights._replace(scales_GN=s)))))(weights.scales_GN)
    assert not np.any(frozen)


def test_leading_axes_and_shards() -> None:
    """The production call, [B, T, K] activations, outputs split over eight devices."""
    x, weights = _arrays(6, 64, 8 * 16, 4, 32, True, jnp.float32)
    x = x.reshape(2, 3, 64)
    matmul = jax.shard_map(
        functools.partial(int4_matmul, how=how("interpret")),
        mesh=auto_mesh((8,), ("tensor",)),
        in_specs=(P(), Quantized(P(None, "tensor"), P(None, "tensor"))),
        out_specs=P(None, None, "tensor"),
        check_vma=False,
    )
    assert rms_ratio(jax.jit(matmul)(x, weights), reference.reference(x, weights)) < 1e-6


def test_lowers_for_a_tpu() -> None:
    cases = bench.cases("v5e")
    for case in (cases[0], cases[-1]):
        assert "tpu_custom_call" in lowered_for_tpu(case.fn, *case.args)
    assert "tpu_custom_call" in lowered_for_tpu(int4_matmul, *cases[0].args)
    assert "custom_call" not in jax.jit(int4_matmul).lower(*cases[0].args).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": how("tup")}, "unknown name 'tup' (did you mean 'tpu'?)"),
        ({"how": how(chip="v5")}, "chip: unknown name 'v5'"),
        ({"how": how(tile_m=16)}, "sizes {'tile_m': 16}; valid: both of tile_m and tile_n, or neither"),
        ({"x": jnp.zeros((2, 64), jnp.float16)}, "x has dtype float16; valid: bfloat16, float32"),
        ({"x": jnp.zeros((2, 96))}, "do not go with K=96; valid: (48, N) or (96, N)"),
        ({"scales_GN": jnp.zeros((3, 32))}, "scales (3, 32) do not go with weights [64, 32]"),
        ({"zeros_GN": jnp.zeros((1, 32))}, "zeros (1, 32); valid: the shape of the scales, (2, 32)"),
        ({"packed_RN": jnp.zeros((32, 32), jnp.uint8)}, "packed weights have dtype uint8; valid: int8"),
        (
            {"scales_GN": jnp.zeros((4, 32)), "how": how("tpu")},
            "cannot serve this call: group 16, the kernel has",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(change: dict[str, Any], message: str) -> None:
    x, weights = _arrays(2, 64, 32, 4, 32, True, jnp.float32)
    fields = {k: change.pop(k) for k in list(change) if k in Quantized._fields}
    with pytest.raises(UserError) as found:
        int4_matmul(change.pop("x", x), weights._replace(**fields), **change)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_weights_too_large_for_the_kernel_run_on_xla() -> None:
    K = 2**20
    x = jax.ShapeDtypeStruct((1, K), jnp.bfloat16)
    weights = Quantized(
        jax.ShapeDtypeStruct((K // 2, 128), jnp.int8), jax.ShapeDtypeStruct((K // 64, 128), jnp.bfloat16)
    )
    with pytest.raises(UserError, match=f"K={K} inputs do not fit"):
        jax.eval_shape(functools.partial(int4_matmul, how=how("tpu")), x, weights)
    assert "tpu_custom_call" not in lowered_for_tpu(int4_matmul, x, weights)


def test_bench_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--size=small", "--repeats=1", f"--json={tmp_path}/t.json"])
    table = json.loads((tmp_path / "t.json").read_text())
    assert {"bfloat16", "xla"} <= set(table["rows"][0]["seconds"])
    assert "int4g128 1x256x512" in capsys.readouterr().out
