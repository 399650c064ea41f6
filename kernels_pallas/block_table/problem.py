"""What `block_table` computes of queries, keys, values and lists: a caller's problem, and the same without gaps."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import STATIC, Shaped
from lm.errors import UserError

NAME = "block_table"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Which keys a query sees, how it turns towards them, and its logits.

    Queries ``i * q_block ...`` see keys ``id * block_size ...`` of each id in list i.

    `positions` int32 [B, T]: the last slot a query may see. For causal attention that is its own, or one less to leave
    its own out; negative for nothing. None = the last T of the row's slots. `lengths` int32 [B]: slots in use, others
    may hold anything; None = all S.

    `angles` float32 [P, m], m at most d / 2, and `turn` int32 like the lists, rows of `angles`: for entry j a query's
    pairs ``(i, i + m)`` of channels turn by ``angles[turn[..., j], i]`` more. With keys rotated to places of their own
    and ``angles = shifts * inverse frequencies`` every listed block takes a new place: a key cannot tell whether it
    came nearer or the query did. Turned queries are rounded to their dtype.

    `scale` of the scores: 1 / sqrt(d) if None. `softcap` c: ``c tanh(score / c)``.

    `heads_lead`: k and v are [B, K, S, d]. A TPU reads a block in one piece only then. Without it they are
    [B, S, K, d], and are copied into that order, all of them, at every call.
    """

    block_size: int
    q_block: int = 1
    positions: jax.Array | None = None
    lengths: jax.Array | None = None
    turn: jax.Array | None = None
    angles: jax.Array | None = None
    scale: float | None = None
    softcap: float | None = None
    heads_lead: bool = False

    def filled(self, q_BTHd: jax.Array, S: int, lists: jax.Array) -> Filled:
        """For these queries, `S` slots and lists. Raises UserError for arrays that do not fit."""
        B, T, _, d = q_BTHd.shape
        _check_turns(lists, self.turn, self.angles, d)
        lengths = _integers("lengths", self.lengths, (B,), jnp.full((B,), S, jnp.int32))
        own = jnp.minimum(lengths, S)[:, None] - T + jnp.arange(T, dtype=jnp.int32)
        return Filled(
            positions=_integers("positions", self.positions, (B, T), own),
            lengths=lengths,
            turn=self.turn,
            angles=self.angles,
            block_size=self.block_size,
            q_block=self.q_block,
            scale=d**-0.5 if self.scale is None else float(self.scale),
            softcap=self.softcap,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Filled:
    """A `Problem` as every implementation takes it, heads of keys leading; a pytree of its arrays."""

    positions: jax.Array
    lengths: jax.Array
    turn: jax.Array | None = None
    angles: jax.Array | None = None
    block_size: int = field(metadata=STATIC)
    q_block: int = field(metadata=STATIC)
    scale: float = field(metadata=STATIC)
    softcap: float | None = field(metadata=STATIC)

    @property
    def pairs(self) -> int:
        """Pairs of channels that turn."""
        return 0 if self.angles is None else self.angles.shape[1]

    @property
    def turns(self) -> int:
        """Rows of `angles`."""
        return 0 if self.angles is None else self.angles.shape[0]


def known(ids: jax.Array) -> tuple[int, int] | None:
    """The least and the largest, where they are known before the program runs."""
    if isinstance(ids, jax.core.Tracer):
        return None
    values = np.asarray(ids)
    return int(values.min()), int(values.max())


def _check_turns(lists: Shaped, turn: jax.Array | None, angles: jax.Array | None, d: int) -> None:
    if turn is None and angles is None:
        return
    if turn is None or angles is None:
        raise UserError(
            f"{NAME}: {'angles without turn' if turn is None else 'turn without angles'}; valid: both or none"
        )
    if turn.shape != lists.shape or turn.dtype != jnp.int32:
        raise UserError(f"{NAME}: turn {turn.dtype}{list(turn.shape)}; valid: int32 {list(lists.shape)}, as blocks")
    if angles.ndim != 2 or not 1 <= angles.shape[1] <= d // 2 or not angles.shape[0] or angles.dtype != jnp.float32:
        raise UserError(f"{NAME}: angles {angles.dtype}{list(angles.shape)}; valid: float32 [P, 1 to {d // 2}]")
    ends = known(turn)
    if ends and not 0 <= ends[0] <= ends[1] < angles.shape[0]:
        raise UserError(f"{NAME}: turns {ends[0]} to {ends[1]}; valid: rows of angles, 0 to {angles.shape[0] - 1}")


def _integers(name: str, given: jax.Array | None, shape: tuple[int, ...], default: jax.Array) -> jax.Array:
    if given is None:
        return default
    if given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
        raise UserError(f"{NAME}: {name} {given.dtype}{list(given.shape)}; valid: integers {list(shape)}")
    return jnp.asarray(given, jnp.int32)
