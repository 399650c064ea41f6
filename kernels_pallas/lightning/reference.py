"""Linear attention with a decay per head: a loop over tokens, and the form in chunks that every platform runs.

Letters: B batch, H heads, T tokens, D width of queries and keys, E width of values, C tokens of a chunk.

    S_t = decay * S_{t-1} + k_t^T v_t        o_t = q_t S_t        (S [D, E] in float32, S_0 given)

That is Lightning Attention (arXiv 2401.04658, eq. 2 and algorithm 1) and TransNormerLLM (2307.14995, section 3.3), and
retention without its normalisation. The caller scales q. In chunks of C, with positions i, j from 0 within a chunk,

    o_i = sum_{j<=i} decay^(i-j) (q_i . k_j) v_j + decay^(i+1) q_i S      S' = decay^C S + sum_j decay^(C-1-j) k_j^T v_j

`reverse` runs from the last token to the first, and reads a token's state before the token's own decay:

    o_i = sum_{j>=i} decay^(j-i) (q_i . k_j) v_j + decay^(C-1-i) q_i S      S' = decay^C S + sum_j decay^(j+1) k_j^T v_j

which makes every gradient of one direction a call of one of the two (api.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.lightning.problem import Problem

CHUNK = 128


def recurrent(
    q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHE: jax.Array, decay_H: jax.Array, state_BHDE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The truth, token by token in float32 -> outputs [B, T, H, E] in the dtype of `q`, final state float32."""
    highest = jax.lax.Precision.HIGHEST
    rate = decay_H.astype(jnp.float32)[None, :, None, None]

    def step(S: jax.Array, qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v = (x.astype(jnp.float32) for x in qkv)
        S = rate * S + k[..., :, None] * v[..., None, :]
        return S, jnp.einsum("bhd,bhde->bhe", q, S, precision=highest)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q_BTHD, k_BTHD, v_BTHE))
    state, out = jax.lax.scan(step, state_BHDE.astype(jnp.float32), tokens)
    return jnp.moveaxis(out, 0, 1).astype(q_BTHD.dtype), state


def chunked(
    q_BHTD: jax.Array, k_BHTD: jax.Array, v_BHTE: jax.Array, problem: Problem, *, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """XLA operations, heads before tokens. Products in the dtype of `q`, sums in float32."""
    B, H, T, D = q_BHTD.shape
    reverse = problem.reverse
    dtype, precision = q_BHTD.dtype, jax.lax.Precision.HIGHEST if q_BHTD.dtype == jnp.float32 else None
    C = min(chunk or CHUNK, T)
    steps = -(-T // C)
    rate = problem.rate.astype(jnp.float32)[:, None]  # [H, 1]
    i = jnp.arange(C)
    ahead = (i[None, :] - i[:, None]) * (1 if reverse else -1)  # how far back the key lies, in the order of the scan
    powers_HCC = jnp.where(ahead >= 0, jnp.exp(rate[:, :, None] * jnp.maximum(ahead, 0)), 0.0)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, steps * C - T), (0, 0)))
        return jnp.moveaxis(x.reshape(B, H, steps, C, x.shape[-1]), 2, 0)

    def dot(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)

    def step(S: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, n = xs  # n of the C tokens exist
        early, late = i + 1, jnp.maximum(n - 1 - i, 0)
        read, write = (late, early) if reverse else (early, late)
        weight = (dot("bhid,bhjd->bhij", q, k) * powers_HCC).astype(dtype)
        out = dot("bhij,bhje->bhie", weight, v)
        out += jnp.exp(rate * read)[None, :, :, None] * dot("bhid,bhde->bhie", q, S.astype(dtype))
        kept = (k.astype(jnp.float32) * jnp.exp(rate * write)[None, :, :, None]).astype(dtype)
        S = jnp.exp(rate * n)[None, :, :, None] * S + dot("bhjd,bhje->bhde", kept, v)
        return S, out.astype(dtype)

    lengths = jnp.minimum(C, T - C * jnp.arange(steps))
    xs = (split(q_BHTD), split(k_BHTD), split(v_BHTE), lengths)
    state, out = jax.lax.scan(step, problem.state.astype(jnp.float32), xs, reverse=reverse)
    return jnp.moveaxis(out, 0, 2).reshape(B, H, steps * C, -1)[:, :, :T], state
