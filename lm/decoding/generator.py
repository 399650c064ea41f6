"""Generation: the prompt through the decoder in pieces, then a loop on the device, one token at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding.rows import Piece, Row, pairs
from lm.decoding.sampling import RowSampling, Sampling, draw, shape
from lm.decoding.spread import Spread, traced_for
from lm.errors import UserError
from lm.model.inputs import Inputs
from lm.model.language_model import LanguageModel
from lm.plug import SEEDS
from lm.watch import Watch

FIRST = 4096  # most tokens of the first piece of a prompt: nothing is cached yet, so tiles of attention can be skipped
PIECE = 256  # tokens of every further piece
STRIDE = 16  # tokens between looks of the host (stop strings, streaming)
HIDDEN = Watch(logits=False)


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
    """What one compiled loop depends on. `sampling` None: every row has its own (`State.rows`). `top`: how many
    alternatives are kept of every token."""

    model: LanguageModel
    sampling: Sampling | None
    stop: tuple[int, ...]
    spread: Spread | None = None
    top: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A generation between two tokens, B rows with room for R new ones.

    `hidden_BD`: of the last token read, the next one is drawn from it; `index_B` int32: tokens read; `keys_B`: one
    random key per row; `tokens_BR` int32 and `logprobs_BR` float32: the answers; `count_B` int32: tokens in them;
    `done_B`: whether a stop token came; `in_prompt_BV` bool and `made_BV` int32: for penalties (``[B, 1]`` without).
    Where rows differ, `rows` has how each is drawn, `budget_B` int32 how many tokens each may have; `top_BRk` ids and
    log-probabilities of alternatives. None where they do not, and where nobody asks.
    """

    hidden_BD: jax.Array
    cache: Any
    index_B: jax.Array
    keys_B: jax.Array
    tokens_BR: jax.Array
    logprobs_BR: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    in_prompt_BV: jax.Array
    made_BV: jax.Array
    rows: RowSampling | None = None
    budget_B: jax.Array | None = None
    top_BRk: tuple[jax.Array, jax.Array] | None = None


