"""The smallest cache that loses nothing under a pattern: its kind, its slots, its bytes, its contents."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lm import caches
from lm.attention.branches import Keys, Tokens
from lm.config import model_config
from lm.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "slots"),
    [
        ({"name": "causal"}, 100),
        ({"name": "sliding_window", "window": 7}, 7),
        ({"name": "sliding_window", "window": 700}, 100),
        ({"name": "streaming", "window": 7, "sinks": 3}, 10),
        ({"name": "streaming", "window": 98, "sinks": 3}, 100),
        ({"name": "streaming", "window": 7, "sinks": 300}, 100),
        ({"name": "lm_infinite", "window": 7, "sinks": 3, "ceiling": 7.0}, 10),
        ({"name": "lm_infinite", "window": None, "sinks": 3}, 100),
        ({"name": "lm_infinite", "window": 7, "sinks": 3, "top_k": 2, "top_k_from_layer": 0}, 100),
    ],
    ids=str,
)
def test_slots(pattern: dict[str, Any], slots: int) -> None:
    cfg = model_config({"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "pattern": pattern})
    state = caches.init(cfg, 3, 100)
    assert len(state) == 2
    for layer in state:
        assert layer.k_BKCd.shape == (3, 2, slots, 16) and layer.v_BKdC.shape == (3, 2, 16, slots)
        assert bool((layer.index_BC == -1).all())
    per_slot = 2 * 2 * 16 * 4 + 4 + 4  # keys and values float32, index, position
    whole = caches.n_bytes(state)
    assert whole - 2 * 3 * slots * per_slot in (0, 2 * 3 * 4)  # a counter per row and layer where the cache counts


def test_layers_with_far_tokens_keep_all_and_the_others_their_window() -> None:
    pattern = {"name": "lm_infinite", "window": 7, "sinks": 3, "top_k": 2, "top_k_from_layer": 2}
    state = caches.init(model_config({"n_layers": 4, "pattern": pattern}), 1, 50)
    assert [layer.index_BC.shape[1] for layer in state] == [10, 10, 50, 50]


@pytest.mark.parametrize("chunks", [[20], [1] * 20, [3, 1, 9, 7], [13, 7]], ids=str)
def test_sinks_and_a_ring_hold_the_first_and_the_last(chunks: list[int]) -> None:
    """Whatever the chunking, row 1 padded on its left by 4: the slots hold the first 2 and the last 5 tokens."""
    cfg = model_config({"n_heads": 1, "head_dim": 2})
    state = caches.TABLE["sink_window"](sinks=2, window=5).init(cfg, 2, 20)
    at = 0
    for n in chunks:
        index = jnp.stack([jnp.arange(at, at + n), jnp.arange(at, at + n) - 4]).astype(jnp.int32)
        x = index[:, :, None, None] * jnp.ones((1, 1, 1, 2))
        state, (found,) = state.extend(Keys(x, 2 * x, Tokens(index, index + 0.5), rotated=True))
        for row in range(2):
            now = int(index[row].max())
            live = np.asarray(found.tokens.index_BT[row])
            want = {i for i in range(now + 1) if i < 2 or i > now - 5}
            assert want <= set(live.tolist())
            assert len(live[live >= 0]) == len(set(live[live >= 0].tolist()))
            np.testing.assert_array_equal(np.asarray(found.k_BSKd[row, :, 0, 0])[live >= 0], live[live >= 0])
        at += n
    for row, last in enumerate((19, 15)):
        index = np.asarray(state.index_BC[row])
        assert sorted(index.tolist()) == [0, 1, *range(last - 4, last + 1)]
        np.testing.assert_array_equal(state.k_BKCd[row, 0, :, 0], index)
        np.testing.assert_array_equal(state.v_BKdC[row, 0, 1], 2 * index)
        np.testing.assert_array_equal(state.positions_BC[row], index + 0.5)


def test_a_cache_without_room_is_refused() -> None:
    for name, fields in (("full", {"capacity": 0}), ("sink_window", {"window": 0}), ("sink_window", {"sinks": -1})):
        with pytest.raises(UserError, match=r"must be at least|at least 0"):
            caches.TABLE[name](**fields)
