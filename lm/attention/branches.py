"""Branches: attention is one softmax over a union of disjoint branches.

Einsum letters: B batch, T query length, S key length, H query heads, K key/value heads, G = H / K, d head width,
n gathered keys.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.branches.merging import merge
from kernels_pallas.common import NEG
from lm.attention.masks import Mask
from lm.positions.base import Positions

__all__ = ["NEG", "AnyBranch", "BlockBranch", "Branch", "Context", "Keys", "Tokens", "Where", "merge", "place"]

Where = jax.Array | float | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """What attention knows about one side's tokens.

    `index`: int32 in-document index (masks), negative = padding or an empty cache slot; `positions`: float32
    real-valued positions (rotations, biases); `segments`: int32 document ids of a packed row or None.
    `contiguous`: index is 0, 1, … along every row, so tiles may be skipped by absolute index. `leading`: an index
    i < leading, where present, sits in slot i (cache slots of the first tokens). `ancestors_BTT`: bool, of new tokens
    that are no text but a tree: whether token s is on the way from the root to token t, t itself included.
    `lengths_BT`: float32, the positions in use in each token's own text, where rotations depend on it, else None.
    `ends_B`: int32, how many tokens each row's text will have, where these are a piece of it that may not be the last.
    """

    index_BT: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    contiguous: bool = field(default=False, metadata={"static": True})
    leading: int = field(default=0, metadata={"static": True})
    ancestors_BTT: jax.Array | None = None
    lengths_BT: jax.Array | None = None
    ends_B: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Keys:
    """One source of keys: a cache, new tokens, a memory. ``k[B, S, K, d]`` and ``v[B, S, K, d]`` with their `tokens`.

    Keys are raw (unrotated), or with `rotated` at ``tokens.positions_BT``. Where the queries are among the keys, the
    last `new` slots are theirs.
    """

    k_BSKd: jax.Array
    v_BSKd: jax.Array
    tokens: Tokens
    rotated: bool = field(default=False, metadata={"static": True})
    new: int = field(default=0, metadata={"static": True})


@dataclass(frozen=True)
class Branch:
    """Keys a query may see under `mask`, and the positions both sides take for it.

    `q_positions` / `k_positions`: None = the tokens' own, a number = that constant, or float32 ``[B, T]`` /
    ``[B, S]``. `rows`: only the last so many queries take part, or int32 ``[B, r]``, the slots of those that do (-1 =
    none). `gather_BHTn`: instead of all keys, the listed key slots per head and query (-1 = none); T is the number of
    `rows` where they are set, and slots of queries go with it alone. `source`: which of the context's sources.
    """

    mask: Mask
    q_positions: Where = None
    k_positions: Where = None
    rows: int | jax.Array | None = None
    gather_BHTn: jax.Array | None = None
    source: int = 0


@dataclass(frozen=True)
class BlockBranch:
    """Keys of whole blocks of `size` tokens, listed per head and query; each listed block takes a place of its own.

    Key i of a block sits at position i (`k_positions`: None = the keys already are so rotated, or float32 ``[B, S]``,
    their places within their blocks) and the query, for list entry n, at ``q_positions[B, 1 or H, T, n]``: moving the
    query by as much as a block was moved costs one rotation per block instead of one per key. `ids_BHTn` int32 names
    rows of `starts_BN`, the slot of each block's first key; -1 = none. `mask` (and padding, and segments) apply to
    every pair, whatever is listed.
    """

    mask: Mask
    size: int
    starts_BN: jax.Array
    ids_BHTn: jax.Array
    q_positions: jax.Array
    k_positions: jax.Array | None = None


AnyBranch = Branch | BlockBranch


@dataclass(frozen=True)
class Context:
    """What a pattern may look at to form its branches: raw queries, and the sources of keys and values.

    Most patterns read the first source, whose arrays are also ``k_BSKd``, ``v_BSKd`` and ``keys``. `blocks`: what a
    cache knows about its blocks (`lm.attention.blocks.BlockTable`), None without one. `apart`: as many queries as keys,
    yet of different tokens (two parts of a text), so rows say nothing about distances.
    """

    q_BTHd: jax.Array
    queries: Tokens
    sources: tuple[Keys, ...]
    positions: Positions
    length: jax.Array
    scale: float
    blocks: Any = None
    apart: bool = False

    @property
    def k_BSKd(self) -> jax.Array:
        return self.sources[0].k_BSKd

    @property
    def v_BSKd(self) -> jax.Array:
        return self.sources[0].v_BSKd

    @property
    def keys(self) -> Tokens:
        return self.sources[0].tokens

    @property
    def rotated(self) -> bool:
        """Whether keys already carry the rotation to ``keys.positions_BT``."""
        return self.sources[0].rotated

    def of(self, branch: AnyBranch) -> Context:
        """The context of a branch: the same queries, and its source as the first one."""
        at = branch.source if isinstance(branch, Branch) else 0
        return self if at == 0 else dataclasses.replace(self, sources=(self.sources[at],))

    def length_of(self, tokens: Tokens) -> jax.Array:
        """Positions in use, as `Positions.rotate` wants them for vectors of `tokens`: a scalar, ``[B, T, 1]``, or
        ``[B, 1, 1]`` for tokens from a cache, where a row is one text."""
        if tokens.lengths_BT is not None:
            return tokens.lengths_BT[:, :, None]
        of_queries = self.queries.lengths_BT
        return self.length if of_queries is None else of_queries[:, :1, None]

    def queries_at(self, where: Where, rows: int | jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The queries of `rows` (`Branch.rows`) rotated to `where` ``[B, rows, H, d]``, and those positions ``[B,
        rows]``."""
        at, length = place(where, self.queries.positions_BT), self.length_of(self.queries)
        q, at = chosen(self.q_BTHd, rows), chosen(at, rows)
        return self.positions.rotate(q, at[:, :, None], chosen(length, rows) if length.ndim else length), at

    def keys_at(self, where: Where, first: int | None = None) -> tuple[jax.Array, jax.Array]:
        """The `first` keys (None = all) rotated to `where` ``[B, S, K, d]``, and those positions ``[B, S]``."""
        own, k = self.keys.positions_BT[:, :first], self.k_BSKd[:, :first]
        at = place(where[:, :first] if isinstance(where, jax.Array) else where, own)
        length = self.length_of(self.keys)
        length = length[:, :first] if length.ndim else length
        if not self.rotated:
            return self.positions.rotate(k, at[:, :, None], length), at
        if where is not None:
            k = self.positions.move(k, own[:, :, None], at[:, :, None], length)
        return k, at


def chosen(x_BTx: jax.Array, rows: int | jax.Array | None) -> jax.Array:
    """The entries ``[B, r, …]`` of the queries that `rows` means (`Branch.rows`); slot -1 gives slot 0."""
    if rows is None:
        return x_BTx
    if isinstance(rows, int):
        return x_BTx[:, max(x_BTx.shape[1] - rows, 0) :]
    return jax.vmap(lambda x, at: x[at])(x_BTx, jnp.maximum(rows, 0))


def place(where: Where, own: jax.Array) -> jax.Array:
    """A branch's positions as an array that broadcasts like `own` ``[B, T]``."""
    if where is None:
        return own
    if isinstance(where, (int, float)):
        return jnp.full(own.shape, where, jnp.float32)
    return where
