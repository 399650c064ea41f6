"""`block_table`: the kernel interpreted against all pairs in float32, its limits, LongHeads, 8 devices, errors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_table_arrays import call, drawn
from cases.model import BASE, TOKENS, forward, parameters
from jax.experimental.pallas import tpu as pltpu
from kernel_checks import STRICT, assert_as_good, exact, how, lowered_for_tpu, rms_ratio, without_races

from kernels_pallas import common
from kernels_pallas.block_table import bench, tpu
from kernels_pallas.block_table.api import block_table
from kernels_pallas.block_table.bench import Size
from kernels_pallas.block_table.problem import Problem
from kernels_pallas.flash.api import flash
from kernels_pallas.flash.problem import Problem as FlashProblem
from lm import caches, compat
from lm.attention.attend import attend
from lm.attention.branches import BlockBranch, Context, Keys, Tokens, merge
from lm.attention.masks import Causal
from lm.config import merge as change
from lm.errors import UserError
from lm.patterns import TABLE
from lm.positions.rope import Rope

F32, BF16 = jnp.float32, jnp.bfloat16


def forms(*args: Any, names: tuple[str, ...] = ("reference", "xla", "interpret"), **given: Any) -> dict[str, Any]:
    """`block_table` by every name, one program."""
    arrays = {key: x for key, x in given.items() if isinstance(x, jax.Array)}
    static = {key: x for key, x in given.items() if key not in arrays}

    @jax.jit
    def run(args: Any, arrays: Any) -> Any:
        return {name: block_table(*args, Problem(**arrays, **static), how(name)) for name in names}

    return dict(run(args, arrays))


def qkv(T: int, S: int, H: int = 4, K: int = 2, d: int = 8, B: int = 1, dtype: Any = F32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(T)
    return tuple(jnp.asarray(rng.normal(size=(B, s, n, d)), dtype) for s, n in ((T, H), (S, K), (S, K)))


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (Size(37, 100, 8, 5, 16, 2, 4, 2, 64, F32), {"entries": 2}),  # two queries and four slots past whole blocks
        (Size(37, 100, 8, 5, 16, 2, 4, 2, 64, F32, shared=True, turns=3, lead=False), {"softcap": 2.0}),
        (Size(20, 90, 1, 3, 8, 1, 2, 1, 128, F32, turns=2), {"kib": 1, "entries": 3}),  # lists in several calls
        (Size(1, 90, 1, 4, 16, 3, 4, 1, 128, F32, shared=True), {"scale": 0.3}),
        (Size(24, 8, 8, 2, 16, 1, 2, 2, 64, F32), {}),  # fewer keys than a block and than queries
        (Size(24, 96, 8, 4, 16, 2, 4, 2, 128, BF16, turns=3), {}),
        (Size(1, 200, 1, 4, 32, 2, 4, 2, 64, BF16), {}),
    ],
    ids=str,
)
def test_equals_all_pairs(size: Size, given: dict[str, Any]) -> None:
    """Per head and shared lists, turns, lengths that differ by row, empty and double entries."""
    args = drawn(size)
    ids = np.asarray(args[3])
    plain = {k: v for k, v in given.items() if k in ("softcap", "scale")}
    want = call(size, how("reference"), exact(args), **plain)
    sizes = {k: v for k, v in given.items() if k not in plain}
    found = call(size, how("interpret", **sizes), args, **plain)
    assert_as_good(found, call(size, how("xla"), args, **plain), want, size.dtype)
    if size.n == 5:
        assert (ids < 0).any() and any(len(set(row[row >= 0])) < (row >= 0).sum() for row in ids.reshape(-1, 5))


def test_what_is_past_the_length_is_never_seen() -> None:
    """Slots past a row's length hold NaN; lists name them; some queries see nothing at all."""
    q, k, v = qkv(6, 40, B=2)
    lengths = jnp.asarray([40, 11])
    bad = jnp.arange(40)[None, :, None, None] >= lengths[:, None, None, None]
    k, v = jnp.where(bad, jnp.nan, k), jnp.where(bad, jnp.nan, v)
    blocks = jnp.asarray(np.random.default_rng(1).integers(-1, 5, (2, 2, 3, 4)), jnp.int32).at[:, 1, 1].set(-1)
    settings: dict[str, Any] = {"block_size": 8, "q_block": 2, "lengths": lengths}
    settings["positions"] = jnp.asarray([[3, -1, 39, 8, 0, 99]] * 2)
    found = forms(q, k, v, blocks, **settings)
    out, lse = found["reference"]
    none = np.asarray(lse) == -np.inf
    assert none[:, 1].all() and none[:, 2:4, 2:].all() and not none.all()
    assert np.isfinite(np.asarray(out)).all() and not np.asarray(out)[none].any()
    for name in ("xla", "interpret"):
        assert ((np.asarray(found[name][1]) == -np.inf) == none).all()
        assert rms_ratio(found[name][0], out) <= 1e-6 and not np.asarray(found[name][0])[none].any()
        assert rms_ratio(found[name][1][~none], lse[~none]) <= 1e-6


