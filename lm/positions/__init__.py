"""SOCKET positions: how a token's position enters the model.

A plug is a frozen dataclass with

* ``rotate(x, positions, length) -> x``: position-dependent map of queries or keys ``x[..., d]``;
  `positions` (float32, tokens, real-valued) broadcasts against ``x.shape[:-1]``; `length` is the traced
  number of positions in use (largest position + 1), which dynamic scalings need;
* ``move(x, at, to, length) -> x``: what was rotated to `at`, rotated to `to` instead;
* ``bias(q_positions, k_positions, n_heads) -> float32[n_heads, ..., T, S] | None``: added to the logits; where that is
  linear in distance, also ``head_slopes(n_heads) -> tuple[float, ...]`` (minus its slopes), for the kernels;
* ``table_size``: rows of a learned absolute table added to the embeddings (0 = none);
* ``bind(model_config) -> plug``: fills in what the model knows (the trained length);
* ``check(model_config)``: refuses impossible settings at config time.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from lm.plug import Table


class Positions(Protocol):
    @property
    def table_size(self) -> int: ...

    def bind(self, cfg: Any) -> Any: ...

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | float) -> jax.Array: ...

    def move(self, x: jax.Array, at: jax.Array, to: jax.Array, length: jax.Array | float) -> jax.Array: ...

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, n_heads: int) -> jax.Array | None: ...


TABLE = Table(
    {
        "rope": "lm.positions.rope:Rope",
        "alibi": "lm.positions.alibi:Alibi",
        "nope": "lm.positions.nope:NoPE",
        "learned": "lm.positions.learned:Learned",
    }
)
