"""The objective on held-out rows."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from lm.data.loader import held_out_batches
from lm.model import reports
from lm.train.placement import Placement
from lm.train.run import Run
from lm.train.step import Beside, Params


class Evaluation:
    """Reads the held-out rows of a run, which must have some (`possible`)."""

    def __init__(self, run: Run, placement: Placement) -> None:
        self.run = run
        self.sums = placement.evaluator()

    @property
    def possible(self) -> bool:
        return self.run.data.held_out is not None

    def __call__(self, trained: Params, rows: int, beside: Beside) -> dict[str, Any]:
        """Means over the first `rows` rows: ``nll`` in nats per token, ``bits_per_byte``, ``accuracy`` where the
        objective counts it, what layers report; ``tokens`` is how many were read."""
        run, sums = self.run, dict[str, Any]()
        assert run.data.held_out is not None
        for batch in held_out_batches(run.data.held_out, run.train.batch, rows):
            part = jax.tree.map(np.float64, jax.device_get(self.sums(trained, batch, beside)))
            sums = jax.tree.map(np.add, sums, part) if sums else part
        reported = reports.report(run.cfg, sums.pop("aux", ((),) * run.cfg.n_layers), whole=True)
        weight = max(sums["weight"], 1.0)
        nll = sums["nll"] / weight
        bits_per_byte = nll / math.log(2) / run.data.bytes_per_token
        values = {"nll": float(nll), "bits_per_byte": float(bits_per_byte), "tokens": float(sums["weight"]), **reported}
        if "correct" in sums:
            values["accuracy"] = float(sums["correct"] / weight)
        return values
