"""Cross-entropy of a linear head, gradient included, without an array of all logits.

The loss is a scalar, so its gradient is known up to one factor as soon as the logits are: the forward pass of the
differentiated function visits the tokens piece by piece and leaves the gradients of hidden states and weights
(as do Liger Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009). Logits are computed once
and never stored. Letters: B batch, T tokens, t tokens of a piece, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.heads.base import Sums, Targets
from lm.sharding.layout import constrain, parts


def pieces(chunk: int, *arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
    """``[B, T, …]`` -> ``[n, B, t, …]`` with ``b t <= chunk`` where b allows (0 = one piece), the last piece filled up
    with zeros; b are the rows of one device, all where there is no layout. Rows stay whole, so that a batch sharded
    over devices is cut on every device alike. Where a layout cuts the length into s parts, every part counts as a row:
    ``[n, s B, t / s, …]``, so that a piece has tokens of all devices."""
    B, T = arrays_BT[0].shape[:2]
    s = _parts_of(T)
    t = min(max(chunk // max(B // parts("batch"), 1), 1), T // s) if chunk else T // s
    n = -(-T // (s * t))

    def cut(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        if s > 1:
            x = jnp.moveaxis(x.reshape(B, s, T // s, *rest), 1, 0).reshape(s * B, T // s, *rest)
        x = jnp.pad(x, [(0, 0), (0, n * t - T // s)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(s * B, n, t, *rest), 1, 0)

    return tuple(cut(x) for x in arrays_BT)


def whole(x: jax.Array, B: int, T: int) -> jax.Array:
    """``[B, T, …]`` of what `pieces` has cut."""
    s = _parts_of(T)
    x = jnp.moveaxis(x, 0, 1).reshape(s * B, -1, *x.shape[3:])[:, : T // s]
    return x if s == 1 else jnp.moveaxis(x.reshape(s, B, *x.shape[1:]), 0, 1).reshape(B, T, *x.shape[2:])


def _parts_of(T: int) -> int:
    s = parts("length")
    return s if T % s == 0 else 1


def linear_loss(
    over: Targets, table_VD: jax.Array, bias_V: jax.Array | None, *, softcap: float | None = None
) -> tuple[jax.Array, Sums]:
    """``sum w (log Z - logit_target + z_loss log^2 Z)`` and the sums ``nll, weight, z, correct``, float32 scalars.

    Logits are ``hidden @ table.T + bias``, soft-capped. Differentiable in hidden, table and bias (once; the gradient's
    own derivative is not defined). Matrix products run in the hidden states' type, all else in float32.
    """
    bias = jnp.zeros((), jnp.float32) if bias_V is None else bias_V
    settings = _Settings(softcap, over.z_loss, over.chunk, bias_V is not None)
    weights = over.weights_BT.astype(jnp.float32)
    loss, sums = _loss(settings, over.hidden_BTD, table_VD, bias, over.targets_BT, weights)
    return loss, jax.tree.map(jax.lax.stop_gradient, sums)


class _Settings(NamedTuple):
    softcap: float | None
    z_loss: float
    chunk: int
    biased: bool


def _piece(
    settings: _Settings, table_DV: jax.Array, bias: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[Any, ...]:
    """Logits ``[B t, V]``, log Z and the target's place in them, and the sums of one piece."""
    softcap, biased = settings.softcap, settings.biased
    hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    logits = jnp.dot(hidden, table_DV, preferred_element_type=jnp.float32)
    if biased:
        logits = logits + bias.astype(jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    top = logits.max(-1)
    log_z = top + jnp.log(jnp.exp(logits - top[:, None]).sum(-1))
    own = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    sums = {
        "nll": (weights * (log_z - own)).sum(),
        "weight": weights.sum(),
        "z": (weights * log_z**2).sum(),
        "correct": (weights * (own >= top)).sum(),
    }
    return logits, log_z, hidden, targets, weights, sums


def _total(settings: _Settings, sums: Sums) -> tuple[jax.Array, Sums]:
    return sums["nll"] + settings.z_loss * sums["z"], sums


_ZERO = ("nll", "weight", "z", "correct")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    settings: _Settings, hidden: jax.Array, table: jax.Array, bias: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Sums]:
    table_DV = constrain(table.astype(hidden.dtype), "vocab", None).T

    def step(total: Sums, xs: tuple[jax.Array, ...]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, _piece(settings, table_DV, bias, *xs)[-1]), None

    zero = {name: jnp.zeros(()) for name in _ZERO}
    return _total(settings, jax.lax.scan(step, zero, pieces(settings.chunk, hidden, targets, weights))[0])


def _forward(
    settings: _Settings, hidden: jax.Array, table: jax.Array, bias: jax.Array, targets: jax.Array, weights: jax.Array
) -> Any:
    softcap, z_loss, chunk, biased = settings
    B, T, _ = hidden.shape
    # Once: devices fetch what others hold of the matrix, and every product of the loop reads it as it lies in memory.
    matrix = constrain(table.astype(hidden.dtype), "vocab", None)
    table_DV = matrix.T

    def step(carry: tuple[Sums, jax.Array, jax.Array], xs: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, d_table_DV, d_bias = carry
        logits, log_z, h, targets, weights, sums = _piece(settings, table_DV, bias, *xs)
        grow = weights * (1.0 + 2.0 * z_loss * log_z) if z_loss else weights
        hit = jnp.arange(logits.shape[1], dtype=targets.dtype) == targets[:, None]
        d = jnp.exp(logits - log_z[:, None]) * grow[:, None] - jnp.where(hit, weights[:, None], 0.0)
        if softcap is not None:
            d = d * (1.0 - (logits / softcap) ** 2)
        if biased:
            d_bias = d_bias + d.sum(0)
        d = d.astype(hidden.dtype)
        own = constrain(jnp.dot(h.T, d, preferred_element_type=jnp.float32), "embed", "vocab")
        d_table_DV = d_table_DV + own
        d_h = jnp.dot(d, matrix, preferred_element_type=jnp.float32).astype(hidden.dtype)
        return (jax.tree.map(jnp.add, total, sums), d_table_DV, d_bias), d_h.reshape(xs[0].shape)

    zero = {name: jnp.zeros(()) for name in _ZERO}
    d_table = constrain(jnp.zeros(table_DV.shape, jnp.float32), "embed", "vocab")
    carry = (zero, d_table, jnp.zeros(bias.shape, jnp.float32))
    (sums, d_table_DV, d_bias), d_h = jax.lax.scan(step, carry, pieces(chunk, hidden, targets, weights))
    return _total(settings, sums), (whole(d_h, B, T), d_table_DV.T.astype(table.dtype), d_bias.astype(bias.dtype))


def _backward(settings: _Settings, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, Sums]) -> Any:
    scale = cotangents[0]
    return (*(x * scale.astype(x.dtype) for x in saved), None, None)


_loss.defvjp(_forward, _backward)