def test_all_blocks_or_one_large_block_is_causal_attention() -> None:
    q, k, v = qkv(40, 40)
    want = jax.jit(lambda *x: flash(*x, FlashProblem(Causal()), how("reference")))(q, k, v)
    order = tuple(np.random.default_rng(0).permutation(5).tolist())
    for size, ids in ((8, order), (64, (0, -1, 0))):
        blocks = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (1, 4, 5, len(ids)))
        found = forms(q, k, v, blocks, names=("interpret",), block_size=size, q_block=8)["interpret"]
        assert rms_ratio(found, want) <= 5e-7


def test_a_block_listed_twice_counts_once_at_its_first_entry() -> None:
    q, k, v = qkv(4, 32)
    blocks = jnp.asarray([2, 1, 2, 2, -1, 1], jnp.int32) * jnp.ones((1, 2, 1, 1), jnp.int32)
    turn = jnp.asarray([0, 1, 1, 2, 0, 2], jnp.int32) * jnp.ones_like(blocks)
    settings: dict[str, Any] = {"block_size": 8, "q_block": 4, "angles": jnp.asarray([[0.3], [1.0], [2.0]])}
    once = forms(q, k, v, blocks[..., :2], turn=turn[..., :2], names=("reference",), **settings)["reference"]
    for name, twice in forms(q, k, v, blocks, turn=turn, **settings).items():
        assert rms_ratio(twice, once) <= 1e-6, name


def test_turns_move_the_query_as_rotary_positions_do() -> None:
    """Turned queries over one block equal queries rotated to another place; channels past 2 m stay."""
    rope, (q, k, v) = Rope(fraction=0.75), qkv(8, 16)
    blocks = jnp.ones((1, 4, 1, 1), jnp.int32)
    plain = Problem(block_size=8, q_block=8)

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> Any:
        at = jnp.arange(8.0)[None, :, None] + 8
        keys = rope.rotate(k, jnp.arange(16.0)[None, :, None], 16)
        angles = jnp.asarray([0.0, 5.5])[:, None] * rope.scaling.frequencies(rope.theta, 6, 16, 2048)[0]
        want = block_table(rope.rotate(q, at + 5.5, 16), keys, v, blocks, plain, how("interpret"))
        turned = dataclasses.replace(plain, turn=blocks, angles=angles)
        return want, block_table(rope.rotate(q, at, 16), keys, v, blocks, turned, how("interpret"))

    want, found = both(q, k, v)
    assert rms_ratio(found, want) <= 1e-6


@pytest.mark.parametrize("include_self", [True, False])
def test_longheads_of_its_own_choice(include_self: bool) -> None:
    """A prompt: two plain branches, and the chosen chunks by the kernel, merged; equal to the pattern's own output."""
    T, w, n = 43, 4, 5
    index = jnp.arange(T, dtype=jnp.int32)[None]
    side, rope = Tokens(index, index.astype(F32), contiguous=True), Rope(trained=w * n)
    pattern = TABLE["longheads"](w, w * n, include_self=include_self)

    @jax.jit
    def run(q: Any, k: Any, v: Any) -> Any:
        ctx = Context(q, side, (Keys(k, v, side),), rope, jnp.float32(T), 8**-0.5)
        branches = pattern.branches(ctx)
        listed = branches[-1]
        assert isinstance(listed, BlockBranch)
        outs, lses = attend(ctx, branches[:-1], backend="dense")
        first = listed.q_positions[:, 0, :, 0]  # of the query, for the first chunk listed; every later one is w nearer
        places = jnp.arange(n - 3)
        out, lse = block_table(
            rope.rotate(q, first[:, :, None], T),
            rope.rotate(k, listed.k_positions[:, :, None], T),
            v,
            listed.ids_BHTn,
            Problem(
                block_size=w,
                positions=jnp.where(index >= w * n, index, -1),
                turn=jnp.broadcast_to(places, listed.ids_BHTn.shape).astype(jnp.int32),
                angles=-w * places[:, None] * rope.scaling.frequencies(rope.theta, 8, T, w * n)[0],
            ),
            how("interpret"),
        )
        found = merge([outs, out], [lses, lse])
        return attend(ctx, branches, backend="dense"), found, (outs, lses), listed.ids_BHTn

    want, found, without, ids = run(*qkv(T, T))
    assert rms_ratio(found, want) <= 1e-6
    assert (ids >= 0).any() and rms_ratio(without, want) > 0.1  # the chosen chunks matter