class Generator:
    """Generates with one model. Programs are compiled once per batch size and (rounded) prompt length.

    `spread`: the devices that `params` are on already, and that caches go to; None = one device. Raises `UserError`
    for a model whose texts cannot be continued token by token.
    """

    def __init__(self, model: LanguageModel, params: Any, spread: Spread | None = None) -> None:
        jax.eval_shape(lambda: model.cache(1, 1))
        self.model, self.params, self.spread = model, model.unstacked(params), spread

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
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        self._check(prompts, sampling, max_new_tokens, stop, samples, seeds)
        settings = Settings(self.model, sampling, tuple(sorted(set(stop))), self.spread)
        rows = [list(p) for p in prompts for _ in range(samples)]
        each = jax.vmap(jax.random.fold_in, (None, 0))
        keys = jnp.concatenate([each(jax.random.key(seed), jnp.arange(samples)) for seed in seeds])
        state = self._read(rows, keys, settings, max_new_tokens)
        for row, tokens, logprobs, _, end in self._loop(settings, state, [max_new_tokens] * len(rows), stride):
            yield row // samples, row % samples, tokens, logprobs, end

    def rows(
        self,
        rows: Sequence[Row],
        *,
        stop: Sequence[int] = (),
        top: int = 0,
        stride: int = STRIDE,
        unwanted: Collection[int] = (),
    ) -> Iterator[Piece]:
        """Answers to rows that differ in all that `Row` says, in one batch, as they come.

        Programs are compiled for powers of two of rows and of new tokens. A row is answered as `stream` answers it
        alone. `top`: alternatives per token. `unwanted`: rows that end at once, without another piece; the caller may
        add to them between two pieces. Raises `UserError` as `__call__`.
        """
        for row in rows:
            self._check([row.prompt], row.sampling, row.max_new_tokens, stop, 1, [row.seed])
        budgets = [row.max_new_tokens for row in rows]
        width, room = padded(max(len(row.prompt) for row in rows)), 1 << (max(budgets) - 1).bit_length()
        if self.model.room is not None:
            room = min(room, self._room(width, max(budgets)))
        filler = [Row([0], rows[0].sampling)] * ((1 << (len(rows) - 1).bit_length()) - len(rows))  # without a budget
        every = [*rows, *filler]
        settings = Settings(self.model, None, tuple(sorted(set(stop))), self.spread, top)
        keys = jnp.stack([jax.random.fold_in(jax.random.key(row.seed), 0) for row in every])
        own = RowSampling.of([row.sampling for row in every], self.model.vocab_size)
        state = self._read([list(row.prompt) for row in every], keys, settings, room, own)
        budgets += [0] * len(filler)
        state = dataclasses.replace(state, budget_B=jnp.asarray(budgets, jnp.int32))
        yield from self._loop(settings, state, budgets, stride, unwanted)

    def _loop(
        self, settings: Settings, state: State, budgets: Sequence[int], stride: int, unwanted: Collection[int] = ()
    ) -> Iterator[Piece]:
        """Every row's new tokens, `stride` at a time, until all are finished."""
        given = np.zeros(len(budgets), int)
        finished = np.asarray(budgets) == 0
        while not finished.all():
            state = _advance(settings, self.params, state, jnp.int32(min(stride, max(budgets))))
            tokens, logprobs, count, done, top = jax.device_get(
                (state.tokens_BR, state.logprobs_BR, state.count_B, state.done_B, state.top_BRk)
            )
            for row in map(int, np.flatnonzero(~finished)):
                n = int(count[row])
                end = "stop" if done[row] else "length" if n >= budgets[row] else ""
                fresh = slice(given[row], n)
                likely = [] if top is None else pairs(top[0][row, fresh], top[1][row, fresh])
                if row not in unwanted:
                    yield Piece(row, tokens[row, fresh].tolist(), logprobs[row, fresh].tolist(), likely, end)
                given[row], finished[row] = n, bool(end)
            ended = [row for row in unwanted if not finished[row]]
            if ended:
                finished[ended] = True
                state = dataclasses.replace(state, done_B=state.done_B.at[np.asarray(ended)].set(True))

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[int],
        samples: int,
        seeds: Sequence[int],
    ) -> None:
        V = self.model.vocab_size
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
        for seed in seeds:
            if not 0 <= seed < SEEDS:
                raise UserError(f"seed: found {seed}; valid: 0 to {SEEDS - 1}")
        sampling.check(V)
        self._room(max(len(p) for p in prompts), max_new_tokens)
        size = self.model.limit
        if size and max(len(p) for p in prompts) + max_new_tokens > size:
            raise UserError(
                f"prompt: {max(len(p) for p in prompts)} tokens and {max_new_tokens} new ones, the model has {size} "
                "positions; valid: a shorter prompt or fewer new tokens"
            )

    def _room(self, longest: int, new: int) -> int:
        """What the cache leaves for new tokens behind a prompt of `longest`; `UserError` for less than `new`."""
        room, need = self.model.room, padded(longest) + new
        if room is not None and need > room:
            raise UserError(
                f"prompt: the longest has {longest} tokens, with {new} new ones and padding {need}, more than the "
                f"cache of {room}; valid: a shorter prompt, fewer new tokens or a larger cache"
            )
        return new if room is None else room - padded(longest)

    def _read(
        self, rows: list[list[int]], keys: jax.Array, settings: Settings, room: int, own: RowSampling | None = None
    ) -> State:
        """The prompts into an empty cache, and the state before the first new token. `own`: how each row is drawn."""
        longest = max(len(r) for r in rows)
        width = padded(longest)
        tokens, index = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -1, np.int32)
        for i, row in enumerate(rows):  # padded on the right: a row's tokens fill its cache from the first slot on
            tokens[i, : len(row)] = row
            index[i, : len(row)] = np.arange(len(row))
        model, lengths = self.model, jnp.array([len(r) for r in rows], jnp.int32)
        cache, hidden, at = model.cache(len(rows), width + room), None, 0
        cache = cache if self.spread is None else self.spread.placed(cache)
        while at < width:
            n = min(FIRST if at == 0 else PIECE, width - at)
            piece = slice(at, at + n)
            args = (model, self.params, tokens[:, piece], index[:, piece], cache, hidden, lengths)
            hidden, cache = prefill(*args, spread=self.spread)
            at += n
        assert hidden is not None
        state = initial_state(settings, hidden, model.seal(cache), keys, room, own)
        in_prompt = np.zeros(state.in_prompt_BV.shape, bool)
        if _sampling(settings, state.rows).penalises:
            for i, row in enumerate(rows):
                in_prompt[i, row] = True
        return dataclasses.replace(state, index_B=lengths, in_prompt_BV=jnp.asarray(in_prompt))


def _sampling(settings: Settings, rows: RowSampling | None) -> Sampling | RowSampling:
    """How tokens are drawn: all rows alike, or each in its own way."""
    way = settings.sampling if rows is None else rows
    assert way is not None
    return way


