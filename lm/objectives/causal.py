"""Next-token cross-entropy, read off the head piece by piece so that no array of all logits exists."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.errors import UserError
from lm.heads.base import Targets
from lm.objectives.base import Batch, LossOut, Objective
from lm.objectives.forward import Forward
from lm.plug import bounded


@dataclass(frozen=True)
class Causal(Objective):
    """Minimises ``sum_t w_t (-log p(target_t) + z_loss * log^2 Z_t)``, Z the softmax denominator.

    `z_loss` keeps log Z near 0 (PaLM, arXiv 2204.02311, section 5: 1e-4). `chunk`: tokens of the batch whose logits
    exist at one time; 0 = all. It changes memory and speed, not the result (beyond the order of float32 additions).
    """

    z_loss: float = 0.0
    chunk: int = bounded(1024, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.z_loss < math.inf:
            raise UserError(f"train.objective.z_loss: must be finite and not negative, found {self.z_loss}")

    @property
    def logits_at_once(self) -> int:
        return self.chunk

    def loss(self, forward: Forward, batch: Batch) -> LossOut:
        """The loss and the sums of `lm.objectives.likelihood.head_loss`."""
        out = forward(forward.rows(batch))
        over = Targets(out.hidden_BTD, batch["targets"], batch["weights"], self.z_loss, self.chunk)
        return LossOut(*forward.likelihood(over))
