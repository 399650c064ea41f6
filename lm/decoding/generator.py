"""Generation: the prompt through the decoder in pieces, then a loop on the device, one token at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import caches
from lm.config import ModelConfig
from lm.decoding.sampling import Sampling, draw, shape
from lm.errors import UserError
from lm.model.decoder import Decoder, readout
from lm.model.params import unstack

FIRST = 4096  # most tokens of the first piece of a prompt: nothing is cached yet, so tiles of attention can be skipped
PIECE = 256  # tokens of every further piece
STRIDE = 16  # tokens between looks of the host (stop strings, streaming)

State = dict[str, Any]


@dataclass(frozen=True)
class Generated:
    """`tokens`: the answer's ids, the stop token included; `logprobs`: the model's own log-probability (nats) of each,
    before penalties and temperature; `finish`: ``stop`` or ``length``."""

    tokens: list[int]
    logprobs: list[float]
    finish: str

    @property
    def logprob(self) -> float:
        return float(np.sum(self.logprobs))


@dataclass(frozen=True)
class Settings:
    """What one compiled loop depends on."""

    cfg: ModelConfig
    sampling: Sampling
    stop: tuple[int, ...]


class Generator:
    """Generates with one model. Programs are compiled once per batch size and (rounded) prompt length.

    `cache`: a plug of `lm.caches`, None = the smallest that loses nothing under the model's pattern; `quantize`: None
    or ``int8``.
    """

    def __init__(self, cfg: ModelConfig, params: Any, cache: Any = None, quantize: str | None = None) -> None:
        caches.check(cfg)
        self.cfg, self.params = cfg, unstack(params)
        self.cache, self.quantize = cache, quantize

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        *,
        max_new_tokens: int = 128,
        stop: Sequence[int] = (),
        seeds: Sequence[int] | None = None,
        samples: int = 1,
    ) -> list[list[Generated]]:
        """`samples` answers for each of `prompts`, all in one batch.

        `seeds`: one per prompt (default 0, 1, …); sample s of a prompt depends on the model, the prompt, its seed and
        s, not on what else is in the batch. Raises `UserError` for an empty prompt, unknown token ids, and prompts that
        do not fit into the cache together with the answer.
        """
        out: list[list[list[Any]]] = [[[] for _ in range(samples)] for _ in prompts]
        finish = [["length"] * samples for _ in prompts]
        for n, s, tokens, logprobs, done in self.stream(
            prompts, sampling, max_new_tokens=max_new_tokens, stop=stop, seeds=seeds, samples=samples
        ):
            out[n][s] += zip(tokens, logprobs, strict=True)
            if done:
                finish[n][s] = done
        return [
            [Generated([t for t, _ in row], [p for _, p in row], finish[n][s]) for s, row in enumerate(rows)]
            for n, rows in enumerate(out)
        ]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        *,
        max_new_tokens: int = 128,
        stop: Sequence[int] = (),
        seeds: Sequence[int] | None = None,
        samples: int = 1,
        stride: int = STRIDE,
    ) -> Iterator[tuple[int, int, list[int], list[float], str]]:
        """The same as it comes, every `stride` tokens: (prompt, sample, new tokens, log-probabilities, finish or "").

        The caller may stop reading at any time, for instance when a stop string has appeared.
        """
        self._check(prompts, sampling, max_new_tokens, stop, samples)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        settings = Settings(self.cfg, sampling, tuple(sorted(set(stop))))
        rows = [list(p) for p in prompts for _ in range(samples)]
        keys = [jax.random.fold_in(jax.random.key(seed), s) for seed in seeds for s in range(samples)]
        state = self._read(rows, jnp.stack(keys), settings, max_new_tokens)
        given, finished = np.zeros(len(rows), int), np.zeros(len(rows), bool)
        while not finished.all():
            state = _advance(settings, self.params, state, jnp.int32(min(stride, max_new_tokens)))
            look = jax.device_get({k: state[k] for k in ("tokens", "logprobs", "count", "done")})
            for row in np.flatnonzero(~finished):
                n = int(look["count"][row])
                end = "stop" if look["done"][row] else "length" if n >= max_new_tokens else ""
                fresh = slice(given[row], n)
                yield (
                    int(row) // samples,
                    int(row) % samples,
                    look["tokens"][row, fresh].tolist(),
                    look["logprobs"][row, fresh].tolist(),
                    end,
                )
                given[row], finished[row] = n, bool(end)

    def _check(self, prompts: Any, sampling: Sampling, max_new_tokens: int, stop: Sequence[int], samples: int) -> None:
        V = self.cfg.vocab_size
        if not prompts:
            raise UserError("prompt: none given; valid: one or more")
        if max_new_tokens < 1 or samples < 1:
            raise UserError(f"max_new_tokens, samples: must be at least 1, found {max_new_tokens}, {samples}")
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(
                    f"prompt {i}: is empty; valid: at least one token (a model with a bos id starts with it)"
                )
            wrong = [t for t in prompt if not 0 <= t < V]
            if wrong:
                raise UserError(f"prompt {i}: unknown token id {wrong[0]}; valid: 0 to {V - 1}")
        for t in stop:
            if not 0 <= t < V:
                raise UserError(f"stop: unknown token id {t}; valid: 0 to {V - 1}")
        sampling.check(V)
        room = getattr(self.cache, "capacity", None)
        need = padded(max(len(p) for p in prompts)) + max_new_tokens
        if room is not None and need > room:
            raise UserError(
                f"prompt: the longest has {max(len(p) for p in prompts)} tokens, with {max_new_tokens} new ones and "
                f"padding {need}, more than the cache of {room}; valid: a shorter prompt, fewer new tokens or a larger "
                "cache"
            )
        size = self.cfg.positions.table_size
        if size and max(len(p) for p in prompts) + max_new_tokens > size:
            raise UserError(
                f"prompt: {max(len(p) for p in prompts)} tokens and {max_new_tokens} new ones, the model has {size} "
                "positions; valid: a shorter prompt or fewer new tokens"
            )

    def _read(self, rows: list[list[int]], keys: jax.Array, settings: Settings, room: int) -> State:
        """The prompts into an empty cache, and the state before the first new token."""
        longest = max(len(r) for r in rows)
        width = padded(longest)
        tokens, index = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -1, np.int32)
        for i, row in enumerate(rows):  # padded on the left, so that all rows end together
            tokens[i, width - len(row) :] = row
            index[i, width - len(row) :] = np.arange(len(row))
        cache = caches.init(self.cfg, len(rows), width + room, self.cache, self.quantize)
        hidden, at = None, 0
        while at < width:
            n = min(FIRST if at == 0 else PIECE, width - at)
            hidden, cache = prefill(self.cfg, self.params, tokens[:, at : at + n], index[:, at : at + n], cache)
            at += n
        V = self.cfg.vocab_size if settings.sampling.penalises else 1
        in_prompt = np.zeros((len(rows), V), bool)
        if settings.sampling.penalises:
            for i, row in enumerate(rows):
                in_prompt[i, row] = True
        state = initial_state(settings, hidden, cache, keys, room)
        lengths = jnp.array([len(r) for r in rows], jnp.int32)
        return {**state, "index": lengths, "in_prompt": jnp.asarray(in_prompt)}


def initial_state(settings: Settings, hidden_BD: Any, cache: Any, keys_B: Any, room: int) -> State:
    """The state before the first of at most `room` new tokens; ``index``, the prompts' lengths, is 0."""
    B, V = keys_B.shape[0], settings.cfg.vocab_size if settings.sampling.penalises else 1
    return {
        "hidden": hidden_BD,
        "cache": cache,
        "index": jnp.zeros(B, jnp.int32),
        "keys": keys_B,
        "tokens": jnp.zeros((B, room), jnp.int32),
        "logprobs": jnp.zeros((B, room), jnp.float32),
        "count": jnp.zeros(B, jnp.int32),
        "done": jnp.zeros(B, bool),
        "in_prompt": jnp.zeros((B, V), bool),
        "made": jnp.zeros((B, V), jnp.int32),
    }


