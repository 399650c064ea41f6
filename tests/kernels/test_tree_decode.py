"""Attention of a tree of draft nodes: masks, the kernel against one softmax over everything, limits, refusals."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_checks import STRICT, assert_as_good, exact, how, lowered_for_tpu, rms_ratio, without_races
from tree_decode_arrays import arrays_of

from kernels_pallas.tree_decode import bench, tpu
from kernels_pallas.tree_decode.api import tree_decode
from kernels_pallas.tree_decode.bench import Size, tree
from kernels_pallas.tree_decode.masks import ancestors_of, pack_mask, unpack_mask
from kernels_pallas.tree_decode.problem import Problem
from lm.compat import auto_mesh
from lm.errors import UserError

F32, BF16 = jnp.float32, jnp.bfloat16
call = jax.jit(tree_decode, static_argnames="how")
# Nodes that do and do not fill tiles of 16 and words of 32; slots that do and do not fill tiles of 128; widths; GQA.
GRID = [
    (Size(1, 128, 2, 2, 1, 64, F32), (128, 0)),
    (Size(8, 300, 3, 4, 2, 64, F32), (300, 0, 129)),
    (Size(33, 200, 2, 2, 2, 96, F32, packed=True), (1, 200)),
    (Size(64, 256, 2, 4, 1, 128, BF16), (256, 37)),
    (Size(64, 130, 2, 2, 1, 64, F32, packed=True), (128, 999)),  # 999: more than there are
    (Size(256, 140, 1, 2, 1, 64, BF16, packed=True), (139,)),
]


def _one_by_one(arrays: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The truth in numpy and float64: for each node and head the keys it sees, and a softmax over them."""
    q, k, v, lengths, new_k, new_v, seen = (np.asarray(a) for a in jax.tree.leaves(arrays))
    q, k, v, new_k, new_v = (a.astype(np.float64) for a in (q, k, v, new_k, new_v))
    B, N, H, d = q.shape
    out, lse = np.zeros(q.shape), np.full((B, N, H), -np.inf)
    for b, n, h in np.ndindex(B, N, H):
        g, own = h // (H // k.shape[1]), seen[n]
        keys = np.concatenate([k[b, g, : lengths[b]], new_k[b, own, g]])
        values = np.concatenate([v[b, g, : lengths[b]], new_v[b, own, g]])
        if len(keys):
            scores = keys @ q[b, n, h] / np.sqrt(d)
            lse[b, n, h] = np.log(np.exp(scores).sum())
            out[b, n, h] = np.exp(scores - lse[b, n, h]) @ values
    return out, lse