def initial_state(
    settings: Settings,
    hidden_BD: jax.Array,
    cache: Any,
    keys_B: jax.Array,
    room: int,
    rows: RowSampling | None = None,
) -> State:
    """The state before the first of at most `room` new tokens; ``index_B``, the prompts' lengths, is 0."""
    B, V = keys_B.shape[0], settings.model.vocab_size if _sampling(settings, rows).penalises else 1
    shape_BRk = (B, room, settings.top)
    top = (jnp.zeros(shape_BRk, jnp.int32), jnp.zeros(shape_BRk, jnp.float32)) if settings.top else None
    return State(
        hidden_BD,
        cache,
        index_B=jnp.zeros(B, jnp.int32),
        keys_B=keys_B,
        tokens_BR=jnp.zeros((B, room), jnp.int32),
        logprobs_BR=jnp.zeros((B, room), jnp.float32),
        count_B=jnp.zeros(B, jnp.int32),
        done_B=jnp.zeros(B, bool),
        in_prompt_BV=jnp.zeros((B, V), bool),
        made_BV=jnp.zeros((B, V), jnp.int32),
        rows=rows,
        top_BRk=top,
    )


def padded(length: int) -> int:
    """Prompt lengths that programs are compiled for: powers of two up to `PIECE`, then its multiples."""
    if length <= PIECE:
        return max(1 << (length - 1).bit_length(), 8)
    return -(-length // PIECE) * PIECE


@functools.partial(jax.jit, static_argnums=0, static_argnames="spread", donate_argnums=4)
def prefill(
    model: LanguageModel,
    params: Any,
    tokens_BT: jax.Array,
    index_BT: jax.Array,
    cache: Any,
    hidden_BD: jax.Array | None = None,
    length_B: jax.Array | None = None,
    spread: Spread | None = None,
) -> tuple[jax.Array, Any]:
    """Reads one piece of the prompts: hidden states ``[B, D]`` of every row's last token so far, and the cache.
    `hidden_BD`: those of the pieces before, for rows that have ended; None at the first piece. `length_B`: int32, of
    the whole prompts; None where one piece is all."""
    with traced_for(spread):
        out = model.apply(params, Inputs(tokens_BT, index_BT=index_BT, length_B=length_B), cache, HIDDEN)
    live_BT = index_BT >= 0
    last_B = jnp.maximum(live_BT.sum(1) - 1, 0)
    new_BD = jax.vmap(lambda row, at: row[at])(out.hidden_BTD, last_B)
    return new_BD if hidden_BD is None else jnp.where(live_BT.any(1)[:, None], new_BD, hidden_BD), out.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(settings: Settings, params: Any, state: State, steps: jax.Array) -> State:
    """Up to `steps` more tokens for every row that is not finished."""
    room = state.tokens_BR.shape[1]

    def more(carry: tuple[jax.Array, State]) -> jax.Array:
        i, s = carry
        return (i < steps) & jnp.any(~s.done_B & (s.count_B < (room if s.budget_B is None else s.budget_B)))

    def one(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        i, s = carry
        return i + 1, one_token(settings, params, s)

    with traced_for(settings.spread):
        return jax.lax.while_loop(more, one, (jnp.int32(0), state))[1]


def one_token(settings: Settings, params: Any, state: State) -> State:
    """The state with one more token drawn and read, for every row that is not finished."""
    model, sampling, s = settings.model, _sampling(settings, state.rows), state
    B, room = s.tokens_BR.shape
    rows = jnp.arange(B)
    logits = model.readout(params, s.hidden_BD)
    shaped = shape(logits, sampling, s.in_prompt_BV, s.made_BV)
    token = draw(shaped, sampling, jax.vmap(jax.random.fold_in)(s.keys_B, s.count_B))
    logprobs_BV = jax.nn.log_softmax(logits, axis=-1)
    logprob = logprobs_BV[rows, token]
    live = ~s.done_B & (s.count_B < (room if s.budget_B is None else s.budget_B))
    slot = jnp.where(live, s.count_B, room)  # out of bounds: dropped
    stop = jnp.zeros(B, bool)
    for t in settings.stop:
        stop |= token == t
    made = s.made_BV
    if sampling.penalises:
        made = made.at[rows, token].add(live.astype(jnp.int32))
    top = s.top_BRk
    if top is not None:
        likely, ids = jax.lax.top_k(logprobs_BV, settings.top)
        top = (top[0].at[rows, slot].set(ids, mode="drop"), top[1].at[rows, slot].set(likely, mode="drop"))
    out = model.apply(params, Inputs(token[:, None], index_BT=s.index_B[:, None]), s.cache, HIDDEN)
    return State(
        out.hidden_BTD[:, -1],
        out.cache,
        index_B=s.index_B + 1,
        keys_B=s.keys_B,
        tokens_BR=s.tokens_BR.at[rows, slot].set(token, mode="drop"),
        logprobs_BR=s.logprobs_BR.at[rows, slot].set(logprob, mode="drop"),
        count_B=s.count_B + live,
        done_B=s.done_B | (stop & live),
        in_prompt_BV=s.in_prompt_BV,
        made_BV=made,
        rows=s.rows,
        budget_B=s.budget_B,
        top_BRk=top,
    )
