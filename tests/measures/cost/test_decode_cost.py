"""What `decode_cost` reports, against what is known."""

from __future__ import annotations

from cases.measured import CFG, measure, quiet, subject

from lm.config import merge


def test_decode_cost_under_longheads() -> None:
    """Bytes: keys, values and index of every slot, a vector per chunk and head, one chunk of queries."""
    made = measure("decode_cost", lengths=(40, 80), steps=2).run(subject(), quiet)
    assert set(made.samples) == {"ms@40", "ms@80", "cache_mib@40", "cache_mib@80", "exponent"}
    d, n = 4, -(-(80 + 4) // 8)
    want = 3 * 4 * (2 * n * 8 * 2 * d + n * 8 + n * 4 * d + 8 * 4 * d)
    assert made.samples["cache_mib@80"][0] * 2**20 == want


def test_decode_cost_of_latent_attention() -> None:
    """Bytes: one key and one value of 11 channels for all heads, and the index, of 24 slots; and how many are used."""
    mla = {"name": "mla", "kv_rank": 7, "nope_dim": 3, "v_dim": 5}
    cfg = merge(CFG, {"n_kv_heads": 4, "mixer": mla, "pattern": {"name": "causal"}}, "model")
    made = measure("decode_cost", lengths=(20,), steps=1).run(subject(cfg), quiet)
    assert made.samples["cache_mib@20"][0] * 2**20 == 3 * 4 * (24 * (2 * 11 + 1) + 1)
