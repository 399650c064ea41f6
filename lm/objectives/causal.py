"""Next-token cross-entropy, read off the head piece by piece so that no array of all logits exists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax

from lm.config import ModelConfig
from lm.errors import UserError
from lm.heads.cross_entropy import Sums
from lm.model import reports
from lm.model.decoder import Decoder
from lm.objectives.likelihood import head_loss

__all__ = ["Causal", "head_loss"]


@dataclass(frozen=True)
class Causal:
    """Minimises ``sum_t w_t (-log p(target_t) + z_loss * log^2 Z_t)``, Z the softmax denominator.

    `z_loss` keeps log Z near 0 (PaLM, arXiv 2204.02311, section 5: 1e-4). `chunk`: tokens of the batch whose logits
    exist at one time; 0 = all. It changes memory and speed, not the result (beyond the order of float32 additions).
    """

    z_loss: float = 0.0
    chunk: int = 1024

    def __post_init__(self) -> None:
        if not 0.0 <= self.z_loss < math.inf:
            raise UserError(f"train.objective.z_loss: must be finite and not negative, found {self.z_loss}")
        if self.chunk < 0:
            raise UserError(f"train.objective.chunk: must be at least 1, or 0 for all tokens, found {self.chunk}")

    def loss(self, cfg: ModelConfig, params: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        """The loss and the sums ``nll``, ``weight``, ``z`` (of log^2 Z) and ``correct`` (the target had the largest
        logit, ties included), each weighted; float32 scalars; with what layers add (`lm.model.reports.add`). See
        `lm.objectives` for `batch`."""
        where = {f"{name}_BT": batch[name] for name in ("segments", "index", "positions") if name in batch}
        out = Decoder(cfg).apply({"params": params}, batch["inputs"], logits=False, key=batch.get("key"), **where)
        found = head_loss(cfg, params, out.hidden_BTD, batch["targets"], batch["weights"], self.z_loss, self.chunk)
        return reports.add(out.reports, *found)
