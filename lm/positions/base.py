"""The socket ``model.positions``: what a position encoding says of itself."""

from __future__ import annotations

from typing import ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.plug import Model, Plug


def largest_of_text(x_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """For each token the largest `x` of its own text ``[B, T]``: of its row, or of its segment of a packed row."""
    if segments_BT is None:
        return jnp.broadcast_to(x_BT.max(1, keepdims=True), x_BT.shape)
    new_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    number_BT, T = jnp.cumsum(new_BT, axis=1), x_BT.shape[1]
    return jax.vmap(lambda x, at: jax.ops.segment_max(x, at, T)[at])(x_BT, number_BT)


class Positions(Plug):
    """How a token's position enters the model. Without overrides: not at all.

    Positions are float32, real-valued, in tokens; `length` is the traced number of positions in use (the largest
    position + 1), which scalings that depend on it need: a scalar, or one that broadcasts against the positions.
    """

    KEY: ClassVar[str] = "model.positions"

    def check(self, cfg: Model) -> None:
        """Raises `UserError` for a model that the encoding does not fit."""

    def bind(self, cfg: Model) -> Self:
        """The encoding with what the model knows filled in (the trained length)."""
        return self

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | float) -> jax.Array:
        """Queries or keys ``x[..., d]`` at `positions`, which broadcast against ``x.shape[:-1]``."""
        return x

    def move(self, x: jax.Array, at: jax.Array, to: jax.Array, length: jax.Array | float) -> jax.Array:
        """What was rotated to `at`, rotated to `to` instead."""
        return x

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, n_heads: int) -> jax.Array | None:
        """Added to the logits: float32 ``[..., n_heads, T, S]`` of ``q_positions[..., T]``, ``k_positions[..., S]``."""
        return None

    def head_slopes(self, n_heads: int) -> tuple[float, ...] | None:
        """Minus the slopes of a bias that is linear in distance, one per head; None for another bias or none."""
        return None

    def frequencies(self, head_dim: int, length: jax.Array | float) -> jax.Array:
        """Radians per position of every rotated pair; only rotary encodings have them."""
        raise NotImplementedError

    def absolute(self, scope: nn.Module, cfg: Model, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The embeddings with what the encoding adds to them; parameters are declared on `scope`."""
        return x_BTD

    def lengths(
        self,
        index_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        length_B: jax.Array | None,
    ) -> jax.Array | None:
        """Positions in use in each token's own text, float32 ``[B, T]``; None where no rotation depends on them."""
        return None

    @property
    def limit(self) -> int:
        """Positions there are; 0 = any number."""
        return 0

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated."""
        return False

    @property
    def length_dependent(self) -> bool:
        """Whether rotations change with the number of positions in use, so that keys must be cached raw."""
        return False

    @property
    def scaling_name(self) -> str:
        """The name of the rotary scaling, for messages."""
        return ""

    def known(self, cfg: Model) -> int:
        """Positions that the model can tell apart: its trained length, times what a scaling stretches it by."""
        return cfg.max_positions

    def fixed(self, key: str, who: str, does: str) -> None:
        """Raises `UserError` unless tokens can be given other positions: rotary ones whose frequencies stay the same.
        `key` is the place of the setting `who`, which `does` so."""
        if not self.rotary:
            raise UserError(
                f"{key}: {who} {does} rotary positions, model.positions is {type(self).__name__.lower()}; valid: rope"
            )
        if self.length_dependent:
            raise UserError(
                f"{key}: {who} does not go with model.positions.scaling = {self.scaling_name}, whose frequencies "
                "change with the length of the text; valid: default, linear, ntk, yarn, llama3"
            )
