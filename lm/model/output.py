"""What a model gives."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from lm.attention.branches import Keys
from lm.caches import Caches
from lm.layer import Report
from lm.model.taps import Taps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """`logits_BTV` float32 (None when not asked for), `hidden_BTD` after the final norm, the new `cache`.

    One entry per layer: `taps`, what was watched (`lm.watch.Watch`); `reports`, what the layer says beside its output
    (`lm.model.reports`); `fresh`, of a call without ``commit`` the keys that it did not keep (`lm.caches.commit`).
    """

    logits_BTV: jax.Array | None
    hidden_BTD: jax.Array
    cache: Caches | None = None
    taps: tuple[Taps, ...] = ()
    reports: tuple[Report, ...] = ()
    fresh: tuple[Keys | None, ...] | None = None

    def tap(self, name: str) -> list[jax.Array]:
        """What the layers that have it have handed out under `name`, in order."""
        return [taps[name] for taps in self.taps if name in taps]
