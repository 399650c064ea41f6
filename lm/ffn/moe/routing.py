"""What routers are given and what they decide, and the pieces they share.

Letters: T tokens of one routing group, E experts, k experts per token, n tokens per expert, s slots per expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.plug import Model, Plug

NEVER, TRAINING, ALWAYS = "", "training", "always"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """One routing group: `logits_TE` float32, `mask_T` bool (False = padding), `ids_T` token ids or None, `key` given
    in training and only there, `bias_E` float32 (zeros unless the router keeps one)."""

    logits_TE: jax.Array
    mask_T: jax.Array
    bias_E: jax.Array
    ids_T: jax.Array | None = None
    key: jax.Array | None = None

    @property
    def training(self) -> bool:
        return self.key is not None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenChoice:
    """Each token's experts `experts_Tk` int32, distinct, best first, and their `gates_Tk` float32 (0 = not kept).

    `probs_TE` is what the load-balance loss differentiates; `balanced` choices of each token enter it.
    """

    experts_Tk: jax.Array
    gates_Tk: jax.Array
    probs_TE: jax.Array
    balanced: int = field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertChoice:
    """Each expert's tokens `tokens_En` int32 and their `gates_En` float32 (0 = none)."""

    tokens_En: jax.Array
    gates_En: jax.Array
    probs_TE: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Soft slots: `dispatch_TEs` (sums to 1 over tokens) mixes their inputs, `combine_TEs` (over slots) the outputs."""

    dispatch_TEs: jax.Array
    combine_TEs: jax.Array


Decision = TokenChoice | ExpertChoice | Slots


class Router(Plug):
    """What every router says about itself.

    `leaks`: whether a token's output depends on later tokens (`NEVER`), under the training rule alone (`TRAINING`), or
    whenever it runs (`ALWAYS`); `learned`: has a matrix of logits; `offset`: has learned numbers beside it;
    `biased`: keeps a bias that a rule moves; `slots` per expert, for soft routers; `jitter`: relative uniform noise on
    the router's input in training.
    """

    KEY: ClassVar[str] = "model.ffn.router"
    leaks: ClassVar[str] = NEVER
    learned: ClassVar[bool] = True
    biased: ClassVar[bool] = False
    needs_ids: ClassVar[bool] = False
    capacity: ClassVar[bool] = True  # whether choices may be limited by a capacity
    slots: int = 0
    jitter: float = 0.0
    offset: bool = False
    k: int = 1

    def check(self, experts: int, cfg: Model) -> None:
        """Raises `UserError` for settings that do not fit the number of experts or the model."""
        if not 1 <= self.k <= experts:
            raise UserError(f"model.ffn.router.k: found {self.k}; valid: 1 to model.ffn.experts = {experts}")

    def share(self, experts: int) -> float:
        """The share of the experts' weights that an average token passes through."""
        return self.k / experts

    def acausal(self, training: bool) -> bool:
        return self.leaks == ALWAYS or (training and self.leaks == TRAINING)

    def route(self, s: Scores) -> Decision:
        """The decision for the tokens of one routing group."""
        raise NotImplementedError

    def update(self, params: Mapping[str, jax.Array], sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Parameters of the router that a rule moves after a step, by name; `sums` are the layer's."""
        return {}

    @property
    def way_out(self) -> str:
        """What to set so that a text can be continued, where there is such a setting; for messages."""
        return ""


def gather(values_TE: jax.Array, at_Tk: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_TE, at_Tk, axis=-1)


def with_nan(gates_Tk: jax.Array, logits_TE: jax.Array) -> jax.Array:
    """The gates; NaN for a token that has a NaN among its logits, chosen or not: a broken router is never hidden."""
    return jnp.where(jnp.isnan(logits_TE).any(-1, keepdims=True), jnp.nan, gates_Tk)


def ranks(experts_P: jax.Array, live_P: jax.Array, E: int) -> tuple[jax.Array, jax.Array]:
    """How many live entries before each one name the same expert, int32 ``[P]``, and the totals ``[E]``."""
    hit_PE = (experts_P[:, None] == jnp.arange(E)) & live_P[:, None]
    before = jnp.cumsum(hit_PE.astype(jnp.int32), axis=0) - hit_PE
    return gather(before, experts_P[:, None])[:, 0], hit_PE.sum(0).astype(jnp.int32)


def limit(choice: TokenChoice, mask_T: jax.Array, capacity: int, priority: str) -> jax.Array:
    """Which choices fit when every expert takes at most `capacity`, bool ``[T, k]``.

    `priority`: ``choice`` counts all first choices in token order, then all second ones (GShard, arXiv 2006.16668);
    ``token`` counts a token's choices before the next token's (causal); ``gate`` serves tokens with the largest first
    gate first (V-MoE's batch prioritised routing, arXiv 2106.05974).
    """
    (T, k), E = choice.experts_Tk.shape, choice.probs_TE.shape[-1]
    live_Tk = mask_T[:, None] & (choice.gates_Tk != 0)
    if priority == "gate":
        order = jnp.argsort(-jnp.where(mask_T, choice.gates_Tk[:, 0], -1.0), stable=True)
        served = TokenChoice(choice.experts_Tk[order], choice.gates_Tk[order], choice.probs_TE)
        return limit(served, mask_T[order], capacity, "choice")[jnp.argsort(order)]
    turn = (lambda a: a.T) if priority == "choice" else (lambda a: a)
    rank, _ = ranks(turn(choice.experts_Tk).reshape(-1), turn(live_Tk).reshape(-1), E)
    return live_Tk & (turn(rank.reshape((k, T) if priority == "choice" else (T, k))) < capacity)


def sinkhorn(logits_TE: jax.Array, mask_T: jax.Array, iterations: int) -> jax.Array:
    """Log of the plan ``d0 exp(z) d1`` whose rows sum to 1/T and columns to 1/E (arXiv 2202.01169, section 4), after
    `iterations` of the two normalisations; masked tokens take no part."""
    E = logits_TE.shape[1]
    z = jnp.where(mask_T[:, None], logits_TE, -jnp.inf)
    total = jnp.maximum(mask_T.sum(), 1)

    def step(_: int, b_E: jax.Array) -> jax.Array:
        a_T = jnp.where(mask_T, -jnp.log(total) - jax.nn.logsumexp(logits_TE + b_E, axis=1), -jnp.inf)
        return -jnp.log(E) - jax.nn.logsumexp(z + jnp.where(mask_T, a_T, 0.0)[:, None], axis=0)

    b_E = jax.lax.fori_loop(0, iterations, step, jnp.zeros(E))
    a_T = -jnp.log(total) - jax.nn.logsumexp(logits_TE + b_E, axis=1)
    return logits_TE + a_T[:, None] + b_E


def balanced_assignment(scores_TE: jax.Array, mask_T: jax.Array) -> jax.Array:
    """One expert per token, int32 ``[T]``, none with more than ``ceil(n / E)`` of the n tokens that are not masked.

    Rounds of the plan `scores`: every token without a place asks the best expert that has room, and an expert with more
    askers than room takes those with the largest scores. One expert at least is full after every round, so E suffice.
    """
    T, E = scores_TE.shape
    room = -(-mask_T.sum() // E)

    def step(_: int, placed_T: jax.Array) -> jax.Array:
        taken_E = (placed_T[:, None] == jnp.arange(E)).sum(0)
        asks = (placed_T < 0) & mask_T
        open_TE = jnp.where(taken_E < room, scores_TE, -jnp.inf)
        want = jnp.argmax(open_TE, axis=1)
        order = jnp.argsort(-jnp.max(open_TE, axis=1), stable=True)
        rank = ranks(want[order], asks[order], E)[0][jnp.argsort(order)]
        return jnp.where(asks & (taken_E[want] + rank < room), want, placed_T)

    placed = jax.lax.fori_loop(0, E, step, jnp.full(T, -1))
    return jnp.where(placed < 0, jnp.argmax(scores_TE, axis=1), placed).astype(jnp.int32)
