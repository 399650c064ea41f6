"""The generic suite, run by every pattern and by the positions that ship."""

from __future__ import annotations

import pytest
from cases.model import T
from cases.plug_case import EagerCase, KindCase, PlugCase


class TestCausal(PlugCase):
    change = {"pattern": {"name": "causal"}}
    limits = ({"pattern": {"name": "causal", "prefix": 0}},)


class TestPrefix(PlugCase):
    change = {"pattern": {"name": "causal", "prefix": 6}}
    limits = ({"pattern": {"name": "causal", "prefix": 1}},)
    # Cached too, because the first chunk holds the whole prefix: its tokens see each other forward in time.


class TestSlidingWindow(PlugCase):
    change = {"pattern": {"name": "sliding_window", "window": 7}}
    limits = ({"pattern": {"name": "sliding_window", "window": T}},)


@pytest.mark.smoke
class TestStreaming(PlugCase):
    change = {"pattern": {"name": "streaming", "window": 7, "sinks": 3}}
    limits = (
        {"pattern": {"name": "streaming", "window": T, "sinks": 3}},
        {"pattern": {"name": "streaming", "window": T, "sinks": 3, "sink_positions": "true"}},
    )


class TestLMInfinite(EagerCase):
    change = {"pattern": {"name": "lm_infinite", "window": 7, "sinks": 3, "ceiling": 7.0}}
    limits = (
        {"pattern": {"name": "lm_infinite", "window": T, "sinks": 3, "ceiling": float(T)}},
        {"pattern": {"name": "lm_infinite", "window": None, "sinks": 0, "ceiling": None}},
    )


class TestLMInfiniteTopK(PlugCase):
    change = {
        "pattern": {
            "name": "lm_infinite",
            "window": 7,
            "sinks": 3,
            "ceiling": 7.0,
            "top_k": 4,
            "top_k_from_layer": 1,
            "top_k_queries": None,
        }
    }
    limits = (
        {"pattern": {"name": "lm_infinite", "window": T, "ceiling": float(T), "top_k": 2, "top_k_queries": None}},
    )


class TestLongHeads(PlugCase):
    change = {"pattern": {"name": "longheads", "chunk": 4, "attention_length": 20}}
    limits = (
        {"max_positions": 48, "pattern": {"name": "longheads", "chunk": 4, "attention_length": 44}},
        {"max_positions": 3 * T, "pattern": {"name": "longheads", "chunk": T, "attention_length": 3 * T}},
    )


class TestBidirectional(PlugCase):
    change = {"pattern": {"name": "bidirectional"}}
    causal = False
    cached = False


class TestAlibi(KindCase):
    change = {
        "positions": {"name": "alibi"},
        "pattern": {"name": "lm_infinite", "window": 9, "sinks": 2, "ceiling": 9.0},
    }


@pytest.mark.smoke
class TestYarnWithStreaming(PlugCase):
    change = {
        "positions": {"name": "rope", "scaling": {"name": "yarn", "factor": 4.0}},
        "pattern": {"name": "streaming", "window": 11, "sinks": 2},
    }
    limits = ({"positions": {"name": "rope", "scaling": {"name": "yarn", "factor": 1.0}}},)


class TestPartialRotaryParallelLayerNorm(KindCase):
    change = {
        "positions": {"name": "rope", "fraction": 0.5},
        "norm": {"name": "layernorm"},
        "ffn": {"name": "gelu"},
        "parallel_residual": True,
        "mixer": {"qk_norm": True, "softcap": 20.0, "qkv_bias": True, "out_bias": True},
        "head": {"tie": False, "softcap": 30.0},
    }
    training_free = False
