"""Latent attention as a layer, against NumPy written from the paper's equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
from cases import model
from cases.mixer_case import MixerCase
from cases.model import BASE, Params

from lm import caches
from lm.errors import UserError

TURNS, REST, VALUES, RANK, EPS = 4, 6, 5, 7, 0.3


def _normed(x: np.ndarray, scale: np.ndarray) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale


class TestMLA(MixerCase):
    """Queries out of a narrow vector; heads of ten channels, of which four turn, and values of five."""

    change = {
        "n_kv_heads": 4,
        "head_dim": TURNS,
        "mixer": {
            "name": "mla",
            "kv_rank": RANK,
            "q_rank": 9,
            "nope_dim": REST,
            "v_dim": VALUES,
            "bias": True,
            "latent_eps": EPS,
            "backend": "dense",
        },
    }

    def naive(self, params: Params, x_TD: np.ndarray) -> np.ndarray:
        def plain(name: str, x: np.ndarray) -> Any:
            p = params[name]
            return np.einsum("tD,D...->t...", x, p["kernel"]) + p.get("bias", 0.0)

        if "q" in params:
            q = plain("q", x_TD)
        else:
            q = plain("q_up", _normed(plain("q_down", x_TD), params["q_norm"]["scale"]))
        both = plain("kv_down", x_TD)
        latent = _normed(both[:, TURNS:], params["kv_norm"]["scale"])
        k, v = plain("k_up", latent), plain("v_up", latent)
        T, H, _ = q.shape
        at = [oracles.rotate(both[t, :TURNS], t, 10000.0) for t in range(T)]
        y = np.zeros((T, H, VALUES))
        for t, h in np.ndindex(T, H):
            own = oracles.rotate(q[t, h, :TURNS], t, 10000.0)
            s = np.array([own @ at[j] + q[t, h, TURNS:] @ k[j, h] for j in range(t + 1)]) / np.sqrt(TURNS + REST)
            p = np.exp(s - s.max())
            y[t, h] = p @ v[: t + 1, h] / p.sum()
        return np.einsum("thd,hdD->tD", y, params["o"]["kernel"]) + params["o"]["bias"]


class TestQueriesOffTheStream(TestMLA):
    """Values wider than keys, and no vector of queries."""

    change = {**TestMLA.change, "mixer": {**TestMLA.change["mixer"], "q_rank": None, "bias": False, "scale": 10**-0.5}}

    def naive(self, params: Params, x_TD: np.ndarray) -> np.ndarray:
        return super().naive({**params, "o": {**params["o"], "bias": 0.0}}, x_TD)


def test_a_cache_keeps_one_vector_per_token() -> None:
    cfg = model.changed(BASE, TestMLA.change)
    state: Any = caches.init(cfg, 2, 16)[0]
    assert state.k_BKCd.shape == (2, 1, 16, RANK + TURNS)


def test_heads_share_no_keys() -> None:
    with pytest.raises(UserError, match=r"n_kv_heads: found 2; mixer mla reads keys .*; valid: 4, or None"):
        model.changed(BASE, {**TestMLA.change, "n_kv_heads": 2})
