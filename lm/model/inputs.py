"""What a model is given."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm.attention.branches import Tokens
from lm.positions.base import Positions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """One call's tokens: int32 `tokens_BT`, or `embeddings_BTD` in their place.

    `index_BT` int32 counts tokens within their document (default 0, 1, …; negative = padding); `positions_BT` float32
    are the rotary positions (default: the index); `segments_BT` int32 keeps packed documents apart. `key` is given in
    training: layers that are random, or follow another rule there, go by it. `length_B` int32, with a cache: how many
    tokens the whole text of every row has, of which these may be an early piece. `ancestors_BTT`: the tokens are a tree
    (`lm.attention.branches.Tokens`), not a text; they are read behind a cache, without ``commit``.
    """

    tokens_BT: jax.Array | None = None
    embeddings_BTD: jax.Array | None = None
    index_BT: jax.Array | None = None
    positions_BT: jax.Array | None = None
    segments_BT: jax.Array | None = None
    key: jax.Array | None = None
    length_B: jax.Array | None = None
    ancestors_BTT: jax.Array | None = None

    def check(self, cached: bool, commit: bool) -> None:
        """Raises `ValueError` for a call that means nothing."""
        if (self.tokens_BT is None) == (self.embeddings_BTD is None):
            raise ValueError("give either tokens_BT or embeddings_BTD")
        if cached and (self.index_BT is None or self.segments_BT is not None):
            raise ValueError("with a cache, index_BT is needed and segments_BT is not supported")
        if self.length_B is not None and not cached:
            raise ValueError("length_B: without a cache the tokens are the whole text")
        if self.ancestors_BTT is not None and (commit or not cached):
            raise ValueError("ancestors_BTT: a tree is read behind a cache, with commit=False")
        if not commit and not cached:
            raise ValueError("commit=False: there is no cache that could keep the tokens")

    def tokens(self, shape: tuple[int, ...], encoding: Positions) -> Tokens:
        """The tokens as attention takes them; `shape` is (rows, tokens), `encoding` the model's of positions."""
        index, segments = self.index_BT, self.segments_BT
        contiguous = index is None and segments is None
        if index is None:
            index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
            if segments is not None:  # count from the start of each document
                new = jnp.concatenate([jnp.ones_like(segments[:, :1]), jnp.diff(segments)], 1) != 0
                index = index - jax.lax.cummax(jnp.where(new, index, 0), axis=1)
        positions = index.astype(jnp.float32) if self.positions_BT is None else self.positions_BT.astype(jnp.float32)
        lengths = encoding.lengths(index, positions, segments, self.length_B)
        return Tokens(
            index,
            positions,
            segments,
            contiguous,
            ancestors_BTT=self.ancestors_BTT,
            lengths_BT=lengths,
            ends_B=self.length_B,
        )
