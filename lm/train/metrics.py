"""From the sums that a training step computes to its line in the log."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from lm.model import reports
from lm.train.run import Run


class Meter:
    """Makes the lines of a run's steps, and takes the time between them.

    `flops_per_token` and `peak` (floating-point operations per second) give the model FLOPs utilisation.
    """

    def __init__(self, run: Run, flops_per_token: float, peak: float) -> None:
        self.run, self.flops_per_token, self.peak = run, flops_per_token, peak
        self.schedule = run.train.schedule.factor(run.train.steps)
        self.clock = 0.0

    def restart(self) -> None:
        """What has passed since the last step is no part of the next one's time."""
        self.clock = time.perf_counter()

    def read(self, i: int, metrics: Mapping[str, object]) -> tuple[dict[str, Any], str, dict[str, float]]:
        """Waits for the metrics of step `i`; gives its line, a sentence for people, and the metrics as numbers."""
        arrays: dict[str, Any] = dict(jax.device_get(metrics))
        reported = reports.report(self.run.cfg, arrays.pop("aux", ((),) * self.run.cfg.n_layers))
        m = {k: float(v) for k, v in arrays.items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        weight = max(m["weight"], 1.0)
        nll, speed = m["nll"] / weight, weight / seconds
        moved = i - int(m["skipped"]) + (0 if m["ok"] else 1)  # steps before this one that changed parameters
        line = {
            "loss": m["loss"],
            "nll": nll,
            "bits_per_byte": nll / math.log(2) / self.run.data.bytes_per_token,
            "accuracy": m["correct"] / weight if "correct" in m else None,
            **{k: v / weight for k, v in m.items() if k.startswith("aux_")},
            "grad_norm": m["grad_norm"],
            "learning_rate": self.run.train.optimizer.learning_rate * float(self.schedule(moved)),
            "tokens": weight,
            "seconds": round(seconds, 5),
            "tokens_per_second": round(speed, 1),
            "mfu": round(speed * self.flops_per_token / self.peak, 4),
            "skipped": int(m["skipped"]),
            **reported,
        }
        text = (
            f"step {i + 1}/{self.run.train.steps}, loss {m['loss']:.3f}, {line['bits_per_byte']:.3f} bits/byte, "
            f"{speed:,.0f} tokens/s, MFU {line['mfu']:.0%}"
        )
        return line, text, m


def plain(value: object) -> object:
    """JSON has no NaN and no infinity: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
