"""Every pattern with every position plug, and every pair of the other sockets: finite, and blocked equals dense."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import merge, model_config
from lm.errors import UserError
from lm.model import params as params_lib
from lm.model.decoder import Decoder
from lm.plug import table

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
FFN: list[dict[str, Any]] = [
    *({"name": name, "bias": i % 2 == 0} for i, name in enumerate(sorted(set(table("lm.ffn")) - {"moe"}))),
    {"name": "moe", "experts": 3, "d_expert": 8, "shared": 8, "router": {"name": "topk", "k": 2}},
]
HEADS: list[dict[str, Any]] = [
    {"name": "linear", "tie": True},
    {"name": "linear", "tie": False, "bias": True},
    {"name": "linear", "tie": True, "softcap": 10.0},
    {"name": "fourier", "frequencies": 4},
    {"name": "mixture"},
]
ATTENTION: list[dict[str, Any]] = [{}, {"softcap": 5.0, "qk_norm": True}, {"qkv_bias": True, "out_bias": True}]
REST: list[dict[str, Any]] = [
    {"norm": norm, "parallel_residual": parallel} for norm in sorted(table("lm.norms")) for parallel in (False, True)
]
BASE = model_config(
    {"vocab_size": 23, "d_model": 24, "n_layers": 1, "n_heads": 3, "n_kv_heads": 1, "d_ff": 16, "max_positions": 12}
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (1, 20)))


def name(plug: dict[str, Any]) -> str:
    values = {**plug, **plug.get("scaling", {})}
    short = [str(v) for k, v in values.items() if k not in ("scaling", "name") and not isinstance(v, list)]
    return "-".join([values["name"], *short])


def kind(positions: dict[str, Any]) -> str:
    return str(positions.get("scaling", positions)["name"])


# Pairs that cannot work: renumbering needs rotary positions whose frequencies stay the same.
REFUSED = {("longheads", positions) for positions in ("nope", "alibi", "learned", "dynamic", "longrope")}


def rows() -> dict[tuple[int, int], tuple[int, ...]]:
    """For every pattern and position the options of the other sockets: those that meet most others for the first
    time."""
    met: set[tuple[int, int, int, int]] = set()
    out = {}
    for p, s in itertools.product(range(len(PATTERNS)), range(len(POSITIONS))):
        rest = itertools.product(*(range(len(x)) for x in (HEADS, ATTENTION, REST)))
        every = [(p, s, (p + s) % len(FFN), *others) for others in rest]
        new = [{(a, b, r[a], r[b]) for a, b in itertools.combinations(range(6), 2)} for r in every]
        best = max(range(len(every)), key=lambda i: len(new[i] - met))
        met |= new[best]
        out[p, s] = every[best]
    return out


ROWS = rows()


def test_the_rows_name_every_plug_and_meet_every_pair() -> None:
    assert {p["name"] for p in PATTERNS} == set(table("lm.patterns"))
    assert {p["name"] for p in FFN} == set(table("lm.ffn"))
    assert {p["name"] for p in HEADS} == set(table("lm.heads"))
    assert {p["name"] for p in POSITIONS} == set(table("lm.positions"))
    assert {p["scaling"]["name"] for p in POSITIONS if "scaling" in p} == set(table("lm.positions.scaling"))
    sizes = [len(x) for x in (PATTERNS, POSITIONS, FFN, HEADS, ATTENTION, REST)]
    for a, b in itertools.combinations(range(6), 2):
        met = {(r[a], r[b]) for r in ROWS.values()}
        assert met == set(itertools.product(range(sizes[a]), range(sizes[b]))), (a, b)


@pytest.mark.parametrize("p", range(len(PATTERNS)), ids=lambda p: name(PATTERNS[p]))
@pytest.mark.parametrize("s", range(len(POSITIONS)), ids=lambda s: name(POSITIONS[s]))
def test_a_pair_runs(p: int, s: int) -> None:
    _, _, ffn, head, attention, rest = ROWS[p, s]
    changes = {
        "pattern": PATTERNS[p],
        "positions": POSITIONS[s],
        "ffn": FFN[ffn],
        "head": HEADS[head],
        "mixer": {**ATTENTION[attention], "block_q": 8, "block_k": 8},
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
        backends = [merge(cfg, {"mixer": {"backend": name}}, "model") for name in ("dense", "blocked")]
        return [Decoder(c).apply({"params": params}, TOKENS).logits_BTV for c in backends]

    dense, blocked = (np.asarray(x) for x in both(params))
    assert dense.shape == (1, 20, 23) and np.isfinite(dense).all()
    assert dense.std() > 0.05
    np.testing.assert_allclose(blocked, dense, rtol=0, atol=2e-5 * max(1.0, np.abs(dense).max()))
