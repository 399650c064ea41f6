"""Every kind of cache, rotated and raw keys: a prompt cut anywhere, then a piece and single tokens, is the whole."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from cases import model, plugs
from cases.plugs import PATTERNS, POSITIONS, kind, name

from lm import caches
from lm.caches.auto import Auto
from lm.config import ModelConfig, model_config

T, PIECE = 12, 3
BASE = model_config(
    {"vocab_size": 23, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 16, "max_positions": 12}
)
TOKENS = np.random.default_rng(0).integers(0, 23, T)


@dataclass(frozen=True)
class Split:
    """A pattern, positions, and the name of a cache (``auto``: the smallest that loses nothing)."""

    pattern: int
    positions: int
    cache: str = "auto"

    @property
    def cfg(self) -> ModelConfig:
        plugs = {"pattern": PATTERNS[self.pattern], "positions": POSITIONS[self.positions], "cache": self.cache}
        return model.changed(BASE, plugs)

    def __str__(self) -> str:
        forced = [] if self.cache == "auto" else [self.cache]
        return "-".join([name(PATTERNS[self.pattern]), name(POSITIONS[self.positions]), *forced])


def _split(pattern: str, positions: str, cache: str = "auto") -> Split:
    """By the names that pytest shows."""
    patterns, places = [name(p) for p in PATTERNS], [name(s) for s in POSITIONS]
    return Split(patterns.index(pattern), next(i for i, s in enumerate(places) if s.startswith(positions)), cache)


FAR = "lm_infinite-6-2-6.0-3-0"
SPLITS = [
    _split("causal", "default"),
    _split("causal", "dynamic"),
    _split("causal-3", "linear"),
    _split("causal-3", "longrope"),
    _split(FAR, "ntk"),
    _split(FAR, "dynamic"),
    _split("streaming-5-2", "learned", "full"),
    _split("sliding_window-5", "llama3"),
    _split("sliding_window-5", "longrope"),
    _split("streaming-5-2", "alibi"),
    _split("streaming-5-2", "dynamic"),
    _split("lm_infinite-6-2-6.0", "yarn"),
    _split("lm_infinite-6-2-6.0", "nope"),
    _split("longheads-2-10", "default"),
    _split("longheads-2-10", "linear"),
]
PRODUCT = [
    Split(p, s)
    for p in range(len(PATTERNS))
    for s in range(len(POSITIONS))
    if PATTERNS[p]["name"] != "bidirectional" and not plugs.refused(p, s)
]


def test_the_splits_meet_every_cache_with_both_kinds_of_keys() -> None:
    assert {PATTERNS[c.pattern]["name"] for c in SPLITS} == {p["name"] for p in PATTERNS} - {"bidirectional"}
    assert {kind(POSITIONS[c.positions]) for c in SPLITS} == {kind(s) for s in POSITIONS}
    met = set()
    for case in SPLITS:
        (layer,) = case.cfg.layers()
        cache = layer.cache.chosen(layer, 3 * T) if isinstance(layer.cache, Auto) else layer.cache
        met.add((caches.TABLE.name_of(type(cache)), model.length_dependent(case.cfg)))
    kinds = set(caches.TABLE) - {"auto"}
    assert met == {(cache, raw) for cache in kinds for raw in (False, True)} - {("block_memory", True)}


def test_the_product_has_all_pairs() -> None:
    assert {PATTERNS[c.pattern]["name"] for c in PRODUCT} >= {
        "causal",
        "sliding_window",
        "streaming",
        "lm_infinite",
        "longheads",
    }
    assert len({kind(POSITIONS[c.positions]) for c in PRODUCT}) >= 9


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_every_split(case: Split) -> None:
    _every_split(case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", PRODUCT, ids=str)
def test_every_split_of_every_pair(case: Split) -> None:
    _every_split(case)


def _every_split(case: Split) -> None:
    """The wanted logits of token t are those of the text that ends there: some frequencies depend on its length."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0.0, 0.5, x.shape).astype(np.float32), model.abstract(case.cfg))
    starts = np.arange(PATTERNS[case.pattern].get("prefix", 1), T)
    want, first, piece, single = model.splits(case.cfg, T, PIECE)(params, TOKENS, starts)
    close = 2e-5 * max(1.0, float(np.abs(want).max()))
    for i, n in enumerate(starts):
        read = n + PIECE if n + PIECE <= T else n  # a piece that does not fit is left out
        got = [first[i], *([piece[i]] if read > n else []), *single[i][: T - read]]
        ends = [n - 1, *([read - 1] if read > n else []), *range(read, T)]
        np.testing.assert_allclose(np.stack(got), want[ends], atol=close, err_msg=f"{case}, {n}")
