"""A mixture-density head over ordered bins: a few Gaussians on [-1, 1], read off at the bins' centres."""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.heads.bins import Bins
from lm.plug import Model, bounded
from lm.weights.project import uniform
from lm.weights.weight import param


@dataclass(frozen=True)
class Mixture(Bins):
    """``softmax(log(density + epsilon))`` of a mixture of `components` Gaussians with means ``tanh(.)`` of a linear
    layer.

    With `conditional`, weights and spreads come from the hidden state as well (Bishop 1994, mixture density networks).
    Without, the mixture is that of arXiv 2410.22269's synthetic study: equal weights, and one learned spread per
    component that the input does not change, at first one bin wide.
    """

    components: int = bounded(2, at_least=1)
    conditional: bool = True

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        return _Mixture(cfg, name=name)


class _Mixture(nn.Module):
    cfg: Model

    @nn.compact
    def __call__(self, h: jax.Array, table_VD: jax.Array) -> jax.Array:
        cfg, head = self.cfg, self.cfg.head
        K, n = head.components, head.components * (3 if head.conditional else 1)
        bound = cfg.d_model**-0.5
        init, of = uniform(bound), cfg.param_dtype
        kernel = param(self, "mixture", init, (cfg.d_model, n), of, axes=("embed", "components")).astype(jnp.float32)
        bias = param(self, "mixture_bias", init, (n,), of, axes=("components",)).astype(jnp.float32)
        flat = jnp.dot(h.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST) + bias
        width = math.log(math.expm1(2.0 / cfg.vocab_size))  # softplus of it is one bin
        start = nn.initializers.constant(width)
        raw = param(self, "spread", start, (K,), of, axes=("components",)).astype(jnp.float32)
        log_weight = jnp.full((K,), -math.log(K), jnp.float32)
        if head.conditional:
            raw, log_weight = raw + flat[..., K : 2 * K], jax.nn.log_softmax(flat[..., 2 * K :])
        spread = jax.nn.softplus(raw)[..., None] + 1e-4  # a Gaussian much narrower than a bin would miss every centre
        mean = jnp.tanh(flat[..., :K])[..., None]
        x = jnp.asarray(head.bins(cfg.vocab_size), jnp.float32)
        log_density = -0.5 * ((x - mean) / spread) ** 2 - jnp.log(spread) - 0.5 * math.log(2 * math.pi)
        mixed = jax.nn.logsumexp(log_density + log_weight[..., None], axis=-2)
        return jnp.logaddexp(mixed, math.log(head.epsilon))
