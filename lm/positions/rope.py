"""Rotary position embedding (arXiv 2104.09864) with a socket for its scalings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.plug import Model, bounded, socket
from lm.positions.base import Positions, largest_of_text
from lm.positions.scaling import Scaling


@dataclass(frozen=True)
class Rope(Positions):
    """Rotates pairs ``(i, i + width/2)`` of the first ``width = int(head_dim * fraction)`` channels.

    This is the split-half layout; checkpoints stored with adjacent pairs are permuted at import.
    Angles are float32: they lose about 6e-8 rad per position, visible beyond 1e5 positions.
    `trained` is the length scalings are relative to; None = `ModelConfig.max_positions`.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling = socket("lm.positions.scaling", "default")
    trained: int | None = bounded(None, at_least=1)

    def width(self, head_dim: int) -> int:
        return int(head_dim * self.fraction)

    def check(self, cfg: Model) -> None:
        width = self.width(cfg.head_width)
        if width % 2 or not 0 < width <= cfg.head_width:
            raise UserError(
                f"model.positions.fraction: rotary width int({cfg.head_width} * {self.fraction}) = {width} "
                f"must be even and in 2 … {cfg.head_width}"
            )
        if not self.theta > 1.0:
            raise UserError(f"model.positions.theta: must exceed 1, found {self.theta}")
        self.scaling.check_width(width)

    @property
    def rotary(self) -> bool:
        return True

    @property
    def length_dependent(self) -> bool:
        return self.scaling.length_dependent

    @property
    def scaling_name(self) -> str:
        return type(self.scaling).__name__.lower()

    def known(self, cfg: Model) -> int:
        return int(cfg.max_positions * self.scaling.stretch)

    def bind(self, cfg: Model) -> Self:
        return self if self.trained is not None else dataclasses.replace(self, trained=cfg.max_positions)

    def lengths(
        self,
        index_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        length_B: jax.Array | None,
    ) -> jax.Array | None:
        """A text is a row, or a segment of a packed row. `length_B`: of rows of which only a piece is given."""
        if not self.length_dependent:
            return None
        end_BT = jnp.where(index_BT >= 0, positions_BT, 0.0) + 1.0
        if length_B is not None:
            return jnp.broadcast_to(length_B.astype(jnp.float32)[:, None], end_BT.shape)
        return largest_of_text(end_BT, segments_BT)

    def frequencies(self, head_dim: int, length: jax.Array | float) -> jax.Array:
        """Radians per position of every rotated pair, ``[width / 2]``."""
        return jnp.asarray(self.scaling.frequencies(self.theta, self.width(head_dim), length, self.trained or 2048)[0])

    def angles(self, positions: jax.Array, width: int, length: jax.Array | float) -> tuple[jax.Array, jax.Array]:
        """``cos, sin`` of shape ``positions.shape + (width // 2,)``, both multiplied by the attention factor."""
        freqs, m = self._frequencies(width, length)
        angles = jnp.asarray(positions, jnp.float32)[..., None] * freqs
        return _kept(jnp.cos(angles) * m), _kept(jnp.sin(angles) * m)

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | float) -> jax.Array:
        """Rotates ``x[..., d]`` to real-valued `positions`, which broadcast against ``x.shape[:-1]``."""
        return self._turn(x, *self.angles(positions, self.width(x.shape[-1]), length))

    def move(self, x: jax.Array, at: jax.Array, to: jax.Array, length: jax.Array | float) -> jax.Array:
        """Rotations compose: keys cached at their own positions turn by the difference (without the factor again)."""
        width = self.width(x.shape[-1])
        freqs, _ = self._frequencies(width, length)
        angles = (jnp.asarray(to, jnp.float32)[..., None] * freqs) - (jnp.asarray(at, jnp.float32)[..., None] * freqs)
        return self._turn(x, jnp.cos(angles), jnp.sin(angles))

    def _frequencies(self, width: int, length: jax.Array | float) -> tuple[jax.Array, float]:
        """``[width / 2]``, or with another shape of `length` ``length.shape + (width / 2,)``."""
        length = length[..., None] if isinstance(length, jax.Array) and length.ndim else length
        return self.scaling.frequencies(self.theta, width, length, self.trained or 2048)

    def _turn(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        width = self.width(x.shape[-1])
        cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
        # Halves swap by a reversal of an axis of two, not by concatenation: one loop without branches, and so is its
        # gradient.
        pair = x[..., :width].reshape(*x.shape[:-1], 2, width // 2)
        sign = jnp.asarray([[-1.0], [1.0]], x.dtype)
        turned = pair * cos[..., None, :] + pair[..., ::-1, :] * (sign * sin[..., None, :])
        turned = turned.reshape(*x.shape[:-1], width)
        return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)


def _kept(x: jax.Array) -> jax.Array:
    """`x`, written to memory: the product with the identity is exact, and XLA fuses nothing through a product.

    Fused into a rotation, sines would be computed anew for every head of every token, forward and backward; on the CPU
    that took as long as attention. (An optimization barrier does not help: it is removed before operations are fused.)
    """
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision="highest")
