"""The tests every plug owes, as one class: a plug's test file subclasses `PlugCase` with a few lines.

Off is off; same tree; fast = reference, forward and gradients; full = chunked prefill + decoding; causality by
gradient; packing; padding and row order; scan = unrolled, remat = plain, jit = no jit; 1 device = 8; limits are the
baseline.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import caches, compat
from lm.config import ModelConfig, merge, model_config
from lm.model import params as params_lib
from lm.model.decoder import Decoder

T = 44  # not a multiple of the blocks
BASE = model_config(
    {
        "vocab_size": 61,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 48,
        "max_positions": 32,
        "mixer": {"name": "softmax", "backend": "dense", "block_q": 16, "block_k": 12},
    }
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, T))


@functools.cache
def parameters(cfg: ModelConfig) -> Any:
    """Random parameters, wide enough that attention is far from uniform."""
    tree = params_lib.init(cfg, jax.random.key(0))
    return jax.tree.map(lambda x: 8 * x if x.ndim >= 3 else x, tree)


@functools.cache
def forward(cfg: ModelConfig) -> Any:
    """Jitted ``(params, **inputs) -> Output``."""
    return jax.jit(lambda params, **inputs: Decoder(cfg).apply({"params": params}, **inputs))


def logits(cfg: ModelConfig, params: Any = None, **inputs: Any) -> np.ndarray:
    params = parameters(cfg) if params is None else params
    out = forward(cfg)(params, **{k: jnp.asarray(v) for k, v in inputs.items()})
    return np.asarray(out.logits_BTV, np.float64)


@functools.cache
def gradient(cfg: ModelConfig) -> Any:
    """Jitted ``params -> ((loss, logits), gradients)`` of a loss that weighs every logit differently."""

    def loss(params: Any) -> Any:
        out = Decoder(cfg).apply({"params": params}, jnp.asarray(TOKENS)).logits_BTV
        return jnp.sin(5 * out).mean(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def rms_ratio(got: Any, want: Any) -> float:
    """Root mean square of the error over that of the reference; a reference of zeros asks for zeros."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    if not want.any():
        return float("inf") if got.any() else 0.0
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def backend(cfg: ModelConfig, name: str) -> ModelConfig:
    return merge(cfg, {"mixer": {"backend": name}}, "model")


