"""SOCKET router: which experts a token goes to (`lm.ffn.moe.routing.Router`). Survey: arXiv 2407.06204.

Logits and everything after them are float32. A router declares in `leaks` whether a token's output depends on later
ones. Letters as in `lm.ffn.moe.routing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError, divisors, unknown
from lm.ffn.moe.routing import (
    ALWAYS,
    TRAINING,
    ExpertChoice,
    Router,
    Scores,
    Slots,
    TokenChoice,
    balanced_assignment,
    gather,
    sinkhorn,
    with_nan,
)
from lm.plug import Model, Table, later, seed_field


@dataclass(frozen=True)
class TopK(Router):
    """The k largest of softmax(z). `softmax`: ``before`` the choice (gates are the raw probabilities, as in Switch and
    OpenMoE) or ``after`` it (gates are a softmax over the k chosen logits, the same as renormalised probabilities:
    Mixtral, arXiv 2401.04088). `offset`: z has a learned number per expert beside the product with the matrix."""

    k: int = 2
    softmax: str = "after"
    jitter: float = 0.0
    offset: bool = later(False)

    def check(self, experts: int, cfg: Model) -> None:
        super().check(experts, cfg)
        if self.softmax not in ("before", "after"):
            raise unknown("model.ffn.router.softmax", self.softmax, ("before", "after"))
        _check_jitter(self.jitter)

    def route(self, s: Scores) -> TokenChoice:
        probs = jax.nn.softmax(s.logits_TE)
        gates, experts = jax.lax.top_k(probs, self.k)
        if self.softmax == "after":
            gates = with_nan(jax.nn.softmax(gather(s.logits_TE, experts)), s.logits_TE)
        return TokenChoice(experts, gates, probs, self.k)


@dataclass(frozen=True)
class Switch(Router):
    """Top-1 with the raw probability as gate, and `jitter` on the router's input in training (arXiv 2101.03961, section
    2.2 and appendix; the paper's jitter is 0.01)."""

    jitter: float = 0.01

    def check(self, experts: int, cfg: Model) -> None:
        super().check(experts, cfg)
        _check_jitter(self.jitter)

    def route(self, s: Scores) -> TokenChoice:
        probs = jax.nn.softmax(s.logits_TE)
        gates, experts = jax.lax.top_k(probs, 1)
        return TokenChoice(experts, gates, probs, 1)


@dataclass(frozen=True)
class GShard(Router):
    """Top-2 (arXiv 2006.16668, algorithm 1): gates are the two probabilities over their sum, and in training the second
    expert is kept with probability min(1, 2 g2). `noise`: in training, Gumbel noise on the logits the second expert is
    chosen by, which samples it from the rest of the softmax. The balance loss counts first choices."""

    noise: bool = True
    k: ClassVar[int] = 2  # type: ignore[misc]

    def route(self, s: Scores) -> TokenChoice:
        probs, z = jax.nn.softmax(s.logits_TE), s.logits_TE
        first = jnp.argmax(z, axis=1)
        keys = None if s.key is None else jax.random.split(s.key)
        if keys is not None and self.noise:
            z = z + jax.random.gumbel(keys[0], z.shape)
        second = jnp.argmax(jnp.where(first[:, None] == jnp.arange(z.shape[1]), -jnp.inf, z), axis=1)
        experts = jnp.stack([first, second], axis=1)
        gates = gather(probs, experts)
        gates = gates / gates.sum(1, keepdims=True)
        if keys is not None:
            kept = jax.random.uniform(keys[1], (len(first),)) < 2 * gates[:, 1]
            gates = jnp.stack([gates[:, 0], jnp.where(kept, gates[:, 1], 0.0)], axis=1)
        return TokenChoice(experts, gates, probs, 1)