def test_ancestors_of_a_tree_and_their_bits() -> None:
    #       0     1 (a second root)
    #      2 3    4
    #        5
    mask = np.asarray(ancestors_of(jnp.array([-1, -1, 0, 0, 1, 3])))
    assert [set(np.flatnonzero(row)) for row in mask] == [{0}, {1}, {0, 2}, {0, 3}, {1, 4}, {0, 3, 5}]
    for N in (1, 31, 32, 33, 70):
        mask = np.asarray(tree(np.random.default_rng(N), N))
        words = np.asarray(pack_mask(jnp.asarray(mask)))
        assert words.dtype == np.uint32 and words.shape == (N, -(-N // 32))
        assert bool(words[N - 1, (N - 1) // 32] >> np.uint32((N - 1) % 32) & 1)
        np.testing.assert_array_equal(unpack_mask(jnp.asarray(words)), mask)


def test_reference_against_numpy() -> None:
    size = Size(9, 12, 2, 4, 2, 8, F32)
    arrays = arrays_of(size, (12, 0), rubbish=0.0)
    out, lse = _one_by_one(arrays)
    for implementation in ("reference", "xla"):
        assert rms_ratio(call(*arrays, how(implementation)), (out, lse)) < 1e-6


@pytest.mark.parametrize(("size", "lengths"), GRID, ids=lambda x: str(x))
def test_kernel_is_the_reference(size: Size, lengths: tuple[int, ...]) -> None:
    """Output and log-sum-exp; NaN in every slot that is not valid reaches neither."""
    arrays = arrays_of(size, lengths)
    found = call(*arrays, how("interpret", tile_s=128))
    truth = call(*exact(arrays_of(size, lengths, rubbish=0.0)), how("reference"))
    xla = call(*arrays, how("xla"))
    assert found[0].dtype == size.dtype and found[1].dtype == F32
    for part in zip(found, xla, truth, strict=True):
        assert_as_good(*part, size.dtype)


def test_a_tree_for_each_row_and_nodes_that_see_nothing() -> None:
    size = Size(20, 130, 2, 2, 1, 64, F32)
    *arrays, problem = arrays_of(size, (0, 130))
    mask = problem.ancestors
    masks = jnp.stack([mask.at[3].set(False), tree(np.random.default_rng(1), 20)])
    want_out, want = call(*arrays, replace(problem, ancestors=masks), how("reference"))
    assert np.isneginf(want[0, 3]).all() and not np.any(want_out[0, 3])
    for implementation in ("interpret", "xla"):
        for seen in (masks, pack_mask(masks)):
            out, lse = call(*arrays, replace(problem, ancestors=seen), how(implementation))
            np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want))
            assert rms_ratio(out, want_out) < 1e-5
            assert rms_ratio(np.exp(lse), np.exp(want)) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_a_chain_is_decoding_token_by_token(implementation: str) -> None:
    """A tree without branches: node i gives what plain attention gives once nodes 0 ... i are in the cache."""
    size, first = Size(6, 140, 1, 4, 2, 64, F32), 127
    q, k, v, problem = arrays_of(size, (first,), rubbish=0.0)
    chain = ancestors_of(jnp.arange(-1, 5))
    np.testing.assert_array_equal(chain, np.tril(np.ones((6, 6), bool)))
    out, lse = call(q, k, v, replace(problem, ancestors=chain), how(implementation, tile_s=128))
    keys, values = (np.array(x).swapaxes(1, 2) for x in (k, v))
    keys[:, first : first + 6], values[:, first : first + 6] = problem.new_k, problem.new_v
    written = np.arange(140) < first + 1 + np.arange(6)[:, None]
    decode = functools.partial(jax.nn.dot_product_attention, mask=written[None, None])
    want = jax.jit(decode)(q, jnp.asarray(keys), jnp.asarray(values))
    assert rms_ratio(out, want) < 1e-5
    scores = np.einsum("thd,shd->ths", q[0], keys[0].repeat(2, axis=1), dtype=np.float64) / 8
    total = np.where(written[:, None], np.exp(scores), 0).sum(-1)
    assert rms_ratio(lse[0], np.log(total)) < 1e-6


def test_tile_and_scale_change_nothing_else() -> None:
    size, lengths = Size(8, 400, 2, 2, 1, 64, F32), (390, 100)

    def scaled(rubbish: float) -> tuple[Any, ...]:
        *arrays, problem = arrays_of(size, lengths, rubbish=rubbish)
        return *arrays, replace(problem, scale=0.05)

    want = call(*scaled(0.0), how("reference"))
    for tile in (256, None):
        assert rms_ratio(call(*scaled(float("nan")), how("interpret", tile_s=tile)), want) < 1e-5


def test_no_race_and_nothing_uninitialised(capfd: pytest.CaptureFixture[str]) -> None:
    arrays = arrays_of(Size(9, 200, 2, 2, 1, 16, F32), (150, 0))
    q, k, v, problem = arrays
    kernel = functools.partial(tpu.tree_decode, how=how(interpret=STRICT, tile_s=128))
    truth = call(*arrays, how("reference"))
    found = without_races(lambda: kernel(q, k, v, problem.filled(q, k, v)), capfd)
    assert rms_ratio(found, truth) < 1e-5


def test_key_heads_over_eight_devices() -> None:
    size = Size(5, 24, 2, 16, 8, 8, F32)
    arrays = arrays_of(size, (24, 7))
    heads, cache = P(None, None, "tensor"), P(None, "tensor")
    split = jax.shard_map(
        functools.partial(tree_decode, how=how("interpret")),
        mesh=auto_mesh((8,), ("tensor",)),
        in_specs=(heads, cache, cache, Problem(P(), heads, heads, P())),
        out_specs=(heads, heads),
        check_vma=False,
    )
    assert rms_ratio(jax.jit(split)(*arrays), call(*arrays, how("reference"))) < 1e-5


def test_lowers_for_a_tpu() -> None:
    case = bench.cases("v5e")[0]
    assert lowered_for_tpu(case.fn, *case.args).count("@tpu_custom_call") == 1
    assert "tpu_custom_call" in lowered_for_tpu(tree_decode, *case.args)
    assert "custom_call" not in jax.jit(tree_decode).lower(*case.args).as_text()
    many = bench.shapes(Size(256, 256, H=32, K=1))
    with pytest.raises(UserError, match="8192 queries per key head, the kernel holds up to 2048; use 'auto'"):
        jax.eval_shape(functools.partial(tree_decode, how=how("tpu")), *many)
    assert "tpu_custom_call" not in lowered_for_tpu(tree_decode, *many)


def test_it_has_no_gradient() -> None:
    q, *rest = arrays_of(Size(3, 16, 1, 2, 1, 8, F32), (16,))
    for implementation in ("auto", "reference"):
        with pytest.raises(UserError, match="tree_decode: it has no gradient; valid: inference"):
            jax.grad(lambda q, i=implementation: tree_decode(q, *rest, how(i))[0].sum())(q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": how("pallas")}, "implementation: unknown name 'pallas'"),
        ({"how": how(chip="v7")}, "chip: unknown name 'v7'"),
        ({"q": jnp.zeros((1, 4, 2))}, "q (1, 4, 2), k (1, 1, 16, 8); valid: q [B, N, H, d], k [B, K, S, d]"),
        ({"v": jnp.zeros((1, 1, 16, 4))}, "v (1, 1, 16, 4); valid: k and v [1, K, S, 8], K a divisor of 2"),
        ({"new_k": jnp.zeros((1, 3, 1, 8))}, "new_k (1, 3, 1, 8), new_v (1, 4, 1, 8); valid: (1, 4, 1, 8)"),
        ({"new_v": jnp.zeros((1, 4, 1, 8), BF16)}, "new_v bfloat16; valid: all bfloat16 or all float32"),
        ({"lengths": jnp.zeros(1)}, "lengths float32[1]; valid: an integer per row, [1]"),
        ({"ancestors": jnp.zeros((4, 1), jnp.int32)}, "ancestors int32[4, 1]; valid: bool [4, 4] or uint32 [4, 1]"),
        ({"ancestors": jnp.zeros((4, 2), jnp.uint32)}, "ancestors uint32[4, 2]"),
        ({"how": how(tile_s=100)}, "tile_s 100; valid: a multiple of 128"),
        ({"how": how(chunk=1)}, "tree_decode: sizes: unknown name 'chunk'"),
        ({"how": how(mesh=auto_mesh((8,), ("tensor",)))}, "tree_decode: a mesh; valid: none, and jax.shard_map"),
        ({"q": jnp.zeros((1, 257, 2, 8))}, "257 nodes; valid: 1 to 256"),
    ],
)
def test_mistakes_are_said_in_one_line(change: dict[str, Any], message: str) -> None:
    cache, new = jnp.zeros((1, 1, 16, 8)), jnp.zeros((1, 4, 1, 8))
    call: dict[str, Any] = {"q": jnp.zeros((1, 4, 2, 8)), "k": cache, "v": cache}
    own = ("lengths", "new_k", "new_v", "ancestors")
    problem = Problem(jnp.array([3]), new, new, jnp.eye(4, dtype=bool))
    problem = replace(problem, **{key: value for key, value in change.items() if key in own})
    call |= {key: value for key, value in change.items() if key not in own}
    with pytest.raises(UserError) as found:
        tree_decode(**call, problem=problem)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_bench_writes_its_table(tmp_path: Path) -> None:
    bench.main(["--size=small", "--repeats=1", f"--json={tmp_path}/t.json"])
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert len(rows) == len(bench.SMALL)
    assert all({"reference", "xla"} <= set(row["seconds"]) for row in rows)
