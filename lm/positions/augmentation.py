"""SOCKET augmentation: positions that differ from training row to training row (`Augmentation`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.plug import Model, Plug, Table, bounded

KEY = "train.augmentation"


class Augmentation(Plug):
    """Positions of training rows: a frozen dataclass of settings."""

    KEY: ClassVar[str] = KEY

    @property
    def stochastic(self) -> bool:
        """Whether positions are drawn."""
        return False

    def check(self, cfg: Model, seq_len: int) -> None:
        """Raises `UserError` for a model or a length of rows that it does not fit."""

    def positions(self, cfg: Model, seq_len: int, rng: jax.Array, index_BT: jax.Array) -> jax.Array | None:
        """float32 ``[B, T]`` for rows whose tokens have these places in their documents; None: the tokens' own."""
        return None


@dataclass(frozen=True)
class Own(Augmentation):
    """Every token at its own index."""


@dataclass(frozen=True)
class E2LLM(Augmentation):
    """E2-LLM (arXiv 2401.06951, section 3.2): token m stands at ``(m + t_m) / g``, g and t drawn for every row.

    `g` is uniform in 1 … `g_max` (`scale` fixes it instead); ``t_m`` is 0 for the first `sinks` tokens and one t for
    all others, uniform in 0 … ``g window - seq_len`` (0 where that is negative), so that no position reaches `window`,
    the length the model was trained at (None = its `max_positions`). `max_offset` lowers that bound, 0 turns offsets
    off. `per_batch`: one g and t for all rows of a step. A model trained so reads texts of ``g window`` tokens with
    ``model.positions.scaling = linear`` of factor g, for any g.
    """

    g_max: int = bounded(20, at_least=1)
    scale: int | None = bounded(None, at_least=1)
    sinks: int = bounded(4, at_least=0)
    window: int | None = bounded(None, at_least=1)
    max_offset: int | None = bounded(None, at_least=0)
    per_batch: bool = False

    @property
    def stochastic(self) -> bool:
        return True

    def check(self, cfg: Model, seq_len: int) -> None:
        cfg.positions.fixed(KEY, "e2_llm", "moves")
        largest = self.scale or self.g_max
        bound = self.bound(largest, cfg, seq_len)
        if self.max_offset is not None and self.max_offset > bound:
            raise UserError(
                f"{KEY}.max_offset: {self.max_offset} moves tokens beyond the window; valid: 0 to {bound} "
                f"(g = {largest} times {self.window or cfg.max_positions} positions, less {seq_len} tokens)"
            )

    def bound(self, g: int, cfg: Model, seq_len: int) -> int:
        """The largest offset that keeps every position below `window` at scale `g`."""
        return max(g * (self.window or cfg.max_positions) - seq_len, 0)

    def positions(self, cfg: Model, seq_len: int, rng: jax.Array, index_BT: jax.Array) -> jax.Array | None:
        """float32 ``[B, T]`` of the rows' token indices."""
        rows = 1 if self.per_batch else index_BT.shape[0]
        for_scale, for_offset = jax.random.split(rng)
        g = jax.random.randint(for_scale, (rows, 1), 1, self.g_max + 1)
        g = jnp.full_like(g, self.scale) if self.scale is not None else g
        most = jnp.maximum(g * (self.window or cfg.max_positions) - seq_len, 0)
        if self.max_offset is not None:
            most = jnp.minimum(most, self.max_offset)
        t = jax.random.randint(for_offset, (rows, 1), 0, most + 1)
        moved = index_BT + jnp.where(index_BT >= self.sinks, t, 0)
        return moved.astype(jnp.float32) / g.astype(jnp.float32)


TABLE = Table({"own": Own, "e2_llm": E2LLM})
