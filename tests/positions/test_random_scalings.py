"""Random rotary settings, as a checkpoint's config.json would hold them, against `transformers`' own functions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import plug
from lm.interop.families import rotary


def draw(kind: str, rng: np.random.Generator) -> tuple[dict[str, Any], int, int, int]:
    """``rope_parameters``, head width, trained length and length in use."""
    head_dim, trained, original = (int(rng.choice(x)) for x in ([16, 32, 64], [64, 2048, 131072], [16, 1024, 8192]))
    p: dict[str, Any] = {"rope_type": kind, "rope_theta": float(rng.choice([100.0, 1e4, 5e5]))}
    p["partial_rotary_factor"] = float(rng.choice([1.0, 0.5, 0.25]))
    width = int(head_dim * p["partial_rotary_factor"])
    p["factor"] = float(rng.choice([1.0, 1.5, 4.0, 40.0]))
    if kind == "llama3" or (kind in ("yarn", "longrope") and rng.random() < 0.7):
        p["original_max_position_embeddings"] = original
    if kind == "llama3":
        p |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0, 8.0]))}
    if kind == "longrope":
        p |= {
            "short_factor": (1 + rng.random(width // 2)).tolist(),
            "long_factor": (1 + 4 * rng.random(width // 2)).tolist(),
        }
        if rng.random() < 0.4:
            del p["factor"]
    if kind == "yarn":
        if rng.random() < 0.4:
            p |= {"beta_fast": float(rng.choice([16, 64])), "beta_slow": float(rng.choice([0.5, 2, 4]))}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if rng.random() < 0.4:
                p[name] = float(rng.random() + 0.3)
        if rng.random() < 0.4:
            p["truncate"] = bool(rng.random() < 0.5)
    return p, head_dim, trained, int(rng.choice([1, original, original + 1, trained, trained + 1, 4 * trained]))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_random_settings(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="transformers' rope functions need torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rng = np.random.default_rng(len(kind))
    for _ in range(40):
        fields, head_dim, trained, length = draw(kind, rng)
        config = transformers.LlamaConfig(
            hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=trained, rope_parameters=fields
        )
        want, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
        rope = plug("lm.positions", {"name": "rope", **rotary.read(config.to_dict())}, "positions")
        f, m = rope.scaling.frequencies(rope.theta, rope.width(head_dim), jnp.asarray(float(length)), trained)
        np.testing.assert_allclose(f, want.numpy(), rtol=5e-6, err_msg=f"{fields} at {length} of {trained}")
        assert float(m) == pytest.approx(float(factor), rel=1e-6), fields


def test_yarn_whose_ramp_has_no_width() -> None:
    """Six original positions hold no full turn: only the fastest frequency is kept, the rest are interpolated."""
    scaling = plug("lm.positions.scaling", {"name": "yarn", "factor": 4.0, "original": 6}, "scaling")
    plain = plug("lm.positions.scaling", "default", "scaling")
    f, want = (np.asarray(s.frequencies(1e4, 16, 1.0, 64)[0]) for s in (scaling, plain))
    np.testing.assert_allclose(f, want / np.array([1.0] + [4.0] * 7), rtol=1e-6)
