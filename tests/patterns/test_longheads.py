"""LongHeads against per-token loops in float64, at its limits, through its cache, and on bad input."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases.model import BASE, TOKENS, forward, logits, parameters, rms_ratio

from lm import caches
from lm.attention import blocks
from lm.attention.attend import attend
from lm.attention.backends import listed
from lm.attention.branches import BlockBranch, Context, Keys, Tokens
from lm.attention.masks import Causal
from lm.config import merge, model_config
from lm.errors import UserError
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.patterns import TABLE
from lm.positions.rope import Rope
from lm.watch import Watch

H, K, D, T = 4, 2, 8, 75
W, N = 4, 6
A = W * N
LongHeads = TABLE["longheads"]


@functools.cache
def draw(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple((1.5 * rng.normal(size=(1, T, h, D))).astype(np.float32) for h in (H, K, K))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@functools.cache
def feature(h: int, g: int, seed: int = 0) -> np.ndarray:
    """Item 1 of the method for one query head and one chunk: local positions, no causal mask, two stages."""
    q, k, v = (np.float64(x[0, g * W : (g + 1) * W]) for x in draw(seed))
    q = np.stack([oracles.rotate(q[i, h], i, 10000.0) for i in range(W)])
    k = np.stack([oracles.rotate(k[i, h // (H // K)], i, 10000.0) for i in range(W)])
    out = softmax(q @ k.T / np.sqrt(D)) @ v[:, h // (H // K)]
    return np.asarray(softmax(out.mean(0) @ k.T / np.sqrt(D)) @ k)


def best(t: int, h: int, count: int, candidates: range) -> list[int]:
    q = np.float64(draw()[0][0, t, h])
    ranked = sorted(candidates, key=lambda g: -(q @ feature(h, g)))
    return ranked[:count]


def chosen(t: int, h: int, begin: int, reference: bool = False) -> list[int] | None:
    """Ascending chunk ids, None while everything is seen: items 4 (prefill) and 5 (decoding, the reference code's)."""
    if not reference:
        C = t // W
        return None if t < begin else sorted({0, C - 1, C} | set(best(t, h, N - 3, range(1, C - 1))))
    s = t + 1
    if s < begin:
        return None
    g = s // W
    tail = [g] if s % W else []
    return sorted({0, g - 1} | set(best(t, h, N - 3, range(1, g - 1)))) + tail


def pairs(t: int, h: int, begin: int, include_self: bool, reference: bool = False) -> list[tuple[int, float]]:
    """(key, distance), the keys of the chunks laid side by side."""
    ids = chosen(t, h, begin, reference)
    if ids is None:
        return [(j, float(t - j)) for j in range(t + 1)]
    keys = [j for g in ids for j in range(g * W, (g + 1) * W)]
    if reference:
        keys = [j for j in keys if j <= t]
        assert len(keys) == (N - 1) * W + (t + 1) % W
        at = len(keys) - 1
    else:
        at = (N - 1) * W + t % W
        keys = keys[: at + include_self]
    assert at < A
    return [(j, float(at - p)) for p, j in enumerate(keys)]


def tokens(first: int, n: int) -> Tokens:
    index = jnp.arange(first, first + n, dtype=jnp.int32)[None]
    return Tokens(index, index.astype(jnp.float32), contiguous=first == 0)


@functools.cache
def whole(pattern: Any, backend: str) -> Any:
    @jax.jit
    def run(q: Any, k: Any, v: Any) -> Any:
        side = tokens(0, q.shape[1])
        ctx = Context(q, side, (Keys(k, v, side),), Rope(trained=A), jnp.asarray(1.0 * T), D**-0.5)
        branches = pattern.branches(ctx)
        out = attend(ctx, branches, backend=backend, block_q=16, block_k=8)[0]
        return out[0], pattern.taps(ctx, branches)["blocks"][0]

    return run


@functools.cache
def cached(pattern: Any) -> Any:
    """One call through the cache, as the mixer makes it."""

    @jax.jit
    def run(state: Any, q: Any, k: Any, v: Any, side: Tokens) -> Any:
        rope, length = Rope(trained=A), jnp.asarray(1.0 * T)
        k = rope.rotate(k, state.places(side)[:, :, None], length)
        state, sources = state.extend(Keys(k, v, side, state.rotated))
        state, ctx = state.prepare(Context(q, side, sources, rope, length, D**-0.5))
        branches = pattern.branches(ctx)
        out = attend(ctx, branches, block_q=16, block_k=8)[0]
        return state, out[0], pattern.taps(ctx, branches)["blocks"][0]

    return run


def memory(pattern: Any, quantize: str | None = None) -> Any:
    """The empty state of one row with room for `T` tokens."""
    cfg = dataclasses.replace(BASE, n_heads=H, n_kv_heads=K, head_dim=D, pattern=pattern)
    return caches.TABLE["block_memory"](quantize).init(cfg, 1, T)


def through(pattern: Any, pieces: list[int], quantize: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    state = memory(pattern, quantize)
    outs, ids, at = [], [], 0
    for n in pieces:
        side = dataclasses.replace(tokens(at, n), contiguous=False)
        state, out, picked = cached(pattern)(state, *(x[:, at : at + n] for x in draw()), side)
        outs.append(np.asarray(out, np.float64))
        ids.append(np.asarray(picked))
        at += n
    assert at == T
    return np.concatenate(outs), np.concatenate(ids)


def check_ids(ids: np.ndarray, begin: int, reference_from: int = T) -> None:
    for t in range(T):
        for h in range(H):
            want = chosen(t, h, begin, t >= reference_from)
            got = [int(x) for x in ids[t, h] if x >= 0]
            assert got == (want or []), (t, h)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("begin", [A, A + 2 * W])
def test_prefill(include_self: bool, begin: int) -> None:
    pattern = LongHeads(W, A, begin, include_self)
    want = oracles.attention(*(x[0] for x in draw()), lambda t, h: pairs(t, h, begin, include_self))
    for backend in ("dense", "blocked"):
        got, ids = whole(pattern, backend)(*draw())
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        check_ids(np.asarray(ids), begin)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("begin", [A, A + W])
def test_decoding_by_the_reference_rule(include_self: bool, begin: int) -> None:
    """Single tokens from within the plain prefix on: the first selective one, and every end of a chunk."""
    prompt = A - 3
    pattern = LongHeads(W, A, begin, include_self, "reference")
    got, ids = through(pattern, [prompt, *[1] * (T - prompt)])
    want = oracles.attention(
        *(x[0] for x in draw()), lambda t, h: pairs(t, h, begin, include_self, reference=t >= prompt)
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    check_ids(ids, begin, prompt)
    ends = [t for t in range(begin, T) if (t + 1) % W == 0]
    assert all(len(chosen(t, 0, begin, True) or ()) == N - 1 for t in ends) and len(ends) > 5


PIECES = ([T], [1] * T, [40, 1, 1, 7, 26], [1, 23, 2, 49], [4] * 18 + [3])
SPLITS = [
    *((pieces, True) for pieces in PIECES),
    (PIECES[1], False),
    *(pytest.param(pieces, False, marks=pytest.mark.nightly) for pieces in PIECES if pieces is not PIECES[1]),
]


@pytest.mark.parametrize(("pieces", "include_self"), SPLITS, ids=lambda x: len(x) if isinstance(x, list) else x)
def test_every_split_gives_the_same(pieces: list[int], include_self: bool) -> None:
    pattern = LongHeads(W, A, None, include_self)
    want, want_ids = whole(pattern, "dense")(*draw())
    got, ids = through(pattern, pieces)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ids, want_ids)


def test_int8_keeps_selection_close_and_every_split_equal() -> None:
    pattern = LongHeads(W, A)
    want = np.asarray(whole(pattern, "dense")(*draw())[0])
    one, several = (through(pattern, pieces, "int8")[0] for pieces in ([T], [30, 1, 1, 20, *[1] * 23]))
    np.testing.assert_allclose(one[:A], want[:A], rtol=0, atol=0.05)
    np.testing.assert_allclose(one, several, rtol=0, atol=1e-5)
    assert 1e-4 < np.abs(one[:A] - want[:A]).max()


def test_rows_of_different_lengths_left_padded() -> None:
    """A batch through prefill, a further piece and single tokens gives what each row gives alone."""
    cfg = merge(BASE, {"pattern": {"name": "longheads", "chunk": 4, "attention_length": 16}}, "model")
    params = parameters(BASE)
    text = np.concatenate([TOKENS, TOKENS[:, ::-1]], axis=1)
    lengths, pieces = (36, 21), (30, 6, 1, 1, 1, 9)
    rows = [text[r, : n + sum(pieces) - pieces[0] - pieces[1]] for r, n in enumerate(lengths)]
    width = pieces[0] + pieces[1]
    padded = np.stack([np.pad(row, (width - n, 0)) for row, n in zip(rows, lengths, strict=True)])
    index = np.array([[*[-1] * (width - n), *range(len(row))] for row, n in zip(rows, lengths, strict=True)])
    cache, got, at = caches.init(cfg, 2, 64), [], 0
    for n in pieces:
        piece = slice(at, at + n)
        out = forward(cfg)(
            params, tokens_BT=jnp.asarray(padded[:, piece]), index_BT=jnp.asarray(index[:, piece]), cache=cache
        )
        cache, at = out.cache, at + n
        got.append(np.asarray(out.logits_BTV))
    both = np.concatenate(got, axis=1)
    for r, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        want = logits(cfg, params, tokens_BT=row[None])
        assert rms_ratio(both[r, width - n :], want[0]) <= 1e-5


def test_all_blocks_listed_is_causal_attention() -> None:
    """The mechanism with every block chosen, at ranks that are then the blocks' own numbers."""
    q, k, v = (jnp.asarray(x) for x in draw())
    side = tokens(0, T)
    rope = Rope(trained=A)
    ctx = Context(q, side, (Keys(k, v, side),), rope, jnp.asarray(1.0 * T), D**-0.5)
    want = attend(ctx, TABLE["causal"]().branches(ctx), backend="dense")
    n = -(-T // W)
    t = jnp.arange(T)
    every = jnp.broadcast_to(jnp.arange(n), (1, H, T, n))
    own = jnp.where(every <= (t // W)[:, None], every, -1)
    for ids in (own, every):  # also a superset: blocks of the future add no probability
        starts, end = blocks.rank_positions(own, W, t % W)
        places = (end[..., None] - jnp.arange(n) * W)[:, :1]
        branch = BlockBranch(Causal(), W, jnp.arange(n)[None] * W, ids, places, (side.index_BT % W).astype(jnp.float32))
        for backend in ("dense", "blocked"):
            got = attend(ctx, (branch,), backend=backend)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)
    np.testing.assert_array_equal(starts[0, 0, T - 1], np.arange(n) * W)
    np.testing.assert_array_equal(end[0, 0], np.arange(T))


def test_what_is_not_chosen_does_not_matter() -> None:
    """Other keys and values in the chunks that no head of the last query chose, their vectors kept, change nothing."""
    pattern = LongHeads(W, A)
    q, k, v = draw()
    state = memory(pattern)
    state, *_ = cached(pattern)(state, q[:, :-1], k[:, :-1], v[:, :-1], dataclasses.replace(tokens(0, T - 1)))
    last = [x[:, -1:] for x in (q, k, v)]
    _, want, ids = cached(pattern)(state, *last, tokens(T - 1, 1))
    others = sorted(set(range(T // W)) - {int(g) for g in np.asarray(ids).ravel()})
    slots = np.array([g * W + i for g in others for i in range(W)])
    assert len(others) >= 2
    shuffled = dataclasses.replace(
        state,
        k_BCKd=state.k_BCKd.at[:, slots].set(7.0),
        v_BCKd=state.v_BCKd.at[:, slots].set(state.v_BCKd[:, slots[::-1]]),
    )
    np.testing.assert_array_equal(cached(pattern)(shuffled, *last, tokens(T - 1, 1))[1], want)
    picked = int(np.asarray(ids)[0, 0, 1]) * W
    spoiled = dataclasses.replace(state, v_BCKd=state.v_BCKd.at[:, picked].add(1.0))
    assert np.abs(cached(pattern)(spoiled, *last, tokens(T - 1, 1))[1] - want).max() > 1e-4


@pytest.mark.parametrize("rule", ["prefill", "reference"])
def test_no_distance_reaches_the_attention_length(rule: str) -> None:
    pattern = LongHeads(W, A, None, True, rule)  # type: ignore[arg-type]
    q, k, v = (jnp.asarray(x) for x in draw())

    @jax.jit
    def step(state: Any, q: Any, k: Any, v: Any, side: Tokens) -> Any:
        state, sources = state.extend(Keys(k, v, side, state.rotated))
        state, ctx = state.prepare(Context(q, side, sources, Rope(trained=A), jnp.asarray(1.0), 1.0))
        (branch,) = pattern.branches(ctx)
        assert isinstance(branch, BlockBranch)
        return state, jnp.where(branch.ids_BHTn >= 0, branch.q_positions, jnp.nan)

    state = memory(pattern)
    seen = []
    for t in range(T):
        side = dataclasses.replace(tokens(t, 1), contiguous=False)
        state, places = step(state, *(x[:, t : t + 1] for x in (q, k, v)), side)
        seen.append((np.nanmin(places), np.nanmax(places)))
    # The reference rule's query shares its newest key's position, and never has a whole chunk of n behind it.
    assert min(low for low, _ in seen) >= 0 and max(high for _, high in seen) == A - (2 if rule == "reference" else 1)
    side = tokens(0, T)
    whole_ctx = Context(q, side, (Keys(k, v, side),), Rope(trained=A), jnp.asarray(1.0), 1.0)
    near, first, middle = pattern.branches(whole_ctx)
    index = np.arange(T)
    visible = np.asarray(near.mask(index[:, None], index[None]))  # type: ignore[union-attr]
    assert (index[:, None] - index[None])[visible].max() == A - 1
    assert float(np.max(first.q_positions)) == A - 1 and float(np.max(middle.q_positions)) < A  # type: ignore[arg-type,union-attr]


def test_select() -> None:
    rng = np.random.default_rng(1)
    s = rng.normal(size=(2, 4, 9, 7)).astype(np.float32)
    allowed = rng.random((2, 1, 9, 7)) < 0.6
    forced = rng.random((2, 1, 9, 7)) < 0.2
    for share in (1, 2, 4):
        got = np.asarray(blocks.select(jnp.asarray(s), jnp.asarray(forced), jnp.asarray(allowed), 3, share))
        for b, h, t in np.ndindex(2, 4, 9):
            group = slice(h // share * share, (h // share + 1) * share)
            total = s[b, group, t].sum(0)
            open_ = [g for g in range(7) if allowed[b, 0, t, g]]
            want = sorted(sorted(open_, key=lambda g: (not forced[b, 0, t, g], -total[g]))[:3])
            assert got[b, h, t].tolist() == want + [-1] * (3 - len(want))
    everything = blocks.select(jnp.full((1, 1, 1, 3), -jnp.inf), jnp.zeros((), bool), jnp.ones((), bool), 5)
    assert everything.tolist() == [[[[0, 1, 2, -1, -1]]]]  # fewer blocks than asked for; -inf is a score like any other


@pytest.mark.parametrize("tile", [3, 8, 64])
def test_sorted_equals_direct(tile: int) -> None:
    """Random lists with gaps, a block that starts nowhere, a soft-cap; small tiles and several passes."""
    rng = np.random.default_rng(tile)
    q, k, v = (jnp.asarray(x) for x in draw())
    ids = jnp.asarray(rng.integers(-1, 9, (1, H, T, 5)), jnp.int32)
    ids = jnp.where(
        jnp.asarray([[len({*row[:i]} & {row[i]}) for i in range(5)] for row in np.asarray(ids).reshape(-1, 5)]).reshape(
            ids.shape
        )
        > 0,
        -1,
        ids,
    )
    starts = jnp.asarray([[0, 7, 15, 20, 33, 41, 50, 66, -1]], jnp.int32)
    places = jnp.asarray(rng.integers(0, 50, (1, H, T, 5)), jnp.float32)
    side = tokens(0, T)
    ctx = Context(q, side, (Keys(k, v, side),), Rope(trained=A), jnp.asarray(1.0), D**-0.5)
    branch = BlockBranch(Causal(), 9, starts, ids, places, jnp.zeros((1, T)))

    def two(q: Any, k: Any, v: Any) -> Any:
        c = dataclasses.replace(ctx, q_BTHd=q, sources=(Keys(k, v, side),))
        s, values = listed.direct(branch, c, 5.0)
        p = jnp.exp(s - jax.nn.logsumexp(s, -1, keepdims=True)) * (s > -1e29)
        want = jnp.einsum("bhtn,bhtnd->bhtd", p, values)
        return want, listed.by_block(branch, c, 5.0, tile)[0]

    want, got = jax.jit(two)(q, k, v)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)
    grads = [jax.jit(jax.grad(lambda *a, i=i: jnp.sin(3 * two(*a)[i]).sum(), (0, 1, 2)))(q, k, v) for i in (0, 1)]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(a).max()))


def test_groups_sort_the_same_in_both_ways() -> None:
    group = jnp.asarray(np.random.default_rng(0).integers(0, 8, 500), jnp.int32)
    for groups in (7, 2**31 // 250):  # small enough to pack, and not
        order, ordered = jax.jit(listed._sorted, static_argnums=1)(group, groups)
        np.testing.assert_array_equal(order, np.argsort(group, stable=True))
        np.testing.assert_array_equal(ordered, np.sort(group))


def test_taps_of_the_decoder() -> None:
    """Ids per layer, cut to the last tokens; layers stacked or not, cached or not."""
    cfg = merge(BASE, {"pattern": {"name": "longheads", "chunk": 4, "attention_length": 16}}, "model")
    text = jnp.asarray(TOKENS)
    params = parameters(BASE)

    @functools.cache
    def run(cfg: Any) -> Any:
        watch = Watch(taps=("attn/blocks",), last=5)
        return jax.jit(lambda cache=None, **rows: DecoderModel(cfg).apply(params, Inputs(**rows), cache, watch))

    got, plain = run(cfg)(tokens_BT=text), forward(cfg)(params, tokens_BT=text)
    np.testing.assert_array_equal(got.logits_BTV, plain.logits_BTV)
    assert plain.taps == ({}, {}) and len(got.taps) == 2
    unrolled = merge(cfg, {"scan_layers": False}, "model")
    other = run(unrolled)(tokens_BT=text)
    index = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    cache, seen = caches.init(cfg, 2, 64), []
    for a, b in ((0, 39), (39, 44)):
        out = run(cfg)(tokens_BT=text[:, a:b], index_BT=index[:, a:b], cache=cache)
        cache = out.cache
        seen.append(out.taps)
    for layer, same, last in zip(got.taps, other.taps, seen[1], strict=True):
        ids = layer["attn/blocks"]
        assert ids.shape == (2, 5, 4, 4) and ids.dtype == jnp.int32
        np.testing.assert_array_equal(ids, same["attn/blocks"])
        np.testing.assert_array_equal(ids, last["attn/blocks"])
        assert bool((ids[..., 0] == 0).all() and (ids[:, 1:, :, -2:] == jnp.asarray([9, 10])).all())
    causal = run(BASE)(tokens_BT=text)
    assert causal.taps == ({}, {})


BAD = {
    "a chunk that does not divide": ({"chunk": 5, "attention_length": 24}, "model.pattern.chunk: 5 does not divide"),
    "no chunk": ({"chunk": 0}, "model.pattern.chunk: must be at least 1, found 0"),
    "too few chunks": ({"chunk": 8, "attention_length": 16}, "16 holds 2 chunks of 8; valid: at least 3"),
    "selection before there is a choice": (
        {"chunk": 4, "attention_length": 24, "begin_selective_length": 16},
        "begin_selective_length: 16 must be a multiple of chunk = 4 and at least attention_length = 24",
    ),
    "an uneven beginning": (
        {"chunk": 4, "attention_length": 24, "begin_selective_length": 30},
        "begin_selective_length: 30 must be a multiple",
    ),
    "beyond the trained length": (
        {"chunk": 4, "attention_length": 36},
        "attention_length: 36 exceeds the 32 positions",
    ),
    "an unknown rule": ({"decode_rule": "prefil"}, "unknown name 'prefil' (did you mean 'prefill'?)"),
    "a wrong name": ({"chunks": 4}, "model.pattern.chunks: unknown key (did you mean 'chunk'?)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name: str) -> None:
    fields, message = BAD[name]
    with pytest.raises(UserError) as e:
        merge(BASE, {"pattern": {"name": "longheads", **fields}}, "model")
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({"name": "alibi"}, "model.positions is alibi; valid: rope"),
        ({"name": "learned", "size": 64}, "model.positions is learned; valid: rope"),
        ({"name": "nope"}, "model.positions is nope; valid: rope"),
        (
            {"name": "rope", "scaling": {"name": "dynamic", "factor": 2.0}},
            "scaling = dynamic, whose frequencies change",
        ),
    ],
)
def test_positions_it_cannot_renumber_are_refused(positions: dict[str, Any], message: str) -> None:
    change = {"pattern": {"name": "longheads", "chunk": 4, "attention_length": 16}, "positions": positions}
    with pytest.raises(UserError, match=message):
        merge(BASE, change, "model")


def test_an_interpolated_model_knows_more_positions() -> None:
    change = {
        "pattern": {"name": "longheads", "chunk": 4, "attention_length": 64},
        "positions": {"name": "rope", "scaling": {"name": "linear", "factor": 2.0}},
    }
    assert merge(BASE, change, "model").pattern.n_chunks == 16


def test_a_cache_without_summaries_is_refused() -> None:
    pattern = {"name": "longheads", "chunk": 4, "attention_length": 16}
    with pytest.raises(UserError, match="Full keeps no ChunkFeature"):
        model_config({"pattern": pattern, "cache": "full"})
    with pytest.raises(UserError, match="needs a pattern with block summaries"):
        model_config({"cache": "block_memory"})
    with pytest.raises(UserError, match="needs a pattern with block summaries"):
        caches.TABLE["block_memory"]().init(BASE, 1, 64)
