"""E2-LLM's positions in training: by hand, within their bounds, and plain training at scale 1 and offset 0."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases.model import apply

from lm.config import build, model_config
from lm.errors import UserError
from lm.model import params as params_lib
from lm.positions.augmentation import E2LLM
from lm.train import loop
from lm.train.config import TrainConfig
from lm.train.data import prepare

SMALL = {"vocab_size": 258, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_positions": 16}
CFG = model_config(SMALL)
INDEX = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (4000, 16))


def drawn(plug: E2LLM, seed: int = 0, seq_len: int = 16, cfg: Any = CFG, index: Any = INDEX) -> np.ndarray:
    out = plug.positions(cfg, seq_len, jax.random.key(seed), index)
    assert out is not None and out.dtype == jnp.float32
    return np.asarray(out, np.float64)


def test_every_row_is_one_scale_and_one_offset_of_the_law() -> None:
    rows = drawn(E2LLM(g_max=4))
    seen: dict[int, list[int]] = {1: [], 2: [], 3: [], 4: []}
    for row in rows:
        g = round(1 / (row[1] - row[0]))
        t = round((row[4] - 4 / g) * g)
        np.testing.assert_allclose(row, [(m + (t if m >= 4 else 0)) / g for m in range(16)], atol=2e-6)
        seen[g].append(t)
    assert rows.max() < 16
    for g, offsets in seen.items():
        # chi-square with 3 degrees of freedom over scales would allow 16.3 at p = 0.001: 1000 +- 110 each
        assert abs(len(offsets) - 1000) < 110
        most = 16 * g - 16
        assert min(offsets) == 0 and max(offsets) <= most and max(offsets) >= 0.95 * most
        assert abs(np.mean(offsets) - most / 2) <= 4 * most / np.sqrt(12 * len(offsets)) + 1e-9


def test_settings_switch_parts_off() -> None:
    np.testing.assert_array_equal(drawn(E2LLM(g_max=1)), INDEX)
    np.testing.assert_array_equal(drawn(E2LLM(scale=4, max_offset=0)), INDEX / 4)
    only_t = drawn(E2LLM(scale=2, sinks=0))
    np.testing.assert_allclose(np.diff(only_t, axis=1), 0.5)
    assert len(np.unique(only_t[:, 0])) == 17  # t = 0 … 16
    batch = drawn(E2LLM(g_max=9, per_batch=True))
    assert (batch == batch[0]).all()
    # rows longer than the window: nothing to shift at scale 1
    np.testing.assert_array_equal(drawn(E2LLM(g_max=1, window=8)), INDEX)
    packed = jnp.asarray([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, -1, -1, -1]])
    row = drawn(E2LLM(scale=3, max_offset=5), seed=3, index=packed)[0]
    np.testing.assert_array_equal(row[:6], row[6:12])  # documents start over


def test_offsets_leave_relations_behind_the_first_tokens_alone() -> None:
    """Logits of a row whose first four tokens nobody sees do not depend on t."""
    params = params_lib.init(CFG, jax.random.key(0))
    params = jax.tree.map(lambda x: 8 * x if x.ndim >= 3 else x, params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 258, (1, 16)))
    segments = jnp.asarray([[0] * 4 + [1] * 12])

    def run(t: float) -> np.ndarray:
        index = jnp.arange(16.0)[None]
        positions = (index + jnp.where(index >= 4, t, 0.0)) / 2
        out = apply(CFG, params, tokens_BT=tokens, segments_BT=segments, positions_BT=positions)
        return np.asarray(out.logits_BTV)

    np.testing.assert_allclose(run(11.0)[0, 4:], run(0.0)[0, 4:], atol=2e-4)


def test_reading_at_scale_g_is_linear_interpolation() -> None:
    params = params_lib.init(CFG, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 258, (2, 40)))
    scaled = model_config({**SMALL, "positions": {"name": "rope", "scaling": {"name": "linear", "factor": 4.0}}})
    positions = jnp.broadcast_to(jnp.arange(40.0) / 4, (2, 40))
    got = apply(CFG, params, tokens_BT=tokens, positions_BT=positions).logits_BTV
    want = apply(scaled, params, tokens_BT=tokens).logits_BTV
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_scale_1_and_offset_0_is_plain_training_bit_for_bit(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in sorted(topics)[:6]:
        (texts / f"{name}.txt").write_text(topics[name], encoding="utf-8")

    def trained(name: str, augmentation: Any) -> Any:
        train = build(
            TrainConfig,
            {
                "steps": 4,
                "batch": 8,
                "eval_every": 0,
                "final_rows": 8,
                "data": {"texts": (str(texts),), "tokenizer": "bytes", "seq_len": 16, "held_out": 0.3},
                "augmentation": augmentation,
            },
            "train",
        )
        return loop.run(CFG, train, prepare(train, tmp_path / "data"), tmp_path / name, tell=lambda text: None).params

    plain, same, other = (
        trained("plain", "own"),
        trained("same", {"name": "e2_llm", "g_max": 1}),
        trained("other", {"name": "e2_llm", "g_max": 5}),
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (plain, other)), strict=True))


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "scale": ({"scale": 0}, {}, "scale: must be at least 1 or None, found 0"),
    "g_max": ({"g_max": 0}, {}, "g_max: must be at least 1"),
    "offset": ({"max_offset": -1}, {}, "max_offset: must be at least 0 or None"),
    "offset beyond": (
        {"g_max": 2, "max_offset": 17},
        {},
        "max_offset: 17 moves tokens .*; valid: 0 to 16",
    ),
    "no rope": ({}, {"positions": "alibi"}, "moves rotary positions, model.positions is alibi; valid: rope"),
    "dynamic": (
        {},
        {"positions": {"name": "rope", "scaling": {"name": "dynamic", "factor": 2.0}}},
        "does not go with model.positions.scaling = dynamic",
    ),
    "unknown key": ({"gmax": 3}, {}, "train.augmentation.gmax: unknown key"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    change, model, words = MISTAKES[name]
    with pytest.raises(UserError, match=words):
        settings = {"data": {"seq_len": 16}, "augmentation": {"name": "e2_llm", **change}}
        build(TrainConfig, settings, "train").check(model_config({**SMALL, **model}))
