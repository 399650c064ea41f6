"""The likelihood of targets under any model, from final hidden states; objectives and measures share it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.heads.base import Sums, Targets
from lm.heads.cross_entropy import pieces
from lm.model.language_model import LanguageModel


def head_loss(model: LanguageModel, params: Any, over: Targets) -> tuple[jax.Array, Sums]:
    """``sum w (nll + z_loss log^2 Z)`` and the sums ``nll``, ``weight``, ``z`` (of log^2 Z) and ``correct`` (the target
    had the largest logit, ties included), each weighted; float32 scalars.

    A model with a loss of its own computes both itself (`LanguageModel.loss`). Its auxiliary losses join the loss, and
    the sums as ``aux_<name>``; ``nll`` stays without them.
    """
    fused = model.loss(params, over)
    if fused is not None:
        return fused
    kept = model.readout_params(params)

    @jax.checkpoint
    def piece(kept: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
        logits = model.readout(kept, hidden).astype(jnp.float32)
        own = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        correct = jax.lax.stop_gradient(own >= logits.max(-1))
        return {
            **{f"aux_{name}": (weights * value).sum() for name, value in model.aux(kept, hidden).items()},
            "nll": (weights * (log_z - own)).sum(),
            "weight": weights.sum(),
            "z": (weights * log_z**2).sum(),
            "correct": (weights * correct).sum(),
        }

    def step(total: Sums, xs: tuple[jax.Array, ...]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, piece(kept, *xs)), None

    cut = pieces(over.chunk, over.hidden_BTD, over.targets_BT, over.weights_BT.astype(jnp.float32))
    shapes = jax.eval_shape(piece, kept, *(x[0] for x in cut))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(step, zero, cut)
    loss = sums["nll"] + over.z_loss * sums["z"] + sum(sums[name] for name in sums if name.startswith("aux_"))
    return loss, jax.tree.map(jax.lax.stop_gradient, sums)
