"""ALiBi: a linear penalty on distance instead of rotations (arXiv 2108.12409)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from lm.positions.base import Positions


def slopes(n_heads: int, style: str = "bloom") -> tuple[float, ...]:
    """Head slopes ``m_h`` (section 3). Away from powers of two the BLOOM and MPT orders differ.

    ``bloom`` (the authors' own): slopes of the power below, then every other slope of twice that power.
    ``mpt``: slopes of the power above, second, fourth, … first, then first, third, …; cut to `n_heads`.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    below = 2 ** math.floor(math.log2(n_heads))
    if below == n_heads:
        return tuple(geometric(n_heads))
    if style == "mpt":
        above = geometric(2 * below)
        return tuple((above[1::2] + above[0::2])[:n_heads])
    return tuple(geometric(below) + geometric(2 * below)[0::2][: n_heads - below])


@dataclass(frozen=True)
class Alibi(Positions):
    """Adds ``-m_h * (q_position - k_position)`` to the logits of head h."""

    style: Literal["bloom", "mpt"] = "bloom"

    def head_slopes(self, n_heads: int) -> tuple[float, ...]:
        """The bias of head h is minus its slope times the distance."""
        return slopes(n_heads, self.style)

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, n_heads: int) -> jax.Array | None:
        """``q_positions[..., T]``, ``k_positions[..., S]`` -> ``[..., n_heads, T, S]`` float32."""
        distance = q_positions[..., None, :, None] - k_positions[..., None, None, :]
        m_H = jnp.asarray(self.head_slopes(n_heads), jnp.float32)
        return -m_H[:, None, None] * distance
