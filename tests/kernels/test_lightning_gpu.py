"""The Mosaic GPU kernel of `lightning`: interpreted against the loop, races, lowering for CUDA, refusals."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from kernel_checks import assert_as_good, exact, how, lowered_for_gpu, rms_ratio, without_gpu_races
from lightning_arrays import arrays_of, both_ways

from kernels_pallas import common
from kernels_pallas.lightning import bench, gpu, reference
from kernels_pallas.lightning.api import lightning
from kernels_pallas.lightning.problem import Problem
from lm.compat import auto_mesh
from lm.errors import UserError

BF16 = jnp.bfloat16


def test_results_and_gradients_are_those_of_the_loop() -> None:
    """A last chunk of 36 of 64 tokens; widths that are padded, D narrower than E."""
    arrays = arrays_of(1, 100, 2, 40, 96, BF16)
    found, xla, truth = (
        both_ways(arrays, "interpret_gpu"),
        both_ways(arrays, "xla"),
        both_ways(exact(arrays), "reference"),
    )
    assert found[0][0].dtype == BF16 and found[0][1].dtype == jnp.float32
    parts = [jax.tree.leaves(tree) for tree in (found, xla, truth)]
    assert len(parts[0]) == 6
    for part in zip(*parts, strict=True):  # o, state; dq, dk, dv, dstate: each on its own
        assert_as_good(*part, BF16)


@pytest.mark.parametrize("reverse", [False, True])
def test_no_race(reverse: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """More chunks than stages, and one stage alone: a chunk is not overwritten before it is used."""
    q, k, v, decay, state = arrays_of(1, 300, 1, 64, 64, BF16)
    heads = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    truth = reference.chunked(*exact(heads), Problem(jnp.log(decay), state, reverse))
    for stages in (1, 3):
        run = functools.partial(gpu.chunked, how=how(stages=stages))
        found = without_gpu_races(lambda run=run: run(*heads, Problem(jnp.log(decay), state, reverse)), capfd)
        assert rms_ratio(found, truth) < 5e-3


def test_a_race_is_seen(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, decay, state = arrays_of(1, 64, 1, 64, 64, BF16)
    heads = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    monkeypatch.setattr(gpu.plgpu, "barrier_wait", lambda barrier: None)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        without_gpu_races(lambda: gpu.chunked(*heads, Problem(jnp.log(decay), state)), capfd)


def test_heads_over_eight_devices_lower_for_cuda() -> None:
    """Interpreted on 8 devices at once jax's interpreter does not return; so the lowering, of 2 heads to a device."""
    x, decay = jax.ShapeDtypeStruct((1, 8192, 16, 128), BF16), jax.ShapeDtypeStruct((16,), jnp.float32)
    heads = P(None, None, "tensor")
    split = jax.shard_map(
        functools.partial(lightning, how=how("gpu", "h100")),
        mesh=auto_mesh((8,), ("tensor",)),
        in_specs=(heads, heads, heads, P("tensor")),
        out_specs=(heads, P(None, "tensor")),
        check_vma=False,
    )
    text = lowered_for_gpu(split, x, x, x, decay)
    assert "@mosaic_gpu" in text and "1x8192x2x128xbf16" in text


def test_real_sizes_lower_for_cuda() -> None:
    cases = {case.name: case for case in bench.gpu_cases()}
    longest = cases["131072x32x128 forward, gpu"]
    assert lowered_for_gpu(longest.fn, *longest.args).count("@mosaic_gpu") == 1
    train = cases["8192x32x128 backward, gpu"]
    text = lowered_for_gpu(train.fn, *train.args)
    assert text.count("@mosaic_gpu") == 4
    assert 2**16 < train.tile_bytes < common.GPUS["h100"].smem // 2  # two blocks to a multiprocessor
    auto = functools.partial(lightning, how=how(chip="h100"))
    assert "@mosaic_gpu" in lowered_for_gpu(auto, *longest.args)
    assert "mosaic_gpu" not in lowered_for_gpu(lightning, *longest.args)  # for what chip was not said


def test_what_it_cannot_serve_runs_on_xla() -> None:
    def call(D: int = 64, dtype: Any = BF16, **given: Any) -> Any:
        x = jax.ShapeDtypeStruct((1, 128, 2, D), dtype)
        decay = jax.ShapeDtypeStruct((2,), jnp.float32)
        return functools.partial(lightning, how=how(chip="h100", **given)), x, x, x, decay

    for message, given in {
        "float32, the matrix unit": {"dtype": jnp.float32},
        "queries of width 192, the registers": {"D": 192},
        "chunks of 32 tokens, the kernel takes 64": {"chunk": 32},
        "bytes of shared memory, a block has 232448": {"stages": 16},
    }.items():
        assert "mosaic_gpu" not in lowered_for_gpu(*call(**given))
        for name in ("gpu", "interpret_gpu"):
            with pytest.raises(UserError, match=f"{name!r} cannot serve this call: .*{message}"):
                fn, *args = call(**given, implementation=name)
                jax.eval_shape(fn, *args)
    with pytest.raises(UserError, match="stages 0; valid: at least 1"):
        fn, *args = call(stages=0)
        jax.eval_shape(fn, *args)
