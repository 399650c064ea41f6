"""The log-probability of every token of a text that is there already."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding.generator import padded
from lm.decoding.spread import Spread, traced_for
from lm.model.inputs import Inputs
from lm.model.language_model import LanguageModel
from lm.watch import Watch

SCORED = 512  # positions whose logits exist at one time


@dataclass(frozen=True)
class Scores:
    """Of B texts, for token t + 1 given those up to t: `logprobs_BT` float64 (nats), `greedy_BT` whether it is the
    first choice, and of the likeliest k alternatives `ids_BTk` and `likely_BTk` (nats)."""

    logprobs_BT: np.ndarray
    greedy_BT: np.ndarray
    ids_BTk: np.ndarray
    likely_BTk: np.ndarray


def score(
    model: LanguageModel,
    params: Any,
    rows: Sequence[Sequence[int]],
    batch: int,
    top: int = 0,
    spread: Spread | None = None,
) -> Scores:
    """Scores of at most `batch` texts of two tokens or more, read without a cache. Programs are compiled once per
    `batch`, `top` and (rounded) length. `spread`: over which devices `params` lie."""
    width = padded(max(len(r) for r in rows) - 1)
    tokens = np.zeros((batch, width + 1), np.int32)
    index = np.full((batch, width), -1, np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
        index[b, : len(row) - 1] = np.arange(len(row) - 1)
    run = _scores(model, min(SCORED, width), top, spread)
    logprobs, greedy, ids, likely = run(params, tokens[:, :-1], index, tokens[:, 1:])
    return Scores(np.asarray(logprobs, np.float64), np.asarray(greedy), np.asarray(ids), np.asarray(likely, np.float64))


@functools.lru_cache(maxsize=8)
def _scores(model: LanguageModel, piece: int, top: int, spread: Spread | None) -> Any:
    def run(params: Any, tokens_BT: jax.Array, index_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, ...]:
        with traced_for(spread):
            out = model.apply(params, Inputs(tokens_BT, index_BT=index_BT), watch=Watch(logits=False))
        B, T, D = out.hidden_BTD.shape
        n = -(-T // piece)

        def one(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            logits = model.readout(params, args[0])
            own = jnp.take_along_axis(logits, args[1][..., None], -1)[..., 0]
            every = jax.nn.logsumexp(logits, axis=-1)
            best, ids = jax.lax.top_k(logits, top)
            return own - every, jnp.argmax(logits, -1) == args[1], ids, best - every[..., None]

        pad = n * piece - T
        hidden = jnp.pad(out.hidden_BTD, ((0, 0), (0, pad), (0, 0))).reshape(B, n, piece, D).swapaxes(0, 1)
        targets = jnp.pad(targets_BT, ((0, 0), (0, pad))).reshape(B, n, piece).swapaxes(0, 1)
        return tuple(
            x.swapaxes(0, 1).reshape(B, n * piece, *x.shape[3:])[:, :T] for x in jax.lax.map(one, (hidden, targets))
        )

    return jax.jit(run)
