"""Plain causal attention by cuDNN, on a GPU; everything else is refused by name.

`jax.nn.dot_product_attention(implementation="cudnn")` gives output and log-sum-exp, but drops the gradient that arrives
through the log-sum-exp without a word. Here it is computed, from d lse_i / d logit_ij = p_ij: to q it is attention with
the keys as values, to k the gradient to the values of ``dlse * q``; two more calls of cuDNN, made where dlse is not 0.
JAX rounds the log-sum-exp to the dtype of q on the way: enough for a loss, not for merging branches.
What this refuses runs on XLA: the implementation ``xla``, or the backend ``blocked`` of `lm.attention`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import Shaped
from kernels_pallas.flash.problem import Scores


def _causal(library: str, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, **more: bool) -> Any:
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=library, **more)  # type: ignore[call-overload]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _through(library: str, scale: float, q: jax.Array, k: jax.Array, lse: jax.Array) -> jax.Array:
    """`lse` itself, with its gradient to q and k."""
    return lse


def _forward(library: str, scale: float, q: jax.Array, k: jax.Array, lse: jax.Array) -> tuple[jax.Array, Any]:
    return lse, (q, k)


def _backward(library: str, scale: float, saved: tuple[jax.Array, jax.Array], d_lse: jax.Array) -> tuple[Any, ...]:
    q, k = saved

    def some() -> tuple[jax.Array, jax.Array]:
        weight = (scale * d_lse)[..., None]
        mean, pull = jax.vjp(functools.partial(_causal, library, scale, q, k), k)
        return (weight * mean).astype(q.dtype), pull((weight * q).astype(mean.dtype))[0]

    dq, dk = jax.lax.cond(jnp.any(d_lse), some, lambda: (jnp.zeros_like(q), jnp.zeros_like(k)))
    return dq, dk, jnp.zeros_like(d_lse)


_through.defvjp(_forward, _backward)


def refusal(q: Shaped, k: Shaped, scores: Scores) -> str | None:
    """Why cuDNN cannot serve this call, or None."""
    reasons = {
        "the mask is not plain causal": not scores.causal,
        "queries and keys are not the same rows": q.shape[1] != k.shape[1],
        "segments or padding": bool({"q_index", "q_segments"} & set(scores.rows)),
        "a slope per head": scores.slopes_H is not None,
        "sinks": scores.sinks_H is not None,
        "a soft-cap": scores.softcap is not None,
        f"dtype {q.dtype} (valid: bfloat16, float16)": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"heads wider than 128 ({q.shape[-1]})": q.shape[-1] > 128,
        "no GPU here, and cuDNN is asked for its version as soon as it is called": jax.default_backend() != "gpu",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def attention(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, scores: Scores, *, library: str = "cudnn"
) -> tuple[jax.Array, jax.Array]:
    """Causal attention by `library`: output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]``, differentiable."""
    out, lse = _causal(library, scores.scale, q_BTHd, k_BSKd, v_BSKd, return_residual=True)
    return out, _through(library, scores.scale, q_BTHd, k_BSKd, jax.lax.stop_gradient(lse.astype(jnp.float32)))
