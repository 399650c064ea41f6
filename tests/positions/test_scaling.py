"""Rotary scalings: golden vectors, `transformers`' own functions, limits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import plug
from lm.positions.rope import Rope

EXT = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0)

# Printed by transformers 5.23.0 for head width 16: settings, theta, trained length, length, frequencies, factor.
GOLDEN: dict[str, tuple[Any, float, int, int, list[float], float]] = {
    "default": ("default", 1e4, 2048, 1, [1, 0.31622776, 0.1, 0.03162278, 0.01, 0.00316228, 0.001, 0.00031623], 1),
    "linear": (
        {"name": "linear", "factor": 4.0},
        1e4,
        2048,
        1,
        [0.25, 0.07905694, 0.025, 0.00790569, 0.0025, 0.00079057, 0.00025, 0.00007906],
        1,
    ),
    "dynamic": (
        {"name": "dynamic", "factor": 4.0},
        1e4,
        2048,
        8192,
        [1, 0.21921247, 0.0480541, 0.01053406, 0.0023092, 0.0005062, 0.00011097, 0.00002433],
        1,
    ),
    "yarn": (
        {"name": "yarn", "factor": 4.0},
        1e4,
        2048,
        1,
        [1, 0.31622776, 0.1, 0.02569351, 0.00625, 0.0013835, 0.00025, 0.00007906],
        1.13862944,
    ),
    "yarn-untruncated": (
        {"name": "yarn", "factor": 4.0, "truncate": False},
        1e4,
        2048,
        1,
        [1, 0.31622776, 0.1, 0.0238702, 0.00505697, 0.00081129, 0.00025, 0.00007906],
        1.13862944,
    ),
    "llama3": (
        {"name": "llama3", "factor": 8.0, "original": 8192},
        5e5,
        131072,
        1,
        [1, 0.19392276, 0.03760603, 0.00729267, 0.00052485, 0.00003428, 0.00000665, 0.00000129],
        1,
    ),
    "longrope": (
        {"name": "longrope", "short_factor": EXT[::-1], "long_factor": EXT, "factor": 4.0},
        1e4,
        2048,
        4096,
        [1, 0.2108185, 0.05, 0.01264911, 0.00333333, 0.00090351, 0.00025, 0.00007906],
        1.08711461,
    ),
}


def _frequencies(settings: Any, theta: float, width: int, length: int, trained: int) -> tuple[np.ndarray, float]:
    scaling = plug("lm.positions.scaling", settings, "scaling")
    f, m = scaling.frequencies(theta, width, jnp.asarray(float(length)), trained)
    return np.asarray(f), float(m)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name: str) -> None:
    settings, theta, trained, length, want, factor = GOLDEN[name]
    f, m = _frequencies(settings, theta, 16, length, trained)
    np.testing.assert_allclose(f, want, rtol=1e-5, atol=6e-9)
    assert m == pytest.approx(factor, abs=1e-7)


def test_golden_partial_rotary() -> None:
    rope = Rope(fraction=0.5, trained=64)
    x = jnp.ones((1, 16))
    y = rope.rotate(x, jnp.asarray([3.0]), 4.0)
    np.testing.assert_array_equal(y[:, 8:], x[:, 8:])
    angles = 3.0 * np.array([1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(y[0, :4], np.cos(angles) - np.sin(angles), atol=1e-6)


HF: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    # name, fields in transformers' spelling, fields in ours that differ, length
    ("linear", {"factor": 3.0}, {}, 10),
    *(("dynamic", {"factor": 2.5}, {}, n) for n in (10, 64, 65, 200, 1000)),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16}, {}, 10),
    ("yarn", {"factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "original_max_position_embeddings": 32}, {}, 10),
    ("yarn", {"factor": 8.0, "attention_factor": 0.7, "original_max_position_embeddings": 32}, {}, 10),
    ("yarn", {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.2, "original_max_position_embeddings": 32}, {}, 10),
    ("yarn", {"factor": 8.0, "truncate": False, "original_max_position_embeddings": 32}, {}, 10),
    *(
        (
            "longrope",
            {"short_factor": list(EXT), "long_factor": list(EXT[::-1]), "original_max_position_embeddings": 16, **more},
            {},
            n,
        )
        for n in (10, 16, 17, 64)
        for more in ({}, {"factor": 6.0}, {"attention_factor": 1.25})
    ),
    (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        {},
        10,
    ),
]


@pytest.mark.parametrize(("kind", "fields", "ours", "length"), HF)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_transformers_own_functions(kind: str, fields: Any, ours: Any, length: int, theta: float) -> None:
    torch = pytest.importorskip("torch", reason="transformers' rope functions need torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from lm.interop.families.rotary import read as rope

    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **fields},
    )
    want, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    settings = {**rope(config.to_dict())["scaling"], **ours}
    f, m = _frequencies(settings, theta, 16, length, 64)
    np.testing.assert_allclose(f, want.numpy(), rtol=2e-6)
    assert m == pytest.approx(float(factor), rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "linear"},
        {"name": "ntk"},
        {"name": "dynamic"},
        {"name": "yarn"},
        {"name": "llama3", "factor": 1.0},
        {"name": "longrope", "short_factor": (1.0,) * 8, "long_factor": (1.0,) * 8},
    ],
    ids=lambda s: s["name"],
)
def test_factor_one_is_the_default(settings: Any) -> None:
    for length in (10, 64):
        f, m = _frequencies(settings, 1e4, 16, length, 64)
        want, _ = _frequencies("default", 1e4, 16, length, 64)
        np.testing.assert_allclose(f, want, rtol=1e-6)
        assert m == 1.0


def test_static_ntk_stretches_the_slowest_wave_by_the_factor() -> None:
    f, _ = _frequencies({"name": "ntk", "factor": 4.0}, 1e4, 16, 10, 64)
    base, _ = _frequencies("default", 1e4, 16, 10, 64)
    assert f[0] == base[0] == 1.0
    assert base[-1] / f[-1] == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("settings", ["default", {"name": "yarn", "factor": 4.0}, {"name": "linear", "factor": 3.0}])
def test_scores_depend_on_differences(settings: Any) -> None:
    rope = Rope(scaling=plug("lm.positions.scaling", settings, "s"), trained=64)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(16,)), jnp.float32) for _ in range(2))

    def score(a: float, b: float) -> float:
        return float(rope.rotate(q, jnp.asarray(a), 1.0) @ rope.rotate(k, jnp.asarray(b), 1.0))

    assert score(7.5, 2.25) == pytest.approx(score(107.5, 102.25), abs=1e-4)
    assert abs(score(7.5, 2.25) - score(9.5, 2.25)) > 1e-3


def test_moving_a_rotated_key_is_rotating_it_there() -> None:
    rope = Rope(scaling=plug("lm.positions.scaling", {"name": "yarn", "factor": 4.0}, "s"), trained=64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16)), jnp.float32)
    a, b = jnp.arange(5.0) * 100, jnp.arange(5.0)[::-1] + 0.5
    moved = rope.move(rope.rotate(x, a, 1.0), a, b, 1.0)
    np.testing.assert_allclose(moved, rope.rotate(x, b, 1.0), atol=2e-5)
