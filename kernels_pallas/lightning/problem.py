"""What one scan of `lightning` computes of queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

from kernels_pallas.common import STATIC


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """A pytree of its arrays.

    `rate` [H]: log of the decay of each head. `state` [B, H, D, E]: what the scan begins with. `reverse`: from the last
    token to the first, see reference.py.
    """

    rate: jax.Array
    state: jax.Array
    reverse: bool = field(default=False, metadata=STATIC)
