"""What `kernels_pallas.branches` is a union of."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from kernels_pallas.common import Pair
from kernels_pallas.flash import problem as flash


@dataclass(frozen=True)
class Part:
    """One branch: queries and keys at the positions it takes for them, and the pairs that are its own.

    `q_BTHd` may have fewer rows than there are queries: they are the last ones. `mask`, `tiles`, `index`, `segments`,
    `positions`, `offset` (index of the first query) and `causal` are those of `kernels_pallas.flash.problem.Problem`.
    No pair of query and key may be visible in two parts.
    """

    q_BTHd: jax.Array
    k_BSKd: jax.Array
    mask: flash.Mask
    tiles: flash.Tiles | None = None
    index: Pair | None = None
    segments: Pair | None = None
    positions: Pair | None = None
    offset: int = 0
    causal: bool = False


@dataclass(frozen=True)
class Problem:
    """What the parts share. `n_queries`: T, or what the longest part has if None.

    `slopes_H`, `sinks_H`, `scale` and `softcap`: as of `kernels_pallas.flash.problem.Problem`. The sink logit of a head
    takes part in the denominator once, so one part must have all queries.
    """

    n_queries: int | None = None
    slopes_H: jax.Array | None = None
    sinks_H: jax.Array | None = None
    scale: float | None = None
    softcap: float | None = None

    def of_part(self, part: Part, *, sinks: bool, alone: bool) -> flash.Problem:
        """The problem of one part. `sinks`: it takes the sinks; `alone`: there is no other part."""
        return flash.Problem(
            part.mask,
            tiles=part.tiles,
            index=part.index,
            segments=part.segments,
            positions=part.positions,
            slopes_H=self.slopes_H,
            sinks_H=self.sinks_H if sinks else None,
            scale=self.scale,
            softcap=self.softcap,
            offset=part.offset,
            # What cuDNN serves it returns with a rounded log-sum-exp, which a single branch does not need.
            causal=part.causal and alone,
        )


PLAIN = Problem()
