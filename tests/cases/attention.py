"""Keys, queries and tokens for tests of attention by itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.attention.branches import NEG, Tokens

H, K, D = 4, 2, 8
BACKENDS = ("dense", "blocked")


def draw(rng: np.random.Generator, T: int, S: int, B: int = 1) -> tuple[jax.Array, ...]:
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def side(T: int) -> Tokens:
    """Tokens of one text."""
    index = jnp.arange(T, dtype=jnp.int32)[None]
    return Tokens(index, index.astype(jnp.float32), contiguous=True)


def reference(q: Any, k: Any, v: Any, seen_BTS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in float64; a row that sees nothing gives 0 and `NEG`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = np.einsum("bthd,bshd->bths", q, np.repeat(k, H // K, 2)) / np.sqrt(D)
    s = np.where(seen_BTS[:, :, None], s, -np.inf)
    with np.errstate(all="ignore"):
        lse = np.log(np.exp(s).sum(-1))
        p = np.nan_to_num(np.exp(s - lse[..., None]), nan=0.0)
    return np.einsum("bths,bshd->bthd", p, np.repeat(v, H // K, 2)), np.where(np.isinf(lse), NEG, lse)
