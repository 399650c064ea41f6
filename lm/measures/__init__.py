"""SOCKET measure: what an experiment reads off a model.

A plug is a frozen dataclass with ``run(subject, progress) -> Measured``; ``cost(model_config) -> float`` (relative, for
time-left estimates); ``identity() -> str`` (hash of the data it reads); ``stochastic``: whether the seed matters;
``untrained`` (False where absent): nothing of the subject's parameters is read, so that none are trained for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from lm.measures.base import Measured, Subject
from lm.plug import Table

Progress = Callable[[float, str], None]


class Measure(Protocol):
    stochastic: ClassVar[bool]

    def run(self, subject: Subject, progress: Progress) -> Measured: ...

    def cost(self, cfg: Any) -> float: ...

    def identity(self) -> str: ...


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
