"""What training itself showed: loss, bits per byte, speed and the optimizer's memory, read from the run's log."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.measures.base import Measure, Measured, Progress, Subject
from lm.train import folder
from lm.train.log import read


@dataclass(frozen=True)
class TrainLog(Measure):
    """The log of the run that made the subject's parameters.

    Samples, one per run: ``nll`` (nats per token) and ``bits_per_byte`` on all held-out rows at the end, ``train_nll``
    over the last `tail` of the steps, ``skipped`` steps, ``tokens_per_second`` (median step) and ``optimizer_mib``; and
    whatever the layers report under a name with a slash (``moe/dropped`` as ``moe_dropped``), over the same tail.
    Curves by step: held-out bits per byte, and the training loss averaged over `bin` steps. A run whose loss is not
    finite at the end gives infinity. A damaged log is refused; lines that the training found lost are noted.
    """

    tail: float = 0.05
    bin: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.tail <= 1:
            raise UserError(f"measures.train_log.tail: must lie in (0, 1], found {self.tail}")
        if self.bin < 1:
            raise UserError(f"measures.train_log.bin: must be at least 1, found {self.bin}")

    def check(self, subject: Subject, trains: bool) -> None:
        if not trains:
            raise UserError("measures.train_log: the parameters were not trained by this experiment; valid: set train")

    def run(self, subject: Subject, progress: Progress) -> Measured:
        self.check(subject, subject.run is not None)
        assert subject.run is not None
        about = folder.read_about(subject.run)
        last = about.get("train", {}).get("steps")
        lines = read(subject.run / folder.METRICS, None if last is None else last - 1)
        steps = [x for x in lines if "loss" in x]
        held = [x for x in lines if "held_out_nll" in x]
        final = [x for x in lines if "final_nll" in x]
        loss = np.array([_number(x["nll"]) for x in steps])
        n = max(1, round(self.tail * len(loss)))
        samples = {
            "train_nll": [float(loss[-n:].mean())],
            "skipped": [float(steps[-1]["skipped"])],
            "tokens_per_second": [float(np.median([x["tokens_per_second"] for x in steps]))],
            "optimizer_mib": [about["optimizer_bytes"] / 2**20],
        }
        for name in (k for k, v in steps[-1].items() if "/" in k and not isinstance(v, list)):
            samples[name.replace("/", "_")] = [float(np.mean([_number(x.get(name, math.nan)) for x in steps[-n:]]))]
        if final:
            samples["nll"] = [_number(final[-1]["final_nll"])]
            samples["bits_per_byte"] = [_number(final[-1]["final_bits_per_byte"])]
        edges = range(0, len(loss), self.bin)
        curves: dict[str, Any] = {
            "loss": {
                "x": [steps[i]["step"] for i in edges],
                "y": [float(loss[i : i + self.bin].mean()) for i in edges],
                "xlabel": "step",
                "ylabel": "training loss, nats per token",
            }
        }
        if held:
            points = [(x["step"] + 1, _number(x["held_out_bits_per_byte"])) for x in held]
            points += [(x["step"] + 1, _number(x["final_bits_per_byte"])) for x in final[-1:]]
            curves["held_out"] = {
                "x": [p[0] for p in points],
                "y": [p[1] for p in points],
                "xlabel": "step",
                "ylabel": "held-out bits per byte",
            }
        progress(1.0, "read")
        lost = [str(x["lost"]) for x in lines if "lost" in x]  # when a session of the training went on
        return Measured(
            samples, curves, {"steps": len(steps), "data": about["data"], **({"lost": lost} if lost else {})}
        )


def _number(value: Any) -> float:
    """NaN and infinities are words in the log; either way the loss is infinite."""
    out = float(value)
    return out if math.isfinite(out) else math.inf
