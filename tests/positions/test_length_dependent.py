"""Scalings whose frequencies follow the length in use: what a cache must do for them, and what they owe short texts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import apply

from lm import caches
from lm.config import ModelConfig, merge, model_config
from lm.model import params as params_lib

N = 20
LONG = [1.0, 2.0, 3.0, 4.0]
SCALINGS: list[dict[str, Any]] = [
    {"name": "dynamic", "factor": 3.0},
    {"name": "longrope", "short_factor": [1.0] * 4, "long_factor": LONG, "factor": 4.0, "attention_factor": 1.0},
]
# One layer: its keys are functions of the tokens alone, so re-rotating them on every step must give the full forward.
BASE = model_config({"vocab_size": 31, "d_model": 32, "n_layers": 1, "n_heads": 4, "d_ff": 16, "max_positions": 12})
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, N)))


def with_scaling(scaling: dict[str, Any]) -> ModelConfig:
    return merge(BASE, {"positions": {"scaling": scaling}}, "model")


def parameters() -> Any:
    return jax.tree.map(lambda x: 12 * x if x.ndim >= 3 else x, params_lib.init(BASE, jax.random.key(0)))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["name"])
def test_a_cache_keeps_raw_keys_and_turns_them_to_the_length_of_the_moment(scaling: dict[str, Any]) -> None:
    cfg, params = with_scaling(scaling), parameters()
    assert cfg.positions.length_dependent and not BASE.positions.length_dependent

    @jax.jit
    def full(n: Any) -> Any:
        """Logits of the last of the first n tokens, the rest padded away."""
        index = jnp.where(jnp.arange(N) < n, jnp.arange(N), -1)[None].repeat(2, 0)
        return apply(cfg, params, tokens_BT=TOKENS, index_BT=index).logits_BTV[:, n - 1]

    step = jax.jit(lambda t, i, c: apply(cfg, params, tokens_BT=t, index_BT=i, cache=c))
    cache = caches.init(cfg, 2, N)
    moved = 0.0
    for n in range(1, N + 1):
        out = step(TOKENS[:, n - 1 : n], jnp.full((2, 1), n - 1, jnp.int32), cache)
        cache, want = out.cache, full(n)
        np.testing.assert_allclose(out.logits_BTV[:, 0], want, rtol=0, atol=1e-5)
        plain = apply(BASE, params, tokens_BT=TOKENS[:, :n]).logits_BTV[:, -1] if n in (12, N) else want
        moved = float(jnp.abs(want - plain).max())
        assert n != 12 or moved < 1e-5  # within the trained length they are the default
    assert moved > 1e-3


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["name"])
def test_a_longer_text_changes_its_own_beginning(scaling: dict[str, Any]) -> None:
    """The documented price: the outputs at the first positions depend on how long the text is."""
    cfg, params = with_scaling(scaling), parameters()
    run = jax.jit(lambda t: apply(cfg, params, tokens_BT=t).logits_BTV)
    assert float(jnp.abs(run(TOKENS)[:, :12] - run(TOKENS[:, :12])).max()) > 1e-3
