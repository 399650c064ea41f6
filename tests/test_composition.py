"""Every pattern with every position plug, and every pair of the other sockets: finite, and blocked equals dense."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import params as params_lib
from lm.config import merge, model_config, table
from lm.decoder import Decoder
from lm.errors import UserError

FOUR = [1.0, 1.5, 2.0, 4.0]
PATTERNS: list[dict[str, Any]] = [
    {"name": "causal"},
    {"name": "causal", "prefix": 3},
    {"name": "bidirectional"},
    {"name": "sliding_window", "window": 5},
    {"name": "streaming", "window": 5, "sinks": 2},
    {"name": "lm_infinite", "window": 6, "sinks": 2, "ceiling": 6.0},
    {"name": "lm_infinite", "window": 6, "sinks": 2, "ceiling": 6.0, "top_k": 3, "top_k_from_layer": 0},
    {"name": "longheads", "chunk": 2, "attention_length": 10},
]
POSITIONS: list[dict[str, Any]] = [
    {"name": "nope"},
    {"name": "alibi"},
    {"name": "alibi", "style": "mpt"},
    {"name": "learned", "size": 16},
    {"name": "rope", "scaling": {"name": "default"}},
    {"name": "rope", "fraction": 0.5, "scaling": {"name": "linear", "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "ntk", "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "dynamic", "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "yarn", "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "longrope", "short_factor": FOUR, "long_factor": FOUR[::-1], "factor": 2.0}},
    {"name": "rope", "scaling": {"name": "llama3", "factor": 2.0}},
]
FFN: list[dict[str, Any]] = [{"name": name, "bias": i % 2 == 0} for i, name in enumerate(sorted(table("lm.ffn")))]
HEADS: list[dict[str, Any]] = [{"tie": True}, {"tie": False, "bias": True}, {"tie": True, "softcap": 10.0}]
ATTENTION: list[dict[str, Any]] = [{}, {"softcap": 5.0, "qk_norm": True}, {"qkv_bias": True, "out_bias": True}]
REST: list[dict[str, Any]] = [
    {"norm": norm, "parallel_residual": parallel} for norm in sorted(table("lm.norms")) for parallel in (False, True)
]
BASE = model_config(
    {"vocab_size": 23, "d_model": 24, "n_layers": 1, "n_heads": 3, "n_kv_heads": 1, "d_ff": 16, "max_positions": 12}
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (1, 20)))


# How the option of each further socket follows from pattern p and positions s, so that all pairs meet (checked below).
OFFSETS = ((3, 3, 3, 2), (2, 1, 1, 2), (1, 2, 3, 1), (1, 3, 2, 2))


def row(p: int, s: int) -> tuple[int, ...]:
    sizes = (len(FFN), len(HEADS), len(ATTENTION), len(REST))
    return p, s, *((a * p // c + b * s // d) % n for (a, b, c, d), n in zip(OFFSETS, sizes, strict=True))


def name(plug: dict[str, Any]) -> str:
    values = {**plug, **plug.get("scaling", {})}
    short = [str(v) for k, v in values.items() if k not in ("scaling", "name") and not isinstance(v, list)]
    return "-".join([values["name"], *short])


def kind(positions: dict[str, Any]) -> str:
    return str(positions.get("scaling", positions)["name"])


# Pairs that cannot work: renumbering needs rotary positions whose frequencies stay the same.
REFUSED = {("longheads", positions) for positions in ("nope", "alibi", "learned", "dynamic", "longrope")}


ROWS = [row(p, s) for p in range(len(PATTERNS)) for s in range(len(POSITIONS))]


def test_the_rows_name_every_plug_and_meet_every_pair() -> None:
    assert {p["name"] for p in PATTERNS} == set(table("lm.attention"))
    assert {p["name"] for p in POSITIONS} == set(table("lm.positions"))
    assert {p["scaling"]["name"] for p in POSITIONS if "scaling" in p} == set(table("lm.positions.scaling"))
    sizes = [len(x) for x in (PATTERNS, POSITIONS, FFN, HEADS, ATTENTION, REST)]
    for a, b in itertools.combinations(range(6), 2):
        met = {(r[a], r[b]) for r in ROWS}
        assert met == set(itertools.product(range(sizes[a]), range(sizes[b]))), (a, b)


@pytest.mark.parametrize("p", range(len(PATTERNS)), ids=lambda p: name(PATTERNS[p]))
@pytest.mark.parametrize("s", range(len(POSITIONS)), ids=lambda s: name(POSITIONS[s]))
def test_a_pair_runs(p: int, s: int) -> None:
    _, _, ffn, head, attention, rest = row(p, s)
    changes = {
        "pattern": PATTERNS[p],
        "positions": POSITIONS[s],
        "ffn": FFN[ffn],
        "head": HEADS[head],
        "attention": {**ATTENTION[attention], "block_q": 8, "block_k": 8},
        **REST[rest],
    }
    if (PATTERNS[p]["name"], kind(POSITIONS[s])) in REFUSED:
        with pytest.raises(UserError, match=r"^model\.pattern: \w+ (renumbers|does not go with)"):
            merge(BASE, changes, "model")
        return
    cfg = merge(BASE, changes, "model")
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 0.3, x.shape), jnp.float32), params_lib.abstract(cfg))

    @jax.jit
    def both(params: Any) -> list[Any]:
        backends = [merge(cfg, {"attention": {"backend": name}}, "model") for name in ("dense", "blocked")]
        return [Decoder(c).apply({"params": params}, TOKENS).logits_BTV for c in backends]

    dense, blocked = (np.asarray(x) for x in both(params))
    assert dense.shape == (1, 20, 23) and np.isfinite(dense).all()
    assert dense.std() > 0.05
    np.testing.assert_allclose(blocked, dense, rtol=0, atol=2e-5 * max(1.0, np.abs(dense).max()))
