"""SOCKET measure: what an experiment reads off a model.

A plug is a frozen dataclass with ``run(subject, progress) -> Measured``; ``cost(model_config) -> float`` (relative, for
time-left estimates); ``identity() -> str`` (hash of the data it reads); ``stochastic``: whether the seed matters;
``untrained`` (False where absent): nothing of the subject's parameters is read, so that none are trained for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from lm.measures.base import Measured, Subject
from lm.measures.chunk_choice import ChunkChoice
from lm.measures.decode_cost import DecodeCost
from lm.measures.density import ConditionalDensity
from lm.measures.forecast import Forecast
from lm.measures.nll import NllByPosition
from lm.measures.passkey import Passkey
from lm.measures.prefill_cost import PrefillCost
from lm.measures.routing import Routing, RoutingHistory
from lm.measures.smoothness import Smoothness
from lm.measures.train_log import TrainLog

Progress = Callable[[float, str], None]


class Measure(Protocol):
    stochastic: ClassVar[bool]

    def run(self, subject: Subject, progress: Progress) -> Measured: ...

    def cost(self, cfg: Any) -> float: ...

    def identity(self) -> str: ...


TABLE = {
    "nll_by_position": NllByPosition,
    "passkey": Passkey,
    "chunk_choice": ChunkChoice,
    "decode_cost": DecodeCost,
    "prefill_cost": PrefillCost,
    "train_log": TrainLog,
    "smoothness": Smoothness,
    "conditional_density": ConditionalDensity,
    "forecast": Forecast,
    "routing": Routing,
    "routing_history": RoutingHistory,
}

__all__ = ["TABLE", "Measure", "Measured", "Progress", "Subject"]
