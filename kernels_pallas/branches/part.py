"""What `kernels_pallas.branches` is a union of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Part:
    """One branch: queries and keys at the positions it takes for them, and the pairs that are its own.

    `q_BTHd` may have fewer rows than there are queries: they are the last ones. `mask`, `tiles`, `index`, `segments`,
    `positions`, `offset` (index of the first query) and `causal` are those of `kernels_pallas.flash.api.flash`. No pair
    of query and key may be visible in two parts.
    """

    q_BTHd: jax.Array
    k_BSKd: jax.Array
    mask: Any
    tiles: Any = None
    index: Pair | None = None
    segments: Pair | None = None
    positions: Pair | None = None
    offset: int = 0
    causal: bool = False
