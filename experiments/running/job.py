"""Jobs: the measurements that a plan comes to, and what determines their numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.running.plan import Plan
from experiments.spec.arms import RANDOM
from experiments.spec.settings import MEASURES
from experiments.spec.surgery import written
from lm.config import ModelConfig, to_dict
from lm.errors import UserError
from lm.measures import Measure
from lm.plug import table
from lm.surgery.base import Surgery


@dataclass(frozen=True, eq=False)
class Job:
    """One measurement; `seed` None where no seed can matter."""

    arm: str
    label: str
    seed: int | None
    plug: Measure = field(repr=False)
    model: ModelConfig | None = field(repr=False)
    cost: float = 1.0
    trains: bool = False
    surgery: tuple[Surgery, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.arm} / {self.label}" + ("" if not self.seed else f" / seed {self.seed}")

    def what(
        self, checkpoint: str, read: Mapping[str, str], device: str, training: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Everything that determines the numbers; JSON-ready. The device is part of it: some measures are times.
        `training`: what determines the parameters, where they are trained."""
        measure = to_dict(self.plug, table(MEASURES))
        return {
            "checkpoint": checkpoint,
            "model": to_dict(self.model),
            "measure": measure,
            "reads": read[_text(measure)],
            "seed": self.seed,
            "device": device,
            **({} if training is None else {"training": dict(training)}),
            **written(self.surgery),
        }


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def make(plan: Plan) -> list[Job]:
    """All jobs of all arms, in the config's order. A seed that cannot matter is not repeated: the parameters are given
    and the measure draws nothing."""
    out = []
    for arm in plan.arms.values():
        for label, plug in arm.measures.items():
            trains = arm.train is not None and not plug.untrained
            drawn = trains or (plan.exp.checkpoint == RANDOM and not plug.untrained) or plug.stochastic
            cost = float(plug.cost(arm.model or ModelConfig()))  # where no checkpoint says more
            surgery = () if plug.untrained else arm.surgery
            for seed in plan.exp.seeds if drawn else (None,):
                out.append(Job(arm.name, label, seed, plug, arm.model, cost, trains, surgery))
    return out


def identities(plan: Plan) -> dict[str, str]:
    """What every measure will read, as a hash; a text that is missing or broken is refused here, before any work."""
    out: dict[str, str] = {}
    for arm in plan.arms.values():
        for label, plug in arm.measures.items():
            at = _text(to_dict(plug, table(MEASURES)))
            if at not in out:
                try:
                    out[at] = plug.identity()
                except UserError as e:
                    raise UserError(f"measures.{label}: {e}") from None
    return out
