"""The Mosaic GPU kernel of `block_table`: interpreted against all pairs, races, lowering for CUDA, refusals."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_table_arrays import call, drawn
from kernel_checks import assert_as_good, exact, how, lowered_for_gpu, rms_ratio, without_gpu_races

from kernels_pallas import common
from kernels_pallas.block_table import bench, gpu, gpu_plan
from kernels_pallas.block_table.api import block_table
from kernels_pallas.block_table.bench import Size
from kernels_pallas.block_table.problem import Problem
from lm.compat import auto_mesh
from lm.errors import UserError

BF16 = jnp.bfloat16


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (Size(1, 100, 1, 4, 32, 2, 4, 2, 64, turns=2), {"fill": 16}),  # lists in two parts, tiles of 32, turns
        (Size(9, 100, 8, 5, 32, 1, 4, 2, 96, shared=True, lead=False), {"softcap": 2.0, "fill": 1, "tile": 16}),
        (Size(4, 20, 4, 2, 64, 1, 2, 2, 64), {"fill": 1, "stages": 1}),  # fewer keys than a tile
        # Two computing warpgroups, the second with 16 rows, and one that fetches; more tiles than stages.
        (Size(40, 100, 40, 4, 32, 1, 2, 1, 64, shared=True, turns=2), {"fill": 1}),
    ],
    ids=str,
)
def test_equals_all_pairs(size: Size, given: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    args = drawn(size)
    plain = {k: v for k, v in given.items() if k == "softcap"}
    sizes = {k: v for k, v in given.items() if k not in plain}
    want = call(size, how("reference"), exact(args), **plain)
    found = without_gpu_races(lambda: call(size, how("interpret_gpu", **sizes), args, **plain), capfd)
    assert_as_good(found, call(size, how("xla"), args, **plain), want, BF16)


def test_what_is_past_the_length_is_never_seen() -> None:
    """Slots past a row's length hold NaN, a row shorter than a tile too; some queries see nothing at all."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 64)), BF16) for n in (2, 70, 70))
    lengths = jnp.asarray([70, 11])
    bad = jnp.arange(70)[None, :, None, None] >= lengths[:, None, None, None]
    k, v = jnp.where(bad, jnp.nan, k), jnp.where(bad, jnp.nan, v)
    blocks = jnp.asarray([0, 2, 1, 0], jnp.int32) * jnp.ones((2, 2, 1, 1), jnp.int32)
    problem = Problem(block_size=32, q_block=2, lengths=lengths, positions=jnp.asarray([[66, -1], [99, 3]]))
    run = functools.partial(block_table, q, k, v, blocks, problem)
    out, lse = run(how("interpret_gpu", fill=1))
    want, true = run(how("reference"))
    none = np.asarray(true) == -np.inf
    assert none[0, 1].all() and none.sum() == 2 and ((np.asarray(lse) == -np.inf) == none).all()
    assert rms_ratio(out, want) <= 1e-2 and not np.asarray(out, np.float32)[none].any()
    assert rms_ratio(lse[~none], true[~none]) <= 1e-3


def test_a_race_is_seen(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(1, 64, 1, 2, 32, 1, 1, 1, 64)
    args = drawn(size)
    monkeypatch.setattr(gpu.plgpu, "barrier_wait", lambda barrier: None)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        without_gpu_races(lambda: call(size, how("interpret_gpu", fill=1), args), capfd)


def test_words_are_what_is_seen_and_how_many() -> None:
    at = jnp.asarray([[[39, 41]]])
    ids = jnp.asarray([[[[7, 2, -1, 5, 2, 4, 9, 6]]]])
    words = gpu.words(ids, ids + 1, at, jnp.asarray([70]), 8, 9)[0, 0, 0]
    count = int(words[gpu_plan.COUNT])
    assert count == 3 and int(words[gpu_plan.END]) == 70
    listed = words[gpu_plan.FIRST : gpu_plan.FIRST + count]
    assert sorted((listed & 0x1FFFF).tolist()) == [2, 4, 5]
    assert ((listed >> gpu_plan.ID_BITS) & 0xFFF).tolist() == ((listed & 0x1FFFF) + 1).tolist()
    assert {int(w) & 0x1FFFF for w in listed if int(w) & gpu_plan.WHOLE} == {2, 4}


def test_real_sizes_lower_for_cuda() -> None:
    cases = [case for case in bench.gpu_cases() if case.name.endswith(", gpu")]
    assert all(2**15 < case.tile_bytes <= common.GPUS["h100"].smem for case in cases)
    for case in (cases[0], cases[7]):  # a token, lists in parts; a prompt of 64k
        assert "@mosaic_gpu" in lowered_for_gpu(case.fn, *case.args), case.name
    auto = functools.partial(bench.attend, bench.REAL[0])
    assert "@mosaic_gpu" in lowered_for_gpu(functools.partial(auto, how=how(chip="h100")), *cases[0].args)
    assert "mosaic_gpu" not in lowered_for_gpu(auto, *cases[0].args)


def test_heads_over_eight_devices_lower_for_cuda() -> None:
    size = Size(1, 4096, H=16, K=8, B=1, turns=4)
    mesh = auto_mesh((1, 8), ("data", "tensor"))
    run = functools.partial(bench.attend, size, how=how("gpu", "h100", mesh))
    text = lowered_for_gpu(run, *bench.shapes(size))
    assert "@mosaic_gpu" in text and "1x4096x128xbf16" in text


def test_what_it_cannot_serve_runs_on_xla() -> None:
    for message, size in {
        "float32, the matrix unit": Size(1, 128, n=2, w=32, H=2, K=1, d=64, dtype=jnp.float32),
        "head width 40, the kernel": Size(1, 128, n=2, w=32, H=2, K=1, d=40),
        "blocks of 24 keys, the kernel": Size(1, 120, n=2, w=24, H=2, K=1, d=64),
        "turns of 24 pairs": Size(1, 128, n=2, w=32, H=2, K=1, d=48, turns=2),
    }.items():
        args = bench.shapes(size)
        assert "mosaic_gpu" not in lowered_for_gpu(functools.partial(bench.attend, size, how=how(chip="h100")), *args)
        with pytest.raises(UserError, match=f"'gpu' cannot serve this call: .*{message}"):
            jax.eval_shape(functools.partial(bench.attend, size, how=how("gpu")), *args)
