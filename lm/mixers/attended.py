"""From queries, keys and values to what every head gives: the cache, the pattern's branches, one softmax."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.attention.attend import attend
from lm.attention.branches import Context, Keys
from lm.caches.base import State
from lm.layer import LayerInputs
from lm.plug import Model
from lm.positions.base import Positions
from lm.watch import tap

Projected = tuple[jax.Array, jax.Array, jax.Array]  # queries [B, T, H, d], keys and values [B, T, K, d]


def attended(
    scope: nn.Module,
    cfg: Model,
    projected: Projected,
    positions: Positions,
    scale: float,
    layer: LayerInputs,
    cache: State | None,
    softcap: float | None = None,
    sink_H: jax.Array | None = None,
) -> tuple[jax.Array, State | None, Keys]:
    """What the queries see ``[B, T, H, d]``, the new cache, and the new keys as the cache would keep them.

    `positions`: bound to the model; `scale`: of the logits; `sink_H`: `beside_sinks`. What the pattern taps is handed
    out by `scope`.
    """
    q, k, v = projected
    tokens, length, watch, a = layer.tokens, layer.length, layer.watch, cfg.mixer
    new = Keys(k, v, tokens, new=tokens.index_BT.shape[1])
    sources: tuple[Keys, ...] = (new,)
    if cache is not None:
        k = positions.rotate(k, cache.places(tokens)[:, :, None], length) if cache.rotated else k
        new = Keys(k, v, tokens, cache.rotated)
        cache, sources = cache.extend(new) if layer.commit else (cache, cache.read(new))
    ctx = Context(q, tokens, sources, positions, length, scale)
    if cache is not None:
        prepared, ctx = cache.prepare(ctx)
        cache = prepared if layer.commit else cache
    branches = cfg.pattern.branches(ctx)
    if watch.taps:
        for name, value in cfg.pattern.taps(ctx, branches).items():
            tap(scope, watch, name, value)
    out, lse = attend(ctx, branches, softcap=softcap, backend=a.backend, block_q=a.block_q, block_k=a.block_k)
    if sink_H is not None:
        out, lse = beside_sinks(out, lse, sink_H)
    if cache is not None and layer.commit:
        cache = cache.observe(ctx, out, lse)
    return out, cache, new


def beside_sinks(out_BTHd: jax.Array, lse_BTH: jax.Array, sink_H: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention's output and log-sum-exp with one more key per head, of logit `sink_H` and value 0: the output keeps
    ``exp(lse) / (exp(lse) + exp(sink))`` of itself, whatever backend computed it."""
    sink = sink_H.astype(jnp.float32)
    kept_BTH1: Any = jax.nn.sigmoid(lse_BTH - sink)[..., None]
    return (kept_BTH1 * out_BTHd.astype(jnp.float32)).astype(out_BTHd.dtype), jnp.logaddexp(lse_BTH, sink)
