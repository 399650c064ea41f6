"""On a GPU there is no kernel of ours yet: plain causal attention goes to cuDNN, everything else is refused by name.

`jax.nn.dot_product_attention(implementation="cudnn")` gives output and log-sum-exp, forward and backward, but drops the
gradient that arrives through the log-sum-exp without a word; here asking for that gradient is an error. What this
refuses runs on XLA: the implementation ``xla``, or the backend ``blocked`` of `lm.attention`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import UserError


@jax.custom_vjp
def _forward_only(lse: jax.Array) -> jax.Array:
    return lse


def _refuse(_: Any, cotangent: Any) -> Any:
    raise UserError("flash: implementation 'gpu': cuDNN has no gradient through the log-sum-exp; valid: 'xla'")


_forward_only.defvjp(lambda lse: (lse, None), _refuse)


def refusal(
    q: jax.Array, k: jax.Array, causal: bool, rows: dict[str, Any], slopes: Any, sinks: Any, softcap: Any
) -> str | None:
    """Why cuDNN cannot serve this call, or None."""
    reasons = {
        "the mask is not plain causal": not causal,
        "queries and keys are not the same rows": q.shape[1] != k.shape[1],
        "segments or padding": bool({"q_index", "q_segments"} & set(rows)),
        "a slope per head": slopes is not None,
        "sinks": sinks is not None,
        "a soft-cap": softcap is not None,
        f"dtype {q.dtype} (valid: bfloat16, float16)": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"heads wider than 128 ({q.shape[-1]})": q.shape[-1] > 128,
        "no GPU here, and cuDNN is asked for its version as soon as it is called": jax.default_backend() != "gpu",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def attention(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, *_: Any, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Causal attention by cuDNN: output ``[B, T, H, d]`` and log-sum-exp float32 ``[B, T, H]`` (no gradient)."""
    out, lse = jax.nn.dot_product_attention(
        q_BTHd, k_BSKd, v_BSKd, scale=scale, is_causal=True, implementation="cudnn", return_residual=True
    )
    return out, _forward_only(lse.astype(jnp.float32))
