"""From logits to a choice: penalties, bias, temperature and truncation, in the order the field uses.

The order is that of transformers' generation: penalties, bias, temperature, then top-k, top-p, min-p and typical, each
on what the one before has left. Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm.errors import UserError

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
        if not self.temperature >= 0:
            raise UserError(f"temperature: must be 0 (greedy) or more, found {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k: must be 0 (off) or more, found {self.top_k}")
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}: must lie in (0, 1], found {getattr(self, name)}")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p: must lie in [0, 1), found {self.min_p}")
        for token, value in self.bias:
            if not value < math.inf:
                raise UserError(f"bias: token {token}: found {value}; valid: a number, or -inf for a token never drawn")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty: must be positive (1 = off), found {self.repetition_penalty}")

    def check(self, vocab_size: int) -> None:
        """Raises `UserError` for a bias on a token that the model does not have."""
        for token, _ in self.bias:
            if not 0 <= token < vocab_size:
                raise UserError(f"bias: unknown token id {token}; valid: 0 to {vocab_size - 1}")

    @property
    def penalises(self) -> bool:
        """Whether choices depend on which tokens came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def shape(logits_BV: jax.Array, sampling: Sampling, in_prompt_BV: jax.Array, made_BV: jax.Array) -> jax.Array:
    """Logits float32 ``[B, V]`` of the distribution to draw from; excluded tokens at `NEG`.

    `in_prompt_BV` bool, `made_BV` int32: whether a token is in the prompt, and how often in the answer so far (both may
    be ``[B, 1]`` zeros where nothing is penalised). With temperature 0 the result is for `argmax`.
    """
    s, logits = sampling, logits_BV.astype(jnp.float32)
    if s.repetition_penalty != 1.0:
        seen = in_prompt_BV | (made_BV > 0)
        worse = jnp.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
        logits = jnp.where(seen, worse, logits)
    if s.presence_penalty or s.frequency_penalty:
        logits = logits - s.presence_penalty * (made_BV > 0) - s.frequency_penalty * made_BV
    if s.bias:
        ids, values = zip(*s.bias, strict=True)
        logits = jnp.maximum(logits.at[:, jnp.array(ids)].add(jnp.array(values, jnp.float32)), NEG)
    if s.temperature == 0:
        return logits
    logits = logits / s.temperature
    if 0 < s.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, s.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, NEG, logits)
    if s.top_p < 1:
        logits = _keep_mass(logits, -logits, s.top_p)
    if s.min_p > 0:
        p = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(p < s.min_p * p.max(-1, keepdims=True), NEG, logits)
    if s.typical_p < 1:
        log_p = jax.nn.log_softmax(logits, axis=-1)
        entropy = -(jnp.exp(log_p) * log_p).sum(-1, keepdims=True)
        logits = _keep_mass(logits, jnp.abs(-log_p - entropy), s.typical_p)
    return logits


def _keep_mass(logits: jax.Array, rank_by: jax.Array, mass: float) -> jax.Array:
    """The first tokens by ascending `rank_by` until their probabilities reach `mass`; the first always stays."""
    order = jnp.argsort(rank_by, axis=-1)
    p = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    keep = (before < mass).at[:, 0].set(True)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(keep).at[rows, order].set(keep), logits, NEG)


def draw(shaped_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """One token id int32 per row, each row by its own key: a sample does not depend on its neighbours."""
    if sampling.temperature == 0:
        return jnp.argmax(shaped_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, shaped_BV).astype(jnp.int32)