def test_longheads_decodes_by_the_kernel() -> None:
    """A model with a cache: a prompt of unequal rows, then tokens one by one, past where chunks are chosen; equal to
    `dense`, and the steps contain the kernel."""
    plug = {"pattern": {"name": "longheads", "chunk": 4, "attention_length": 16}}
    params, prompt, pad = parameters(BASE), 22, 7
    index = np.stack([np.arange(27), np.r_[[-1] * pad, np.arange(27 - pad)]]).astype(np.int32)
    found = {}
    for backend in ("dense", "pallas"):
        cfg = change(BASE, {**plug, "mixer": {"backend": backend}}, "model")
        step = functools.partial(forward(cfg), params)
        cache, logits = caches.init(cfg, 2, 32), []
        for at, n in ((0, prompt), *((t, 1) for t in range(prompt, 27))):
            given = {"tokens_BT": TOKENS[:, at : at + n], "index_BT": index[:, at : at + n], "cache": cache}
            if at == prompt:
                text = str(jax.make_jaxpr(step)(**given))
                assert ("name=block_table" in text) == (backend == "pallas")
            out = step(**given)
            cache = out.cache
            logits.append(out.logits_BTV)
        whole = np.concatenate(logits, axis=1)
        found[backend] = np.concatenate([whole[0], whole[1, pad:]])
    assert rms_ratio(found["pallas"], found["dense"]) <= 1e-5


def test_nothing_races_and_nothing_is_read_unwritten(capfd: pytest.CaptureFixture[str]) -> None:
    size = Size(12, 90, 4, 4, 16, 1, 4, 2, 64, F32, shared=True, turns=2)
    args = drawn(size)
    run = functools.partial(bench.attend, size, *args, how=how("interpret", interpret=STRICT, entries=2))
    found = without_races(jax.jit(run), capfd)
    pltpu.reset_tpu_interpret_mode_state()
    assert rms_ratio(found, call(size, how("reference"), args)) <= 1e-6


def test_gradients_are_those_of_all_pairs() -> None:
    """Through output and log-sum-exp, with queries that see nothing; lists and angles have none."""
    q, k, v = qkv(12, 40)
    blocks = jnp.asarray(np.random.default_rng(2).integers(-1, 5, (1, 4, 3, 3)), jnp.int32).at[:, 0].set(-1)
    angles = jnp.asarray([[0.5, 0.1]])

    def loss(args: Any, name: str) -> jax.Array:
        problem = Problem(block_size=8, q_block=4, turn=jnp.zeros_like(blocks), angles=angles)
        out, lse = block_table(*args, blocks, problem, how(name))
        return jnp.sin(3 * out).sum() + jnp.where(lse == -jnp.inf, 0.0, jnp.cos(lse)).sum()

    found = jax.jit(jax.grad(functools.partial(loss, name="interpret")))((q, k, v))
    want = jax.jit(jax.grad(lambda args: _dense_loss(args, blocks, angles)))((q, k, v))
    for a, b in zip(found, want, strict=True):
        assert rms_ratio(a, b) <= 2e-6


def _dense_loss(args: Any, blocks: jax.Array, angles: jax.Array) -> jax.Array:
    """The same loss, through a softmax over all keys, written out."""
    q, k, v = args
    k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
    cos, sin = jnp.cos(angles[0]), jnp.sin(angles[0])
    q = jnp.concatenate([q[..., :2] * cos - q[..., 2:4] * sin, q[..., 2:4] * cos + q[..., :2] * sin, q[..., 4:]], -1)
    seen = (blocks[..., None] == jnp.arange(40) // 8).any(3).repeat(4, axis=2) & (
        jnp.arange(40) <= jnp.arange(28, 40)[:, None]
    )
    s = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", q, k) * 8**-0.5, -1e30)
    some = seen.any(-1, keepdims=True)
    out = jnp.einsum("bhts,bshd->bthd", jnp.where(some, jax.nn.softmax(s, -1), 0.0), v)
    return jnp.sin(3 * out).sum() + jnp.where(some[..., 0], jnp.cos(jax.nn.logsumexp(s, -1)), 0.0).sum()


def test_inside_shard_map_on_8_devices() -> None:
    """Rows over 4 devices, heads and their lists over 2."""
    mesh = compat.auto_mesh((4, 2), ("data", "tensor"))
    size = Size(12, 40, 4, 3, 8, 4, 4, 2, 64, F32, shared=True, turns=2)
    args = drawn(size)
    found = call(size, how("interpret", mesh=mesh), args)
    assert rms_ratio(found, call(size, how("reference"), args)) <= 1e-6
    assert found[0].sharding.spec[0] == "data" and found[0].sharding.spec[2] == "tensor"


