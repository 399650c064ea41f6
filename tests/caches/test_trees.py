"""Drafts behind a cache: two tokens that are a tree are read and not kept, and a way through it is committed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import model
from cases.model import BASE, Params

from lm.config import ModelConfig
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel

N = 9  # tokens of the prompt
ROOM = 16
PROMPT = jnp.asarray(np.random.default_rng(6).integers(0, BASE.vocab_size, (2, N)))
DRAFTS = jnp.asarray([[7, 19], [40, 3]])
SIBLINGS, CHAIN = jnp.eye(2, dtype=bool), jnp.tril(jnp.ones((2, 2), bool))
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, raw keys": {"positions": {"name": "rope", "scaling": {"name": "dynamic", "factor": 2.0}}},
    "full, int8": {"cache": {"name": "full", "quantize": "int8"}},
    "window": {"pattern": {"name": "sliding_window", "window": 5}},
    "streaming": {"pattern": {"name": "streaming", "window": 5, "sinks": 2}},
    "lm_infinite": {"pattern": {"name": "lm_infinite", "window": 5, "sinks": 2, "ceiling": 5.0}},
}


@functools.cache
def params() -> Params:
    return model.parameters(BASE)


@functools.cache
def program(cfg: ModelConfig) -> Any:
    """Jitted ``(params, drafts, depth, ancestors, path, count, next) -> ...`` of one prompt, one tree, one committed
    path and one token after it; and the same path read in the plain way."""
    lm = DecoderModel(cfg)

    def run(
        p: Params, drafts: jax.Array, depth: jax.Array, tree: jax.Array, path: jax.Array, count: jax.Array
    ) -> dict[str, Any]:
        index = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), PROMPT.shape)
        before = lm.apply(p, Inputs(PROMPT, index_BT=index), lm.cache(2, ROOM)).cache
        trees = jnp.broadcast_to(tree, (2, 2, 2))
        at = jnp.broadcast_to(N + depth, drafts.shape).astype(jnp.int32)
        out = lm.apply(p, Inputs(drafts, index_BT=at, ancestors_BTT=trees), before, commit=False)
        kept = lm.commit(before, out.fresh, path, count)
        taken = jnp.take_along_axis(drafts, path, 1)
        live = jnp.arange(path.shape[1]) < count[:, None]
        index = jnp.where(live, N + jnp.arange(path.shape[1]), -1).astype(jnp.int32)
        read = lm.apply(p, Inputs(taken, index_BT=index), before)
        then = {"index_BT": (N + count)[:, None].astype(jnp.int32)}
        after = [lm.apply(p, Inputs(jnp.full((2, 1), 11), **then), c).logits_BTV for c in (kept, read.cache)]
        return {"drafts": out.logits_BTV, "read": read.logits_BTV, "same": (before, out.cache), "after": after}

    return jax.jit(run)


def run(cfg: ModelConfig, depth: list[int], tree: jax.Array, path: list[list[int]], count: list[int]) -> Any:
    return program(cfg)(params(), DRAFTS, jnp.asarray(depth), tree, jnp.asarray(path), jnp.asarray(count))


@pytest.mark.parametrize("kind", KINDS)
def test_two_drafts_and_the_one_that_is_taken(kind: str) -> None:
    """Siblings: each is read as if it alone followed the prompt. Row 0 takes the second, row 1 none."""
    cfg = model.changed(BASE, KINDS[kind])
    close = 0.05 if "int8" in kind else 2e-5
    made = run(cfg, [0, 0], SIBLINGS, [[1, 0], [0, 0]], [1, 0])
    before, untouched = made["same"]
    jax.tree.map(np.testing.assert_array_equal, before, untouched)  # not one bit of the cache has changed
    assert model.rms_ratio(made["drafts"][0, 1], made["read"][0, 0]) <= close
    assert model.rms_ratio(made["after"][0], made["after"][1]) <= close
    alone = run(cfg, [0, 0], SIBLINGS, [[0, 1], [1, 0]], [1, 1])  # the other ones, read by themselves
    assert model.rms_ratio(made["drafts"][0, 0], alone["read"][0, 0]) <= close
    assert model.rms_ratio(made["drafts"][1, 1], alone["read"][1, 0]) <= close


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_two_is_the_text(kind: str) -> None:
    cfg = model.changed(BASE, KINDS[kind])
    close = 0.05 if "int8" in kind else 2e-5
    made = run(cfg, [0, 1], CHAIN, [[0, 1], [0, 1]], [2, 1])
    jax.tree.map(np.testing.assert_array_equal, *made["same"])
    assert model.rms_ratio(made["drafts"][0], made["read"][0]) <= close
    assert model.rms_ratio(made["drafts"][1, 0], made["read"][1, 0]) <= close
    assert model.rms_ratio(made["after"][0], made["after"][1]) <= close
