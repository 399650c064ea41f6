"""What measures share: the subject, the result, and forward passes over long texts that report progress."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lm.config import ModelConfig
from lm.data.texts import Document
from lm.data.tokenizers import check_ids
from lm.errors import UserError
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel, LanguageModel
from lm.watch import Watch

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Subject:
    """A model under measurement; `run`: the folder of the training that made its parameters."""

    model: LanguageModel
    params: Any
    tokenizer: Any
    seed: int = 0
    run: Path | None = None

    @property
    def config(self) -> ModelConfig:
        """The configuration of a decoder. Raises `UserError` for a model that is none: the measure is about one."""
        if not isinstance(self.model, DecoderModel):
            raise UserError(f"measures: {type(self.model).__name__} is no decoder; valid: a measure of any model")
        return self.model.cfg

    @property
    def n_layers(self) -> int:
        """Layers that report progress, at least 1."""
        return max(len(self.model.layers()), 1)


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

    @property
    def longest(self) -> int:
        """Tokens of the longest text that it reads; 0 where that is not a setting."""
        return 0

    def cost(self, cfg: ModelConfig) -> float:
        """Work on a model, relative to other measures, for estimates of the time left."""
        return 1.0

    def identity(self) -> str:
        """A hash of the data that is read; raises `UserError` for data that cannot be."""
        return ""

    def check(self, subject: Subject, trains: bool) -> None:
        """Raises `UserError` for what `run` would refuse; before anything is trained, and without parameters (those of
        `subject` are None). `trains`: whether this experiment trains them."""

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


def encode(subject: Subject, text: str, what: str, alone: bool = True) -> list[int]:
    """The ids of a text as the checkpoint's own rule begins it; `alone` False: of a part of a text.

    Raises `UserError` when the subject has no tokenizer, and for a token that the model has no row for.
    """
    tokenizer = subject.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{what}: the checkpoint has no tokenizer; valid: a checkpoint with tokenizer.json or a GGUF file"
        )
    ids = tokenizer.encode_text(text) if alone else tokenizer.encode(text)
    return check_ids(tokenizer, ids, subject.model.vocab_size, what)


def beginning(subject: Subject, doc: Document, tokens: int, what: str) -> list[int]:
    """The first `tokens` ids of a document; `UserError` as `encode`, and for one that is too short."""
    ids = encode(subject, doc.text, what)[:tokens]
    if len(ids) < tokens:
        raise UserError(
            f"{what}.tokens: {tokens} asked for, document {doc.name!r} has {len(ids)}; "
            "choose a longer document or fewer tokens"
        )
    return ids


@functools.lru_cache(maxsize=8)
def _hidden(model: LanguageModel) -> Any:
    watch = Watch(logits=False, on_layer=_TICK)

    def run(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return model.apply(params, Inputs(tokens_BT), watch=watch).hidden_BTD

    return jax.jit(run)


@functools.lru_cache(maxsize=8)
def _scores(model: LanguageModel, piece: int) -> Any:
    def run(params: Any, hidden_TD: jax.Array, targets_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits = model.readout(params, args[0])
            hit = jnp.take_along_axis(logits, args[1][:, None], axis=-1)[:, 0]
            return jax.nn.logsumexp(logits, axis=-1) - hit, jnp.argmax(logits, -1) == args[1]

        n = hidden_TD.shape[0]
        full = -(-n // piece) * piece
        h = jnp.pad(hidden_TD, ((0, full - n), (0, 0))).reshape(-1, piece, hidden_TD.shape[-1])
        nll, best = jax.lax.map(one, (h, jnp.pad(targets_T, (0, full - n)).reshape(-1, piece)))
        return nll.reshape(-1)[:n], best.reshape(-1)[:n]

    return jax.jit(run)


@functools.lru_cache(maxsize=8)
def _watched(model: LanguageModel, watch: Watch) -> Any:
    return jax.jit(lambda params, tokens_BT: model.apply(params, Inputs(tokens_BT), watch=watch).taps)


def watched(
    subject: Subject, tokens: Sequence[int], name: str, last: int, on_layer: Callable[[], None] | None = None
) -> list[np.ndarray]:
    """What the layers hand out under `name` (`lm.watch.Watch`) of the `last` tokens: arrays ``[last, …]``."""
    watch = Watch(taps=(name,), last=last, logits=False, on_layer=_TICK)
    _TICK.listener = on_layer
    try:
        taps = _watched(subject.model, watch)(subject.params, jnp.asarray(tokens, jnp.int32)[None])
        return [np.asarray(layer[name][0]) for layer in taps if name in layer]
    finally:
        _TICK.listener = None


def exponent(lengths: ArrayLike, times: ArrayLike) -> float:
    """The slope p of a straight line through (log length, log time): time ~ length ** p."""
    return float(np.polyfit(np.log(np.asarray(lengths, float)), np.log(np.asarray(times, float)), 1)[0])


def score(
    subject: Subject, tokens: Sequence[int], last: int, on_layer: Callable[[], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """NLL in nats, and whether the token is the model's first choice, of the `last` tokens given all before them.

    One forward pass over ``len(tokens) - 1`` tokens; the head reads 512 positions at a time, so no ``[T, V]`` array.
    """
    ids = jnp.asarray(tokens, jnp.int32)
    _TICK.listener = on_layer
    try:
        hidden = _hidden(subject.model)(subject.params, ids[None, :-1])[0, -last:]
        nll, best = _scores(subject.model, min(512, last))(subject.params, hidden, ids[-last:])
        return np.asarray(nll, np.float64), np.asarray(best)
    finally:
        _TICK.listener = None
