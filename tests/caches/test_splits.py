"""Every pattern with every kind of positions: a prompt cut anywhere, then a piece and single tokens, is the whole."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_composition import PATTERNS, POSITIONS, REFUSED, kind, name

from lm import caches
from lm.config import merge, model_config
from lm.model import params as params_lib
from lm.model.decoder import Decoder

T, PIECE = 12, 3
BASE = model_config(
    {"vocab_size": 23, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 16, "max_positions": 12}
)
TOKENS = np.random.default_rng(0).integers(0, 23, T)
CASES = [
    (p, s)
    for p in range(len(PATTERNS))
    for s in range(len(POSITIONS))
    if PATTERNS[p]["name"] != "bidirectional" and (PATTERNS[p]["name"], kind(POSITIONS[s])) not in REFUSED
]


@functools.cache
def parameters(cfg: Any) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 0.5, x.shape), jnp.float32), params_lib.abstract(cfg))


def test_the_pairs_are_all_there() -> None:
    assert {PATTERNS[p]["name"] for p, _ in CASES} >= {
        "causal",
        "sliding_window",
        "streaming",
        "lm_infinite",
        "longheads",
    }
    assert len({kind(POSITIONS[s]) for _, s in CASES}) >= 9


@pytest.mark.parametrize(("p", "s"), CASES, ids=lambda i: "")
def test_every_split(p: int, s: int) -> None:
    """The wanted logits of token t are those of the text that ends there: some frequencies depend on its length."""
    cfg = merge(BASE, {"pattern": PATTERNS[p], "positions": POSITIONS[s]}, "model")
    params = parameters(cfg)

    @jax.jit
    def whole(tokens: Any, index: Any) -> Any:
        return Decoder(cfg).apply({"params": params}, tokens, index_BT=index).logits_BTV

    @jax.jit
    def more(tokens: Any, index: Any, cache: Any) -> Any:
        out = Decoder(cfg).apply({"params": params}, tokens, index_BT=index, cache=cache)
        return out.logits_BTV, out.cache

    def padded(n: int) -> tuple[Any, Any]:
        """The first n tokens, on the right of T places."""
        tokens, index = np.zeros((1, T), np.int32), np.full((1, T), -1, np.int32)
        tokens[0, T - n :], index[0, T - n :] = TOKENS[:n], np.arange(n)
        return jnp.asarray(tokens), jnp.asarray(index)

    want = np.stack([np.asarray(whole(*padded(t + 1)))[0, -1] for t in range(T)])
    for n in range(PATTERNS[p].get("prefix", 1), T):
        logits, cache = more(*padded(n), caches.init(cfg, 1, 2 * T))
        got, at = [logits[0, -1]], n
        while at < T:
            take = PIECE if at + PIECE <= T and at == n else 1
            index = jnp.arange(at, at + take)[None]
            logits, cache = more(jnp.asarray(TOKENS[at : at + take])[None], index, cache)
            got.append(logits[0, -1])  # of a piece, the last token's: its own length is the text's
            at += take
        ends = [n - 1, *([n + PIECE - 1, *range(n + PIECE, T)] if n + PIECE <= T else range(n, T))]
        close = 2e-5 * max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(np.stack(got), want[ends], atol=close, err_msg=f"{name(PATTERNS[p])}, {n}")
