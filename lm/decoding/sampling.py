"""From logits to a choice: penalties, bias, temperature and truncation, in the order the field uses.

The order is that of transformers' generation: penalties, bias, temperature, then top-k, top-p, min-p and typical, each
on what the one before has left. Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError, shown
from lm.plug import INT32

LEAST = 1e-6  # what logits can be divided by
NEG = -1e30  # a token that cannot be chosen; finite, so that differences stay numbers


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn.

    `temperature` 0 = greedy. `top_k` 0 = off; `top_p` (arXiv 1904.09751): the smallest set of that mass; `min_p` (arXiv
    2407.01082): at least that share of the likeliest token; `typical_p` (arXiv 2202.00666): that mass of the tokens
    whose information is nearest to the entropy. `repetition_penalty` (arXiv 1909.05858): logits of tokens in the prompt
    or the answer are divided (or, below 0, multiplied) by it; `presence_penalty` and `frequency_penalty` are
    subtracted, once or per occurrence in the answer. `bias`: (token id, added logit) pairs.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.temperature and not LEAST <= self.temperature < math.inf:
            valid = f"0 (greedy) or more (finite, at least {LEAST})"
            raise UserError(f"temperature: must be {valid}, found {self.temperature}")
        if not 0 <= self.top_k <= INT32:
            raise UserError(f"top_k: must be 0 (off) or more, and at most {INT32:,}, found {shown(self.top_k)}")
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}: must lie in (0, 1], found {getattr(self, name)}")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p: must lie in [0, 1), found {self.min_p}")
        for token, value in self.bias:
            if not value < math.inf:
                raise UserError(f"bias: token {token}: found {value}; valid: a number, or -inf for a token never drawn")
        if not LEAST <= self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty: must be positive (1 = off; finite, at least {LEAST}), found "
                f"{self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(vars(self)[name]):
                raise UserError(f"{name}: must be finite, found {vars(self)[name]}")

    def check(self, vocab_size: int) -> None:
        """Raises `UserError` for a bias on a token that the model does not have."""
        for token, _ in self.bias:
            if not 0 <= token < vocab_size:
                raise UserError(f"bias: unknown token id {token}; valid: 0 to {vocab_size - 1}")

    @property
    def penalises(self) -> bool:
        """Whether choices depend on which tokens came before."""
        return self.asks(*PENALTIES)

    def asks(self, *names: str) -> bool:
        """Whether any of these settings changes anything."""
        return any(vars(self)[name] != OFF[name] for name in names)

    def value(self, name: str) -> float:
        """A setting as `shape` computes with it."""
        return float(vars(self)[name])

    def biased(self, logits_BV: jax.Array) -> jax.Array:
        """The logits with `bias` added."""
        ids, values = zip(*self.bias, strict=True)
        return logits_BV.at[:, jnp.array(ids)].add(jnp.array(values, jnp.float32))

    def least(self, logits_BV: jax.Array) -> jax.Array:
        """The smallest logit ``[B, 1]`` that `top_k` keeps."""
        return jax.lax.top_k(logits_BV, min(self.top_k, logits_BV.shape[-1]))[0][:, -1:]

    def chosen(self, shaped_BV: jax.Array, drawn_B: jax.Array) -> jax.Array:
        """Of a token drawn, and the likeliest one, what this way of drawing takes."""
        return drawn_B


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
CUTS = ("top_k", "top_p", "min_p", "typical_p")
OFF = {**vars(Sampling()), "temperature": 0.0}  # the values with which a setting changes nothing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """`Sampling` of each of B rows.

    `used`: float32 ``[B, 1]`` by the name of every setting that any row uses, ``bias`` ``[B, V]``. Programs depend on
    the names, not on the values. A row draws what `Sampling` of the same settings draws.
    """

    used: dict[str, jax.Array]

    @staticmethod
    def of(rows: Sequence[Sampling], vocab_size: int) -> RowSampling:
        """The settings of `rows` together."""
        names = {name for name in OFF if name != "bias" and any(row.asks(name) for row in rows)}
        if not names & {"temperature"}:
            names -= {*CUTS}
        used = {}
        for name in sorted(names):
            own = [OFF[name] if name in CUTS and not row.temperature else vars(row)[name] for row in rows]
            used[name] = jnp.asarray(own, jnp.float32)[:, None]
        if any(row.bias for row in rows):
            bias_BV = np.zeros((len(rows), vocab_size), np.float32)
            for b, row in enumerate(rows):
                for token, value in row.bias:
                    bias_BV[b, token] += value
            used["bias"] = jnp.asarray(bias_BV)
        return RowSampling(used)

    @property
    def penalises(self) -> bool:
        return self.asks(*PENALTIES)

    def asks(self, *names: str) -> bool:
        return any(name in self.used for name in names)

    def value(self, name: str) -> jax.Array | float:
        if name not in self.used:
            return float(OFF[name])
        value = self.used[name]
        if name == "temperature":
            return jnp.where(value == 0, 1.0, value)
        if name in ("top_p", "typical_p"):
            return jnp.where(value < 1, value, jnp.inf)  # a sum of shares may reach 1 before the last
        return value

    def biased(self, logits_BV: jax.Array) -> jax.Array:
        return logits_BV + self.used["bias"]

    def least(self, logits_BV: jax.Array) -> jax.Array:
        V = logits_BV.shape[-1]
        k = self.used["top_k"].astype(jnp.int32)
        last = jnp.where((k > 0) & (k < V), V - k, 0)
        return jnp.take_along_axis(jnp.sort(logits_BV, axis=-1), last, axis=-1)

    def chosen(self, shaped_BV: jax.Array, drawn_B: jax.Array) -> jax.Array:
        return jnp.where(self.used["temperature"][:, 0] == 0, jnp.argmax(shaped_BV, axis=-1), drawn_B)


def shape(
    logits_BV: jax.Array, sampling: Sampling | RowSampling, in_prompt_BV: jax.Array, made_BV: jax.Array
) -> jax.Array:
    """Logits float32 ``[B, V]`` of the distribution to draw from; excluded tokens at `NEG`.

    `in_prompt_BV` bool, `made_BV` int32: whether a token is in the prompt, and how often in the answer so far (both may
    be ``[B, 1]`` zeros where nothing is penalised). With temperature 0 the result is for `argmax`.
    """
    s, logits = sampling, logits_BV.astype(jnp.float32)
    if s.asks("repetition_penalty"):
        seen, by = in_prompt_BV | (made_BV > 0), s.value("repetition_penalty")
        worse = jnp.where(logits > 0, logits / by, logits * by)
        logits = jnp.where(seen, worse, logits)
    if s.asks("presence_penalty", "frequency_penalty"):
        logits = logits - s.value("presence_penalty") * (made_BV > 0) - s.value("frequency_penalty") * made_BV
    if s.asks("bias"):
        logits = jnp.maximum(s.biased(logits), NEG)
    if not s.asks("temperature"):
        return logits
    logits = logits / s.value("temperature")
    if s.asks("top_k"):
        logits = jnp.where(logits < s.least(logits), NEG, logits)
    if s.asks("top_p"):
        logits = _keep_mass(logits, -logits, s.value("top_p"))
    if s.asks("min_p"):
        p = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(p < s.value("min_p") * p.max(-1, keepdims=True), NEG, logits)
    if s.asks("typical_p"):
        log_p = jax.nn.log_softmax(logits, axis=-1)
        entropy = -(jnp.exp(log_p) * log_p).sum(-1, keepdims=True)
        logits = _keep_mass(logits, jnp.abs(-log_p - entropy), s.value("typical_p"))
    return logits


def _keep_mass(logits: jax.Array, rank_by: jax.Array, mass: jax.Array | float) -> jax.Array:
    """The first tokens by ascending `rank_by` until their probabilities reach `mass`; the first always stays."""
    order = jnp.argsort(rank_by, axis=-1)
    p = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    keep = (before < mass).at[:, 0].set(True)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(keep).at[rows, order].set(keep), logits, NEG)


def draw(shaped_BV: jax.Array, sampling: Sampling | RowSampling, keys_B: jax.Array) -> jax.Array:
    """One token id int32 per row, each row by its own key: a sample does not depend on its neighbours."""
    if not sampling.asks("temperature"):
        return jnp.argmax(shaped_BV, axis=-1).astype(jnp.int32)
    return sampling.chosen(shaped_BV, jax.vmap(jax.random.categorical)(keys_B, shaped_BV)).astype(jnp.int32)
