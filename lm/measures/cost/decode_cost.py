"""Decoding time per token and cache bytes by length of the text so far."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lm import caches
from lm.attention.branches import Keys, Tokens
from lm.config import ModelConfig
from lm.errors import UserError
from lm.measures.base import Measure, Measured, Progress, Subject, exponent
from lm.model.inputs import Inputs


@dataclass(frozen=True)
class DecodeCost(Measure):
    """Times one-token steps, batch 1, with a cache that already holds `lengths` tokens.

    The cache is the smallest that loses nothing under the arm's pattern. Its keys and values are noise: time and bytes
    do not depend on them, and filling it by reading so much text would cost far more than the measurement. Samples
    ``ms@LENGTH`` (one per timed step, milliseconds), ``cache_mib@LENGTH``, and from two lengths on ``exponent``: the
    median time of a token grows as length to that power (least squares over logarithms).
    """

    lengths: tuple[int, ...] = (1024, 8192)
    steps: int = 8
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or self.steps < 1:
            raise UserError(
                f"measures.decode_cost: lengths and steps must be at least 1, found {self.lengths}, {self.steps}"
            )

    def identity(self) -> str:
        # Another layout is another time.
        return "noise; one tree of weights per layer; keys [B, K, C, d], values [B, K, d, C]"

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def cost(self, cfg: ModelConfig) -> float:
        return 400.0 * len(self.lengths) * (self.steps + 20)

    def run(self, subject: Subject, progress: Progress) -> Measured:
        cfg = subject.config

        def step(params: Any, cache: caches.Caches, token: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
            out = subject.model.apply(params, Inputs(token, index_BT=index), cache)
            assert out.logits_BTV is not None
            return jnp.argmax(out.logits_BTV, -1).astype(jnp.int32), out.cache

        run = jax.jit(step, donate_argnums=1)
        weights = subject.model.unstacked(subject.params)
        samples: dict[str, list[float]] = {}
        ms, mib = [], []
        for done, length in enumerate(self.lengths):
            cache = _filled(cfg, length, self.steps + 2, subject.seed)
            mib.append(caches.n_bytes(cache) / 2**20)
            token, times = jnp.zeros((1, 1), jnp.int32), []
            for i in range(self.steps + 2):
                start = time.perf_counter()
                token, cache = run(weights, cache, token, jnp.full((1, 1), length + i, jnp.int32))
                jax.block_until_ready((token, cache))
                times.append(1e3 * (time.perf_counter() - start))
            samples[f"ms@{length}"] = times[2:]  # the first two compile and warm up
            samples[f"cache_mib@{length}"] = [mib[-1]]
            ms.append(float(np.median(times[2:])))
            progress((done + 1) / len(self.lengths), f"{length} tokens cached")
        if len(set(self.lengths)) > 1:
            samples["exponent"] = [exponent(self.lengths, ms)]
        shared = {"x": list(self.lengths), "xlabel": "tokens in the text so far"}
        curves = {
            "decode_ms": {**shared, "y": ms, "ylabel": "milliseconds per token"},
            "cache_mib": {**shared, "y": mib, "ylabel": "cache, MiB"},
        }
        return Measured(samples, curves, {"steps": self.steps})


def _filled(cfg: ModelConfig, length: int, room: int, seed: int) -> caches.Caches:
    """A cache as it is after `length` tokens, with noise for keys and values, and room for more."""
    empty = list(caches.init(cfg, 1, length + room))
    index = jnp.arange(length, dtype=jnp.int32)[None]
    layers, noises = list(cfg.layers()), dict[tuple[int, ...], jax.Array]()
    tokens, full = Tokens(index, index.astype(jnp.float32)), list[caches.State | None]()
    while empty:  # one layer at a time exists twice
        state, layer = empty.pop(0), layers.pop(0)
        shape = (1, length, *layer.mixer.key(layer))
        if shape not in noises:
            noises[shape] = jax.random.normal(jax.random.key(seed), shape, jnp.dtype(cfg.dtype))
        noise = noises[shape]
        keys = None if state is None else Keys(noise, noise, tokens, state.rotated)
        written = None if state is None or keys is None else state.write(keys)
        full.append(None if written is None else written.noised(jax.random.key(len(full))))
    return tuple(full)
