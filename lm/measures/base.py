"""What measures share: the subject, the result, and forward passes over long texts that report progress."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError
from lm.model.decoder import Decoder, readout

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Subject:
    """A model under measurement; `run`: the folder of the training that made its parameters."""

    config: ModelConfig
    params: Any
    tokenizer: Any
    seed: int = 0
    run: Path | None = None


@dataclass(frozen=True)
class Measured:
    """`samples`: metric -> one number per document or trial; `curves`: name -> plot data; `notes`: what was read."""

    samples: dict[str, list[float]]
    curves: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Measure:
    """What every measure answers; a plug is a frozen dataclass that says where its answers differ."""

    stochastic: ClassVar[bool] = True
    """Whether the seed matters."""

    @property
    def untrained(self) -> bool:
        """Whether nothing of the subject's parameters is read, so that none are trained for it."""
        return False

    def cost(self, cfg: ModelConfig) -> float:
        """Work on a model, relative to other measures, for estimates of the time left."""
        return 1.0

    def identity(self) -> str:
        """A hash of the data that is read; raises `UserError` for data that cannot be."""
        return ""

    def run(self, subject: Subject, progress: Progress) -> Measured:
        """The numbers; `progress` takes the fraction done and a word on it."""
        raise NotImplementedError(f"{type(self).__name__}.run")


class _Ticker:
    """Forwards layer callbacks of a compiled program to whoever listens now."""

    def __init__(self) -> None:
        self.listener: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.listener is not None:
            self.listener()


_TICK = _Ticker()


def encode(tokenizer: Any, text: str, what: str) -> list[int]:
    """Token ids; `UserError` when the subject has no tokenizer."""
    if tokenizer is None:
        raise UserError(
            f"{what}: the checkpoint has no tokenizer; valid: a checkpoint with tokenizer.json or a GGUF file"
        )
    return list(tokenizer.encode(text))


@functools.lru_cache(maxsize=8)
def _hidden(cfg: ModelConfig) -> Any:
    def run(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return Decoder(cfg).apply({"params": params}, tokens_BT, logits=False, on_layer=_TICK).hidden_BTD

    return jax.jit(run)


@functools.lru_cache(maxsize=8)
def _scores(cfg: ModelConfig, piece: int) -> Any:
    def run(params: Any, hidden_TD: jax.Array, targets_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits = readout(cfg, params, args[0])
            hit = jnp.take_along_axis(logits, args[1][:, None], axis=-1)[:, 0]
            return jax.nn.logsumexp(logits, axis=-1) - hit, jnp.argmax(logits, -1) == args[1]

        n = hidden_TD.shape[0]
        full = -(-n // piece) * piece
        h = jnp.pad(hidden_TD, ((0, full - n), (0, 0))).reshape(-1, piece, hidden_TD.shape[-1])
        nll, best = jax.lax.map(one, (h, jnp.pad(targets_T, (0, full - n)).reshape(-1, piece)))
        return nll.reshape(-1)[:n], best.reshape(-1)[:n]

    return jax.jit(run)


@functools.lru_cache(maxsize=8)
def _records(cfg: ModelConfig, last: int) -> Any:
    def run(params: Any, tokens_BT: jax.Array) -> Any:
        out = Decoder(cfg).apply({"params": params}, tokens_BT, logits=False, records=last, on_layer=_TICK)
        return out.records

    return jax.jit(run)


def records(
    subject: Subject, tokens: Any, last: int, on_layer: Callable[[], None] | None = None
) -> list[dict[str, np.ndarray]]:
    """What each layer's mixer records of the `last` tokens: name -> array ``[last, …]``."""
    _TICK.listener = on_layer
    try:
        made = _records(subject.config, last)(subject.params, jnp.asarray(tokens, jnp.int32)[None])
        return [{name: np.asarray(x[0]) for name, x in layer.get("attn", {}).items()} for layer in made]
    finally:
        _TICK.listener = None


def exponent(lengths: Any, times: Any) -> float:
    """The slope p of a straight line through (log length, log time): time ~ length ** p."""
    return float(np.polyfit(np.log(np.asarray(lengths, float)), np.log(np.asarray(times, float)), 1)[0])


def score(
    subject: Subject, tokens: Any, last: int, on_layer: Callable[[], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """NLL in nats, and whether the token is the model's first choice, of the `last` tokens given all before them.

    One forward pass over ``len(tokens) - 1`` tokens; the head reads 512 positions at a time, so no ``[T, V]`` array.
    """
    ids = jnp.asarray(tokens, jnp.int32)
    _TICK.listener = on_layer
    try:
        hidden = _hidden(subject.config)(subject.params, ids[None, :-1])[0, -last:]
        nll, best = _scores(subject.config, min(512, last))(subject.params, hidden, ids[-last:])
        return np.asarray(nll, np.float64), np.asarray(best)
    finally:
        _TICK.listener = None
