"""What a layer is given beside the residual stream, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from lm.attention.branches import Keys, Tokens
from lm.caches.base import State
from lm.watch import Watch

Report = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What a layer may look at beside the residual stream.

    `tokens`: places of the tokens (`lm.attention.branches.Tokens`); `length`: float32 scalar, positions in use (the
    largest position + 1); `ids_BT`: token ids, None where the model was given embeddings; `key`: the layer's random
    key, given in training and only there; `watch`: what is to be handed out; `commit`: whether caches keep the tokens.
    """

    tokens: Tokens
    length: jax.Array
    ids_BT: jax.Array | None = None
    key: jax.Array | None = None
    watch: Watch = field(default=Watch(), metadata={"static": True})
    commit: bool = field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerOut:
    """A layer's result ``x[B, T, D]``, its new `cache` (None without one), its `report` (`lm.model.reports`), and of a
    call without `commit` the `fresh` keys that the cache has not kept."""

    x: jax.Array
    cache: State | None = None
    report: Report = field(default_factory=dict)
    fresh: Keys | None = None
