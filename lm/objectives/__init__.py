"""SOCKET objective: what training minimises.

A plug is a frozen dataclass with ``loss(cfg, params, batch) -> (loss, sums)``. `loss` is a float32 scalar, the *sum*
over the batch's weighted targets, to be differentiated by `params`; `sums` is a dict of float32 scalars that add up
over batches and devices, ``weight`` (what to divide by for a mean) among them. Sums rather than means, so that gradient
accumulation and packed rows of any fill give the same gradient as one large batch.

`batch` is a dict of arrays ``[B, T]``: ``inputs`` and ``targets`` int32, ``weights`` float32 (0 = not counted), and,
where a row holds more than one document or padding, ``segments`` and ``index`` int32 as the decoder takes
them; in training also ``key``, a random key for the decoder. What layers report is added by `lm.model.reports.add`.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from lm.config import ModelConfig
from lm.plug import Table

TABLE = Table(
    {
        "causal": "lm.objectives.causal:Causal",
    }
)


class Objective(Protocol):
    def loss(
        self, cfg: ModelConfig, params: dict[str, Any], batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...