def test_words_name_what_is_fetched() -> None:
    """Ascending; what is empty, double or unseen repeats the block before it and does not run."""
    at = jnp.asarray([[[39, 41]]])
    ids = jnp.asarray([[[[7, 2, -1, 5, 2, 4, 9, 6]]]])
    words = tpu.words(ids, ids + 1, at, jnp.asarray([70]), 8, 9)[0, 0, 0]
    assert (words & 0x1FFFF).tolist() == [2, 2, 4, 5, 5, 5, 5, 5]
    assert ((words & tpu.RUN) > 0).tolist() == [True, False, True, True, False, False, False, False]
    assert ((words & tpu.WHOLE) > 0).tolist()[:4] == [True, True, True, False]
    assert ((words >> tpu.ID_BITS) & 0xFFF).tolist()[:4] == [3, 3, 5, 6]


def test_real_sizes_lower_for_a_tpu_and_say_what_they_take() -> None:
    for chip in ("v4", "v6e"):
        for case in bench.cases(chip)[:: 4 if chip == "v4" else 5]:
            assert "tpu_custom_call" in lowered_for_tpu(case.fn, *case.args), case.name
            assert 2**18 < case.tile_bytes < 12 * 2**20
    case = bench.gpu_cases()[0]
    assert "tpu_custom_call" not in lowered_for_tpu(case.fn, *case.args)


def test_errors_say_what_is_valid() -> None:
    q, k, v = qkv(8, 32)
    blocks = jnp.zeros((1, 4, 2, 3), jnp.int32)

    def run(*arrays: Any, how: common.How = common.AUTO, **changes: Any) -> Any:
        return block_table(*arrays, Problem(**{"block_size": 8, "q_block": 4} | changes), how)

    angles = jnp.zeros((2, 4))
    for message, work in {
        r"found q float16.*all bfloat16": lambda: run(*(x.astype(jnp.float16) for x in (q, k, v)), blocks),
        r"found q float32, k bfloat16": lambda: run(q, k.astype(BF16), v, blocks),
        r"q \(1, 8, 4\).*valid: q \[B, T, H, d\]": lambda: run(q[..., 0], k, v, blocks),
        r"key heads a divisor of 4": lambda: run(
            q, jnp.repeat(k, 2, 2)[:, :, :3], jnp.repeat(v, 2, 2)[:, :, :3], blocks
        ),
        r"v \(1, 2, 31, 8\); valid: k and v alike": lambda: run(q, k, v[:, :31], blocks),
        r"blocks int32\[1, 4, 3, 3\]; valid: int32 \[1, 4 or 2, 2, n\]": lambda: run(q, k, v, blocks[:, :, [0, 1, 1]]),
        r"blocks float32": lambda: run(q, k, v, blocks.astype(F32)),
        r"block 4 of 4; valid: 0 to 3": lambda: run(q, k, v, blocks.at[0, 0, 0, 0].set(4)),
        r"block_size 0; valid": lambda: run(q, k, v, blocks, block_size=0),
        r"turn without angles; valid: both": lambda: run(q, k, v, blocks, turn=blocks),
        r"angles without turn": lambda: run(q, k, v, blocks, angles=angles),
        r"turn int32\[1, 4, 2, 2\]": lambda: run(q, k, v, blocks, turn=blocks[..., :2], angles=angles),
        r"angles float32\[2, 5\]; valid: float32 \[P, 1 to 4\]": lambda: run(
            q, k, v, blocks, turn=blocks, angles=jnp.zeros((2, 5))
        ),
        r"turns 0 to 2; valid: rows of angles, 0 to 1": lambda: run(
            q, k, v, blocks, turn=blocks.at[0, 0, 0, 0].set(2), angles=angles
        ),
        r"lengths int32\[2\]; valid: integers \[1\]": lambda: run(q, k, v, blocks, lengths=jnp.zeros(2, jnp.int32)),
        r"positions float32\[1, 8\]; valid: integers \[1, 8\]": lambda: run(
            q, k, v, blocks, positions=jnp.zeros((1, 8))
        ),
        r"entries 0; valid: at least 1": lambda: run(q, k, v, blocks, how=how(entries=0)),
        r"chip: unknown name 'v9'|'v9'": lambda: run(q, k, v, blocks, how=how(chip="v9")),
        r"'tpu' cannot serve this call: blocks of 12 keys": lambda: run(q, k, v, blocks, block_size=12, how=how("tpu")),
        r"head width 512": lambda: run(*qkv(8, 32, d=512), blocks, how=how("interpret")),
        r"MiB of fast memory": lambda: run(q, k, v, blocks[:, :, :1], block_size=8, q_block=65536, how=how("tpu")),
    }.items():
        with pytest.raises(UserError, match=message):
            work()
    assert (
        jax.eval_shape(functools.partial(run, block_size=12), q, k, v, blocks)[0].shape == q.shape
    )  # 'auto' takes the form that can
