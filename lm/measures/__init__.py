"""SOCKET measure: what an experiment reads off a model.

A plug is a frozen dataclass that inherits `Measure`: ``run(subject, progress) -> Measured``, and where they differ from
the defaults ``cost``, ``identity``, ``stochastic`` and ``untrained``.
"""

from __future__ import annotations

from lm.measures.base import Measure, Measured, Progress, Subject
from lm.plug import Table

TABLE = Table(
    {
        "nll_by_position": "lm.measures.language.nll:NllByPosition",
        "passkey": "lm.measures.language.passkey:Passkey",
        "chunk_choice": "lm.measures.routing.chunk_choice:ChunkChoice",
        "decode_cost": "lm.measures.cost.decode_cost:DecodeCost",
        "prefill_cost": "lm.measures.cost.prefill_cost:PrefillCost",
        "train_log": "lm.measures.cost.train_log:TrainLog",
        "smoothness": "lm.measures.language.smoothness:Smoothness",
        "conditional_density": "lm.measures.tasks.density:ConditionalDensity",
        "forecast": "lm.measures.tasks.forecast:Forecast",
        "routing": "lm.measures.routing.routing:Routing",
        "routing_history": "lm.measures.routing.routing:RoutingHistory",
    }
)

__all__ = ["TABLE", "Measure", "Measured", "Progress", "Subject"]
