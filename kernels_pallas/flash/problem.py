"""What `flash` computes of queries, keys and values: a caller's problem, and the same with every default filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np

from kernels_pallas.common import STATIC, Pair, Shaped
from lm.errors import UserError

Mask = Callable[[jax.Array, jax.Array], jax.Array]
Tiles = Callable[[int, int, int, int], np.ndarray]
Rows = dict[str, jax.Array]


@dataclass(frozen=True)
class Problem:
    """Which keys a query sees, and its logits.

    ``logit = softcap(scale q.k - slope_h (q_position - k_position))``. A query sees a key where
    ``mask(q_index, k_index)`` holds, both indices are >= 0 and the segments agree.

    `mask`: hashable, traceable on int32 arrays. `tiles`: callable ``(n_queries, n_keys, block_q, block_k)`` -> int32
    ``[n, 3]`` of (query block, key block, whole). Only these tiles are visited. In a whole one every pair is visible,
    segments aside. Without `tiles` all tiles are visited, and the mask is evaluated in each.

    `index`: int32 ``[B, T]`` and ``[B, S]``, negative = padding; None = ``offset + 0, 1, ...`` and ``0, 1, ...``.
    `segments`: int32 of these shapes. `positions`: float32 of these shapes; slopes need them, and they get no gradient.

    `slopes_H`: a slope per head. `sinks_H`: one more logit per head, which takes part in the denominator and has no
    value. `scale`: ``d ** -0.5`` if None; a temperature divides it. `causal` says that the mask is plain causal, for
    library kernels.
    """

    mask: Mask
    tiles: Tiles | None = None
    index: Pair | None = None
    segments: Pair | None = None
    positions: Pair | None = None
    slopes_H: jax.Array | None = None
    sinks_H: jax.Array | None = None
    scale: float | None = None
    softcap: float | None = None
    offset: int = 0
    causal: bool = False

    def scores(self, q_BTHd: Shaped, k_BSKd: Shaped) -> Scores:
        """For these queries and keys. Raises UserError for heads and slopes that do not fit."""
        H, d = q_BTHd.shape[2:]
        K = k_BSKd.shape[2]
        if H % K:
            raise UserError(f"flash: {H} query heads and {K} key heads; valid: a multiple of the key heads")
        if self.slopes_H is not None and self.positions is None:
            raise UserError("flash: slopes_H without positions; valid: both")
        rows: Rows = {}
        positions = self.positions if self.slopes_H is not None else None
        for key, pair in {"index": self.index, "segments": self.segments, "positions": positions}.items():
            if pair is not None:
                rows |= {f"q_{key}": pair[0], f"k_{key}": pair[1]}
        if "q_positions" in rows:
            rows |= {key: jax.lax.stop_gradient(rows[key]) for key in ("q_positions", "k_positions")}
        return Scores(
            rows=rows,
            slopes_H=self.slopes_H,
            sinks_H=self.sinks_H,
            mask=self.mask,
            tiles=self.tiles,
            offset=self.offset,
            scale=d**-0.5 if self.scale is None else float(self.scale),
            softcap=self.softcap,
            causal=self.causal,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scores:
    """A `Problem` as every implementation takes it; a pytree of its arrays.

    `rows`: numbers per token by name, ``q_index``, ``k_index``, ``q_segments`` and so on, ``[B or 1, T]`` or
    ``[B or 1, S]``. Positions are there if slopes are.
    """

    rows: Rows
    slopes_H: jax.Array | None
    sinks_H: jax.Array | None
    mask: Mask = field(metadata=STATIC)
    tiles: Tiles | None = field(metadata=STATIC)
    offset: int = field(metadata=STATIC)
    scale: float = field(metadata=STATIC)
    softcap: float | None = field(metadata=STATIC)
    causal: bool = field(metadata=STATIC)

    def listed(self, lengths: tuple[int, int], block: tuple[int, int], counts: tuple[int, int]) -> np.ndarray:
        """int32 ``[n, 3]``: the tiles to visit, all `counts` of them if the caller listed none."""
        if self.tiles is None:
            return np.array([(i, j, 0) for i in range(counts[0]) for j in range(counts[1])], np.int32)
        return np.asarray(self.tiles(*lengths, *block), np.int32).reshape(-1, 3)
