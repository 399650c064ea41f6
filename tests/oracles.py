"""The distance oracle: attention in float64 numpy loops, every pair at an arbitrary real distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def rotate(x: np.ndarray, position: float, theta: float) -> np.ndarray:
    """One vector ``[d]`` rotated to a position, pair by pair (arXiv 2104.09864 eq. 15, halves as pairs)."""
    d = len(x)
    out = np.empty_like(x)
    for i in range(d // 2):
        angle = position * theta ** (-2.0 * i / d)
        a, b = x[i], x[i + d // 2]
        out[i] = a * np.cos(angle) - b * np.sin(angle)
        out[i + d // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def attention(
    q_THd: Any,
    k_SKd: Any,
    v_SKd: Any,
    pairs: Callable[[int, int], list[tuple[int, float]]],
    theta: float = 10000.0,
    slopes: Any = None,
) -> np.ndarray:
    """Output ``[T, H, d]``. ``pairs(t, h)`` lists ``(j, distance)`` of what head h of query t sees: the logit of a pair
    is ``rotate(q, distance) . k / sqrt(d)``, or with `slopes` ``q . k / sqrt(d) - slope_h * distance``."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_THd, k_SKd, v_SKd))
    T, H, d = q.shape
    group = H // k.shape[1]
    out = np.zeros((T, H, d))
    for t in range(T):
        for h in range(H):
            seen = pairs(t, h)
            if not seen:
                continue
            scores = []
            for j, distance in seen:
                kj = k[j, h // group]
                if slopes is None:
                    scores.append(rotate(q[t, h], distance, theta) @ kj / np.sqrt(d))
                else:
                    scores.append(q[t, h] @ kj / np.sqrt(d) - slopes[h] * distance)
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            out[t, h] = sum(w * v[j, h // group] for w, (j, _) in zip(weights, seen, strict=True))
    return out