def padded(length: int) -> int:
    """Prompt lengths that programs are compiled for: powers of two up to `PIECE`, then its multiples."""
    if length <= PIECE:
        return max(1 << (length - 1).bit_length(), 8)
    return -(-length // PIECE) * PIECE


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def prefill(cfg: ModelConfig, params: Any, tokens_BT: Any, index_BT: Any, cache: Any) -> tuple[jax.Array, Any]:
    """Reads one piece of the prompts: the last token's hidden states ``[B, D]`` and the cache."""
    out = Decoder(cfg).apply({"params": params}, tokens_BT, index_BT=index_BT, cache=cache, logits=False)
    return out.hidden_BTD[:, -1], out.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(settings: Settings, params: Any, state: State, steps: Any) -> State:
    """Up to `steps` more tokens for every row that is not finished."""
    room = state["tokens"].shape[1]

    def more(carry: tuple[Any, State]) -> jax.Array:
        i, s = carry
        return (i < steps) & jnp.any(~s["done"] & (s["count"] < room))

    def one(carry: tuple[Any, State]) -> tuple[Any, State]:
        i, s = carry
        return i + 1, one_token(settings, params, s)

    return jax.lax.while_loop(more, one, (jnp.int32(0), state))[1]


def one_token(settings: Settings, params: Any, state: State) -> State:
    """The state with one more token drawn and read, for every row that is not finished."""
    cfg, sampling, s = settings.cfg, settings.sampling, state
    B, room = s["tokens"].shape
    rows = jnp.arange(B)
    logits = readout(cfg, params, s["hidden"])
    shaped = shape(logits, sampling, s["in_prompt"], s["made"])
    token = draw(shaped, sampling, jax.vmap(jax.random.fold_in)(s["keys"], s["count"]))
    logprob = jax.nn.log_softmax(logits, axis=-1)[rows, token]
    live = ~s["done"] & (s["count"] < room)
    slot = jnp.where(live, s["count"], room)  # out of bounds: dropped
    stop = jnp.zeros(B, bool)
    for t in settings.stop:
        stop |= token == t
    made = s["made"]
    if sampling.penalises:
        made = made.at[rows, token].add(live.astype(jnp.int32))
    out = Decoder(cfg).apply(
        {"params": params}, token[:, None], index_BT=s["index"][:, None], cache=s["cache"], logits=False
    )
    return {
        **s,
        "hidden": out.hidden_BTD[:, -1],
        "cache": out.cache,
        "index": s["index"] + 1,
        "tokens": s["tokens"].at[rows, slot].set(token, mode="drop"),
        "logprobs": s["logprobs"].at[rows, slot].set(logprob, mode="drop"),
        "count": s["count"] + live,
        "done": s["done"] | (stop & live),
        "made": made,
    }