@dataclass(frozen=True)
class Sigmoid(Router):
    """The k largest of s = sigmoid(z) + b; gates are s over the sum of the chosen (`normalize`) times `scale`.

    With `bias_rate` u > 0 the bias b follows the load without a loss: ``b_e += u sign(mean(c) - c_e)`` after every
    step, c_e the tokens that chose e (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2); it
    enters the choice, not the gates. `groups` of experts: only the `keep_groups` whose two best s + b are largest in
    sum may be chosen from. `centre`: keeps the mean of b at 0.
    """

    k: int = 2
    normalize: bool = True
    scale: float = 1.0
    bias_rate: float = 0.0
    centre: bool = False
    groups: int = 1
    keep_groups: int = 1
    has_bias: ClassVar[bool] = False

    @property
    def biased(self) -> bool:  # type: ignore[override]
        return self.has_bias or self.bias_rate > 0

    def check(self, experts: int, cfg: Model) -> None:
        super().check(experts, cfg)
        if self.bias_rate < 0:
            raise UserError(f"model.ffn.router.bias_rate: must be 0 or more, found {self.bias_rate}")
        if not 1 <= self.groups <= experts or experts % self.groups:
            raise UserError(
                f"model.ffn.router.groups: {self.groups} does not divide model.ffn.experts = {experts}; valid: "
                f"{divisors(experts)}"
            )
        if not 1 <= self.keep_groups <= self.groups:
            raise UserError(f"model.ffn.router.keep_groups: found {self.keep_groups}; valid: 1 to {self.groups}")
        if self.k > self.keep_groups * (experts // self.groups):
            raise UserError(
                f"model.ffn.router.k: {self.k} experts of {self.keep_groups} groups of {experts // self.groups}; "
                "valid: as many as these hold"
            )

    def update(self, params: Mapping[str, jax.Array], sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The balancing bias after a step: towards experts that got fewer tokens than the mean (arXiv 2408.15664)."""
        if not self.bias_rate:
            return {}
        counts = sums["counts_E"]
        bias = params["bias"] + self.bias_rate * jnp.sign(counts.mean() - counts)
        return {"bias": bias - bias.mean() if self.centre else bias}

    def route(self, s: Scores) -> TokenChoice:
        scores = jax.nn.sigmoid(s.logits_TE)
        chosen_by = scores + s.bias_E
        T, E = scores.shape
        if self.groups > 1:
            grouped = chosen_by.reshape(T, self.groups, -1)
            best = jax.lax.top_k(grouped, min(2, grouped.shape[2]))[0].sum(2)
            keep = jax.lax.top_k(best, self.keep_groups)[1]
            open_TG = (keep[:, :, None] == jnp.arange(self.groups)).any(1)
            chosen_by = jnp.where(jnp.repeat(open_TG, E // self.groups, axis=1), chosen_by, -jnp.inf)
        experts = jax.lax.top_k(chosen_by, self.k)[1]
        gates = gather(scores, experts)
        if self.normalize:
            gates = gates / (gates.sum(1, keepdims=True) + 1e-20)
        total = scores.sum(1, keepdims=True)
        gates = jnp.where(jnp.isnan(total), jnp.nan, gates * self.scale)  # a score that is no number is not hidden
        return TokenChoice(experts, gates, scores / total, self.k)


@dataclass(frozen=True)
class DeepSeekV3(Sigmoid):
    """`Sigmoid` with the balancing bias always there: DeepSeek-V3's router. Its own sizes: k 8 of 256 experts in 8
    groups of which 4 are kept, scale 2.5, bias_rate 0.001."""

    bias_rate: float = 1e-3
    has_bias: ClassVar[bool] = True


@dataclass(frozen=True)
class ExpertsChoose(Router):
    """Expert choice (arXiv 2202.09368, equations 1-3): each expert takes the ``factor T / E`` tokens that like it best,
    by softmax over experts. Balanced exactly; a token may get none or all. The choice compares a token with later
    ones."""

    factor: float = 2.0
    leaks: ClassVar[str] = ALWAYS
    capacity: ClassVar[bool] = False

    def check(self, experts: int, cfg: Model) -> None:
        if not 0 < self.factor <= experts:
            raise UserError(f"model.ffn.router.factor: found {self.factor}; valid: above 0, at most {experts}")

    def share(self, experts: int) -> float:
        return self.factor / experts

    def route(self, s: Scores) -> ExpertChoice:
        T, E = s.logits_TE.shape
        probs = jax.nn.softmax(s.logits_TE)
        gates, tokens = jax.lax.top_k(
            jnp.where(s.mask_T[:, None], probs, 0.0).T, min(T, max(1, round(self.factor * T / E)))
        )
        return ExpertChoice(tokens, gates, probs)


class Balanced(Router):
    """A router that looks at all tokens in training, to balance them; with ``evaluation = balanced`` also in use."""

    leaks: ClassVar[str] = TRAINING
    iterations: int
    evaluation: str

    def check(self, experts: int, cfg: Model) -> None:
        super().check(experts, cfg)
        if self.evaluation not in ("argmax", "balanced"):
            raise unknown("model.ffn.router.evaluation", self.evaluation, ("argmax", "balanced"))
        if self.iterations < 1:
            raise UserError(f"model.ffn.router.iterations: must be at least 1, found {self.iterations}")

    def acausal(self, training: bool) -> bool:
        return training or self.evaluation == "balanced"

    @property
    def way_out(self) -> str:
        return "; valid: model.ffn.router.evaluation = argmax"


@dataclass(frozen=True)
class Base(Balanced):
    """BASE layers (arXiv 2103.16716): in training every expert gets the same number of tokens, by an assignment that
    makes the sum of logits large; the gate is sigmoid(z). The paper solves it by auction; here `iterations` of Sinkhorn
    at `temperature` and E rounds of placing tokens (`lm.ffn.moe.routing.balanced_assignment`), which is as balanced and
    nearly as good. `evaluation`: ``argmax`` (the paper's rule, causal) or ``balanced``, the training rule."""

    iterations: int = 20
    temperature: float = 0.1
    evaluation: str = "argmax"

    def check(self, experts: int, cfg: Model) -> None:
        super().check(experts, cfg)
        if not self.temperature > 0:
            raise UserError(f"model.ffn.router.temperature: must be positive, found {self.temperature}")

    def route(self, s: Scores) -> TokenChoice:
        z = jax.lax.stop_gradient(s.logits_TE)
        if self.acausal(s.training):
            plan = sinkhorn(z / self.temperature, s.mask_T, self.iterations)
            experts = balanced_assignment(plan, s.mask_T)[:, None]
        else:
            experts = jnp.argmax(z, axis=1).astype(jnp.int32)[:, None]
        gates = with_nan(jax.nn.sigmoid(gather(s.logits_TE, experts)), s.logits_TE)
        return TokenChoice(experts, gates, jax.nn.softmax(s.logits_TE), 1)


@dataclass(frozen=True)
class Sinkhorn(Balanced):
    """S-BASE (arXiv 2202.01169, section 4): in training the k largest entries of each token's row of a Sinkhorn plan,
    which is nearly balanced; gates are sigmoid(z) for k = 1, else softmax(z). `evaluation` as in `Base`."""

    k: int = 1
    iterations: int = 8
    evaluation: str = "argmax"

    def route(self, s: Scores) -> TokenChoice:
        z = jax.lax.stop_gradient(s.logits_TE)
        by = sinkhorn(z, s.mask_T, self.iterations) if self.acausal(s.training) else z
        experts = jax.lax.top_k(by, self.k)[1]
        probs = jax.nn.softmax(s.logits_TE)
        gates = with_nan(gather(jax.nn.sigmoid(s.logits_TE) if self.k == 1 else probs, experts), s.logits_TE)
        return TokenChoice(experts, gates, probs, self.k)


@dataclass(frozen=True)
class Hash(Router):
    """Hash layers (arXiv 2106.04426): the expert is a fixed function of the token id, the gate 1/k. `table`:
    ``random``, a permutation of the ids by `seed` dealt out in turn, or ``modulo``, the id modulo E (ids in order of
    frequency, as BPE makes them roughly, are then dealt out evenly). `vocab`: the vocabulary the table is for; None =
    the model's."""

    k: int = 1
    table: str = "random"
    seed: int = seed_field()
    vocab: int | None = None
    learned: ClassVar[bool] = False
    needs_ids: ClassVar[bool] = True

    def check(self, experts: int, cfg: Model) -> None:
        super().check(experts, cfg)
        if self.table not in ("random", "modulo"):
            raise unknown("model.ffn.router.table", self.table, ("random", "modulo"))
        if self.vocab is not None and self.vocab != cfg.vocab_size:
            raise UserError(
                f"model.ffn.router.vocab: the table is for {self.vocab} ids, model.vocab_size is {cfg.vocab_size}: "
                "ids of another vocabulary mean other tokens; valid: the same number, or None"
            )

    def experts_of(self, n_ids: int, E: int) -> np.ndarray:
        """``[n_ids, k]``: every id's experts."""
        place = np.arange(n_ids) if self.table == "modulo" else np.random.default_rng(self.seed).permutation(n_ids)
        return ((place[:, None] + np.arange(self.k)) % E).astype(np.int32)

    def route(self, s: Scores) -> TokenChoice:
        assert s.ids_T is not None
        E = s.logits_TE.shape[1]
        n_ids = self.vocab or 0
        experts = jnp.asarray(self.experts_of(n_ids, E))[s.ids_T]
        gates = jnp.full(experts.shape, 1.0 / self.k)
        probs = jax.nn.one_hot(experts, E).mean(1)
        return TokenChoice(experts, gates, probs, 0)


@dataclass(frozen=True)
class Soft(Router):
    """Soft MoE (arXiv 2308.00951, section 2.1): every slot's input is an average over all tokens, every token's output
    one over all slots; nothing is dropped or chosen. A token's output depends on every token of its group. Its ``[T, E,
    s]`` weights are the method itself."""

    slots: int = 1
    leaks: ClassVar[str] = ALWAYS
    capacity: ClassVar[bool] = False

    def check(self, experts: int, cfg: Model) -> None:
        if self.slots < 1:
            raise UserError(f"model.ffn.router.slots: must be at least 1, found {self.slots}")

    def route(self, s: Scores) -> Slots:
        """`s.logits_TE` is ``[T, E s]`` here."""
        T = s.logits_TE.shape[0]
        shape = (T, -1, self.slots)
        dispatch = jax.nn.softmax(jnp.where(s.mask_T[:, None], s.logits_TE, -1e30), axis=0)
        return Slots(dispatch.reshape(shape), jax.nn.softmax(s.logits_TE, axis=1).reshape(shape))


def _check_jitter(jitter: float) -> None:
    if not 0 <= jitter < 1:
        raise UserError(f"model.ffn.router.jitter: must lie in [0, 1), found {jitter}")


TABLE = Table(
    {
        "topk": TopK,
        "switch": Switch,
        "gshard": GShard,
        "sigmoid": Sigmoid,
        "deepseek_v3": DeepSeekV3,
        "expert_choice": ExpertsChoose,
        "base": Base,
        "sinkhorn": Sinkhorn,
        "hash": Hash,
        "soft": Soft,
    }
)
