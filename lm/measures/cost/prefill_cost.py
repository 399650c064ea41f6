"""Time of one forward pass by length of the text, and how it grows."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError
from lm.measures.base import Measure, Measured, Progress, Subject, exponent
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.watch import Watch

_OVERRIDES = "measures.prefill_cost.layers: needs a model without layer_overrides; valid: None"


@dataclass(frozen=True)
class PrefillCost(Measure):
    """Times the forward pass of one text of random tokens, the head left out, `repeats` times per length.

    `layers`: only so many of the model's first layers (None = all): layers of one kind cost the same, and a few of them
    show the exponent in a fraction of the time. Compilation is not counted. Samples ``ms@LENGTH`` (milliseconds, one
    per repeat) and, from two lengths on, ``exponent``: the median time grows as length to that power (least squares
    over logarithms).
    """

    lengths: tuple[int, ...] = (1024, 8192)
    layers: int | None = None
    repeats: int = 1
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or self.repeats < 1:
            raise UserError(
                f"measures.prefill_cost: lengths and repeats must be at least 1, found {self.lengths}, {self.repeats}"
            )
        if self.layers is not None and self.layers < 1:
            raise UserError(f"measures.prefill_cost.layers: must be at least 1 or None, found {self.layers}")

    def identity(self) -> str:
        return "random tokens"

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def cost(self, cfg: ModelConfig) -> float:
        share = min(self.layers or cfg.n_layers, cfg.n_layers) / cfg.n_layers
        return sum(n * (1.0 + n / 8192) for n in self.lengths) * self.repeats * share

    def check(self, subject: Subject, trains: bool) -> None:
        cfg = subject.config
        if min(self.layers or cfg.n_layers, cfg.n_layers) < cfg.n_layers and cfg.layer_overrides:
            raise UserError(_OVERRIDES)

    def run(self, subject: Subject, progress: Progress) -> Measured:
        cfg, params = _first_layers(subject, self.layers)
        model = DecoderModel(cfg)

        @jax.jit
        def read(params: Any, tokens_BT: jax.Array) -> jax.Array:
            return model.apply(params, Inputs(tokens_BT), watch=Watch(logits=False)).hidden_BTD

        samples: dict[str, list[float]] = {}
        medians: list[float] = []
        for done, length in enumerate(self.lengths):
            shape = (1, length)
            tokens = jax.random.randint(jax.random.key(subject.seed), shape, 0, cfg.vocab_size, jnp.int32)
            run, times = read.lower(params, tokens).compile(), []
            for _ in range(self.repeats):
                start = time.perf_counter()
                jax.block_until_ready(run(params, tokens))
                times.append(1e3 * (time.perf_counter() - start))
            samples[f"ms@{length}"] = times
            medians.append(float(np.median(times)))
            progress((done + 1) / len(self.lengths), f"{length} tokens read")
        if len(set(self.lengths)) > 1:
            samples["exponent"] = [exponent(self.lengths, medians)]
        curve = {
            "x": list(self.lengths),
            "y": medians,
            "xlabel": "tokens of the text",
            "ylabel": f"milliseconds, {cfg.n_layers} of {subject.config.n_layers} layers",
            "log": True,
        }
        return Measured(samples, {"prefill_ms": curve}, {"layers": cfg.n_layers, "repeats": self.repeats})


def _first_layers(subject: Subject, layers: int | None) -> tuple[Any, Any]:
    """The model cut after `layers` layers, and its parameters."""
    cfg, params = subject.config, dict(subject.params)
    n = min(layers or cfg.n_layers, cfg.n_layers)
    if n == cfg.n_layers:
        return cfg, subject.params
    if "blocks" in params:
        params["blocks"] = jax.tree.map(lambda p: p[:n], params["blocks"])
    if cfg.layer_overrides:
        raise UserError(_OVERRIDES)
    return dataclasses.replace(cfg, n_layers=n), params
