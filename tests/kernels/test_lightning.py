"""Linear attention with decay: forward, gradients and carried states against a loop over tokens."""

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
from lightning_arrays import arrays_of, both_ways

from kernels_pallas.lightning import bench, reference, tpu
from kernels_pallas.lightning.api import lightning
from kernels_pallas.lightning.problem import Problem
from lm.compat import auto_mesh
from lm.errors import UserError

# B, T, H, D, E, chunk, dtype: whole and broken last chunks, a chunk longer than the text, D wider and narrower than E.
GRID = [
    (2, 40, 3, 16, 8, 16, jnp.float32),
    (1, 5, 3, 8, 24, 128, jnp.float32),
    (2, 37, 3, 96, 64, 16, jnp.bfloat16),
]


@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(str(getattr(v, "__name__", v)) for v in c))
def test_results_and_gradients_are_those_of_the_loop(case: tuple[Any, ...]) -> None:
    *shape, chunk, dtype = case
    arrays = arrays_of(*shape, dtype)
    truth = both_ways(exact(arrays), "reference")
    found, xla = both_ways(arrays, "interpret", chunk), both_ways(arrays, "xla", chunk)
    assert found[0][0].dtype == dtype and found[0][1].dtype == jnp.float32
    parts = [jax.tree.leaves(tree) for tree in (found, xla, truth)]
    assert len(parts[0]) == 6
    for part in zip(*parts, strict=True):  # o, state; dq, dk, dv, dstate: each on its own
        assert_as_good(*part, dtype)


def test_gradient_of_the_loop_is_that_of_the_chunks_by_autodiff() -> None:
    """The truth of the gradients, found a second way: differentiating the chunked form itself."""
    q, k, v, decay, state = arrays_of(1, 20, 3, 8, 8, jnp.float32)

    def loop(q: Any, k: Any, v: Any, state: Any) -> Any:
        o, last = reference.recurrent(q, k, v, decay, state)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(last))

    def chunks(q: Any, k: Any, v: Any, state: Any) -> Any:
        heads = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        o, last = reference.chunked(*heads, Problem(jnp.log(decay), state), chunk=8)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(last))

    a, b = (jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(q, k, v, state) for f in (loop, chunks))
    assert rms_ratio(a, b) < 1e-5


def test_without_decay_it_is_attention_without_softmax() -> None:
    q, k, v, _, _ = arrays_of(1, 12, 2, 8, 8, jnp.float32)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * np.tril(np.ones((12, 12)))
    o, last = jax.jit(functools.partial(lightning, how=how(chunk=8)))(q, k, v, jnp.ones(2))
    assert rms_ratio(o, jnp.einsum("bhij,bjhe->bihe", scores, v)) < 1e-5
    assert rms_ratio(last, jnp.einsum("bjhd,bjhe->bhde", k, v)) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_a_text_in_two_parts_is_the_text(implementation: str) -> None:
    q, k, v, decay, state = arrays_of(1, 21, 3, 8, 8, jnp.float32)
    call = jax.jit(functools.partial(lightning, decay=decay, how=how(implementation, chunk=8)))
    whole, last = call(q, k, v, state=state)
    first, handed = call(q[:, :13], k[:, :13], v[:, :13], state=state)
    second, end = call(q[:, 13:], k[:, 13:], v[:, 13:], state=handed)
    assert rms_ratio((jnp.concatenate([first, second], 1), end), (whole, last)) < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
def test_no_race_and_nothing_uninitialised(reverse: bool, capfd: pytest.CaptureFixture[str]) -> None:
    q, k, v, decay, state = arrays_of(1, 21, 3, 16, 8, jnp.float32)
    heads = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    problem = Problem(jnp.log(decay), state, reverse)
    kernel = functools.partial(tpu.chunked, *heads, problem, how(interpret=STRICT, chunk=8))
    found = without_races(kernel, capfd)
    truth = reference.chunked(*heads, problem, chunk=5)
    assert rms_ratio(found, truth) < 1e-5


def test_heads_over_eight_devices() -> None:
    q, k, v, decay, state = arrays_of(1, 16, 8, 8, 8, jnp.float32)
    heads = P(None, None, "tensor")
    split = jax.shard_map(
        functools.partial(lightning, how=how("interpret", chunk=8)),
        mesh=auto_mesh((8,), ("tensor",)),
        in_specs=(heads, heads, heads, P("tensor"), P(None, "tensor")),
        out_specs=(heads, P(None, "tensor")),
        check_vma=False,
    )
    assert rms_ratio(jax.jit(split)(q, k, v, decay, state), reference.recurrent(q, k, v, decay, state)) < 1e-5


def test_lowers_for_a_tpu() -> None:
    forward, train = bench.cases("v6e")[:2]
    assert lowered_for_tpu(forward.fn, *forward.args).count("tpu_custom_call") == 1
    assert lowered_for_tpu(train.fn, *train.args).count("@tpu_custom_call") == 4
    assert "tpu_custom_call" in lowered_for_tpu(lightning, *forward.args)
    assert "custom_call" not in jax.jit(lightning).lower(*forward.args).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": how("pallas")}, "lightning: implementation: unknown name 'pallas'"),
        ({"how": how(chip="v7")}, "lightning: chip: unknown name 'v7'"),
        ({"k": jnp.zeros((1, 4, 2, 4))}, "k (1, 4, 2, 4)"),
        ({"v": jnp.zeros((1, 4, 2, 8), jnp.bfloat16)}, "v bfloat16; valid: all bfloat16 or all float32"),
        ({"decay": jnp.ones(3)}, "decay (3,); valid: one per head, (2,)"),
        ({"state": jnp.zeros((1, 2, 8, 4))}, "state (1, 2, 8, 4); valid: [B, H, D, E], here (1, 2, 8, 8)"),
        ({"how": how(chunk=12)}, "chunk 12; valid: a multiple of 8"),
    ],
)
def test_mistakes_are_said_in_one_line(change: dict[str, Any], message: str) -> None:
    x = jnp.zeros((1, 4, 2, 8))
    call: dict[str, Any] = {"q": x, "k": x, "v": x, "decay": jnp.ones(2), **change}
    with pytest.raises(UserError) as found:
        lightning(**call)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_wide_heads_run_on_xla() -> None:
    x = jax.ShapeDtypeStruct((1, 16, 1, 1024), jnp.bfloat16)
    decay = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(UserError, match="head widths 1024 and 1024, the kernel holds up to 512"):
        jax.eval_shape(functools.partial(lightning, how=how("tpu")), x, x, x, decay)
    assert "tpu_custom_call" not in lowered_for_tpu(lightning, x, x, x, decay)


def test_bench_writes_its_table(tmp_path: Path) -> None:
    bench.main(["--size=small", "--repeats=1", f"--json={tmp_path}/t.json"])
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["case"] for row in rows[:2]] == ["100x2x16 float32 forward", "100x2x16 float32 backward"]
    assert all(row["seconds"]["xla"] > 0 for row in rows)