class PlugCase:
    """`change`: the plug, merged over the baseline; `limits`: settings at which it must be the baseline."""

    change: ClassVar[dict[str, Any]]
    limits: ClassVar[tuple[dict[str, Any], ...]] = ()
    causal: ClassVar[bool] = True
    training_free: ClassVar[bool] = True
    cached: ClassVar[bool] = True

    @property
    def cfg(self) -> ModelConfig:
        return merge(BASE, self.change, "model")

    @property
    def params(self) -> Any:
        return parameters(BASE) if self.training_free else parameters(self.cfg)

    def test_off_is_off(self) -> None:
        """Building and running the plug leaves the baseline's program as it was."""

        def program() -> str:
            fresh = jax.jit(lambda p, t: Decoder(BASE).apply({"params": p}, t).logits_BTV)
            return fresh.lower(parameters(BASE), jnp.asarray(TOKENS)).as_text()

        before = program()
        logits(self.cfg, self.params, tokens_BT=TOKENS)
        assert program() == before

    def test_same_tree(self) -> None:
        got, want = params_lib.abstract(self.cfg), params_lib.abstract(BASE)
        same = jax.tree.structure(got) == jax.tree.structure(want) and all(
            a.shape == b.shape and a.dtype == b.dtype
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=False)
        )
        assert same == self.training_free

    def test_blocked_equals_dense(self) -> None:
        (_, want), g_want = gradient(self.cfg)(self.params)
        (_, got), g_got = gradient(backend(self.cfg, "blocked"))(self.params)
        assert rms_ratio(got, want) <= 1e-5
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(g_got), jax.tree.leaves(g_want), strict=True):
            assert rms_ratio(a, b) <= 2e-5, path

    def test_bfloat16_is_no_worse_than_dense(self) -> None:
        """Against float32 on the same bf16-rounded parameters, blocked errs at most twice as much as dense does."""
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), self.params)
        want = logits(self.cfg, rounded, tokens_BT=TOKENS)
        half = merge(self.cfg, {"dtype": "bfloat16"}, "model")
        dense = rms_ratio(logits(half, rounded, tokens_BT=TOKENS), want)
        blocked = rms_ratio(logits(backend(half, "blocked"), rounded, tokens_BT=TOKENS), want)
        assert 0 < dense < 0.1
        assert blocked <= 2 * dense

    def test_full_equals_prefill_and_decode(self) -> None:
        """Chunks and single tokens through the cache; a plug that declares no cached form must indeed differ."""
        want = logits(self.cfg, self.params, tokens_BT=TOKENS)
        step, cache, at = forward(self.cfg), caches.init(self.cfg, 2, T), 0
        got = []
        for n in [13, 1, 1, 13, *[1] * (T - 28)]:
            index = jnp.broadcast_to(at + jnp.arange(n, dtype=jnp.int32), (2, n))
            out = step(self.params, tokens_BT=jnp.asarray(TOKENS[:, at : at + n]), index_BT=index, cache=cache)
            cache, at = out.cache, at + n
            got.append(out.logits_BTV)
        assert at == T
        assert (rms_ratio(np.concatenate(got, axis=1), want) <= 1e-5) == self.cached

    def test_causality_by_gradient(self) -> None:
        x = jax.random.normal(jax.random.key(1), (1, T, BASE.d_model))
        t = T - 9

        def f(x: Any) -> Any:
            return jnp.abs(Decoder(self.cfg).apply({"params": self.params}, embeddings_BTD=x).logits_BTV[0, t]).sum()

        seen = np.abs(np.asarray(jax.jit(jax.grad(f))(x)))[0].sum(-1)
        assert seen[t] > 0
        assert bool(np.all(seen[t + 1 :] == 0)) == self.causal

    def test_packed_documents_are_separate(self) -> None:
        """Two documents in a row give what each gives alone (padded on its right), on both backends."""
        cuts = [30, 9]
        segments = np.array([[1] * c + [2] * (T - c) for c in cuts])
        index = np.array([[*range(c), *range(T - c)] for c in cuts])
        for name in ("dense", "blocked"):
            cfg = backend(self.cfg, name)
            packed = logits(cfg, self.params, tokens_BT=TOKENS, segments_BT=segments, index_BT=index)
            for first in (True, False):
                spans = [(0, c) if first else (c, T) for c in cuts]
                alone = np.stack([np.resize(TOKENS[r, a:b], T) for r, (a, b) in enumerate(spans)])
                where = np.array([[*range(b - a), *[-1] * (T - b + a)] for a, b in spans])
                ones = np.ones_like(segments)
                got = logits(cfg, self.params, tokens_BT=alone, segments_BT=ones, index_BT=where)
                for r, (a, b) in enumerate(spans):
                    assert rms_ratio(packed[r, a:b], got[r, : b - a]) <= 1e-5

    def test_padding_and_row_order(self) -> None:
        """Tokens left or right of a text, and its place in the batch, change nothing."""
        want = logits(self.cfg, self.params, tokens_BT=TOKENS[:, : T - 5])
        for left in (5, 0):
            padded = np.pad(TOKENS[:, : T - 5], ((0, 0), (left, 5 - left)), constant_values=7)
            index = np.array([[*[-1] * left, *range(T - 5), *[-1] * (5 - left)]] * 2)
            for name in ("dense", "blocked"):
                cfg, ones = backend(self.cfg, name), np.ones_like(index)
                got = logits(cfg, self.params, tokens_BT=padded, segments_BT=ones, index_BT=index)
                assert rms_ratio(got[:, left : left + T - 5], want) <= 1e-5
        swapped = logits(self.cfg, self.params, tokens_BT=TOKENS[::-1, : T - 5].copy())
        np.testing.assert_allclose(swapped[::-1], want, rtol=0, atol=1e-5)

    def test_scan_and_remat_change_nothing(self) -> None:
        (_, want), g_want = gradient(self.cfg)(self.params)
        unrolled = merge(self.cfg, {"scan_layers": False, "remat": True}, "model")
        (_, got), g_got = gradient(unrolled)(self.params)
        assert rms_ratio(got, want) <= 1e-6
        for a, b in zip(jax.tree.leaves(g_got), jax.tree.leaves(g_want), strict=True):
            assert rms_ratio(a, b) <= 1e-5

    def test_one_device_equals_eight(self) -> None:
        if jax.device_count() < 8:
            pytest.fail("the suite starts with eight CPU devices; see tests/conftest.py")
        mesh = compat.auto_mesh((4, 2), ("data", "tensor"))
        spec = jax.sharding.PartitionSpec
        table = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": None}

        def place(path: Any, leaf: Any) -> Any:
            names = path_axes
            for key in path:
                names = names[key.key]
            return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec(*(table.get(n) for n in names))))

        path_axes = params_lib.axes(self.params)
        sharded = jax.tree_util.tree_map_with_path(place, self.params)
        tokens = np.concatenate([TOKENS, TOKENS[::-1]])
        batch = jax.device_put(jnp.asarray(tokens), jax.sharding.NamedSharding(mesh, spec("data")))
        cfg = backend(self.cfg, "blocked")
        got = forward(cfg)(sharded, tokens_BT=batch).logits_BTV
        assert len(got.sharding.device_set) == 8
        assert rms_ratio(got, logits(cfg, self.params, tokens_BT=tokens)) <= 1e-5

    def test_limits_are_the_baseline(self) -> None:
        want = logits(BASE, parameters(BASE), tokens_BT=TOKENS) if self.limits else None
        for limit in self.limits:
            got = logits(merge(BASE, limit, "model"), parameters(BASE), tokens_BT=TOKENS)
            np.testing.assert_array_equal(got, want, err_msg=str(limit))


class EagerCase(PlugCase):
    """`PlugCase` and the same without jit, which takes seconds: for one plug of a kind."""

    def test_jit_changes_nothing(self) -> None:
        want = logits(self.cfg, self.params, tokens_BT=TOKENS)
        with jax.disable_jit():
            plain = Decoder(self.cfg).apply({"params": self.params}, jnp.asarray(TOKENS[:1])).logits_BTV
        assert rms_ratio(plain, want[:1]) <= 1e-5
