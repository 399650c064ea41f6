"""No positional encoding: the causal mask is the only order signal (arXiv 2305.19466)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class NoPE:
    """The identity; also the base of encodings that leave queries and keys alone."""

    @property
    def table_size(self) -> int:
        return 0

    def bind(self, cfg: Any) -> Any:
        return self

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | float) -> jax.Array:
        return x

    def move(self, x: jax.Array, at: jax.Array, to: jax.Array, length: jax.Array | float) -> jax.Array:
        return x

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, n_heads: int) -> jax.Array | None:
        return None
