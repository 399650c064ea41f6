"""The likelihood of targets under any head, from final hidden states; objectives and measures share it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.heads.cross_entropy import Sums, pieces
from lm.model.decoder import readout


def head_loss(
    cfg: ModelConfig,
    params: dict[str, Any],
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> tuple[jax.Array, Sums]:
    """Loss and sums of `lm.objectives.causal.Causal` from final hidden states, for any head; for objectives that add
    terms of their own.

    A head with a method ``loss(cfg, params, hidden, targets, weights, z_loss, chunk)`` computes both itself. What a
    head's method ``aux`` gives joins the loss, and the sums as ``aux_<name>``; ``nll`` stays without it.
    """
    fused = getattr(cfg.head, "loss", None)
    if fused is not None:
        return fused(cfg, params, hidden_BTD, targets_BT, weights_BT, z_loss, chunk)
    kept = {name: params[name] for name in ("embed", "head") if name in params}

    def aux(kept: dict[str, Any], hidden: jax.Array) -> dict[str, jax.Array]:
        own = getattr(cfg.head, "aux", None)
        return {} if own is None else own(cfg, kept, hidden)

    @jax.checkpoint
    def piece(kept: dict[str, Any], hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        logits = readout(cfg, kept, hidden).astype(jnp.float32)
        own = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        correct = jax.lax.stop_gradient(own >= logits.max(-1))
        return {
            **{f"aux_{name}": (weights * value).sum() for name, value in aux(kept, hidden).items()},
            "nll": (weights * (log_z - own)).sum(),
            "weight": weights.sum(),
            "z": (weights * log_z**2).sum(),
            "correct": (weights * correct).sum(),
        }

    def step(total: Sums, xs: Any) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, piece(kept, *xs)), None

    cut = pieces(chunk, hidden_BTD, targets_BT, weights_BT.astype(jnp.float32))
    shapes = jax.eval_shape(piece, kept, *(x[0] for x in cut))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(step, zero, cut)
    loss = sums["nll"] + z_loss * sums["z"] + sum(sums[name] for name in sums if name.startswith("aux_"))
    return loss, jax.tree.map(jax.lax.stop_gradient, sums)
