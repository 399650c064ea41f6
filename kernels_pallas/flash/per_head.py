"""Gradients to a slope and to a sink per head, from sums over each row that the kernels of the gradient to q make.

The row's ``shift = sum(dO * O) - dLSE`` comes from the output as it was rounded, so every row has an error. The
gradients to q, k and v hardly feel it. The gradients to slopes and sinks do: there distances and the share of the sink
weigh it, and the rows of a head add up. It is mended here: by the probabilities themselves ``sum_j p_j dp_j`` is
exactly ``dO . O``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Bend = jax.Array | float | None  # d logit / d score; 1.0 or None without a soft-cap
SUMS = "error", "lean", "pull"


def sums(slopes: jax.Array | None, sinks: jax.Array | None) -> tuple[str, ...]:
    """The sums over a row that the gradients to `slopes` and `sinks` (arrays, or None) need.

    Of `terms`, with `error` the gradient of a logit and `bend` its slope by the soft-cap: ``error = sum_j error_j``,
    ``lean = -sum_j error_j bend_j distance_j``, ``pull = -sum_j p_j bend_j distance_j``.
    """
    return SUMS if slopes is not None else SUMS[:1] if sinks is not None else ()


def terms(p: jax.Array, error: jax.Array, bend: Bend, distance: jax.Array | None) -> tuple[jax.Array, ...]:
    """What the `sums` add up, of one tile in a kernel, in their order. `distance` is None without slopes."""
    if distance is None:
        return (error,)
    lean, pull = (x if bend is None else x * bend for x in (error, p))
    return error, -lean * distance, -pull * distance


def gradients(
    of_rows: dict[str, jax.Array],
    sinks_H: jax.Array | None,
    lse_BHT: jax.Array,
    shift_BHT: jax.Array,
    d_lse_BHT: jax.Array,
) -> dict[str, jax.Array | None]:
    """Gradients ``[H]`` to ``slopes`` and ``sinks``, or None, of `of_rows`: `sums` by name, ``[B, H, T]``.

    `lse` is large where a row has no part, so that its probabilities are 0; `shift` is what the kernels had.
    """
    slopes = sinks = None
    if of_rows:
        p_sink = 0.0 if sinks_H is None else jnp.exp(sinks_H[:, None] - lse_BHT)
        missing = of_rows["error"] - d_lse_BHT - shift_BHT * p_sink  # exact shift - shift; sum_j p_j = 1 - p_sink
        if "lean" in of_rows:
            slopes = (of_rows["lean"] - missing * of_rows["pull"]).sum((0, 2))
        if sinks_H is not None:
            sinks = -(p_sink * (shift_BHT + missing)).sum((0, 2))
    return {"slopes": slopes, "sinks": sinks}
