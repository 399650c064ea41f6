"""Looking inside a call: a `Watch` names arrays, and `tap` hands them out where they are made, or edits them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Reduce = Literal["gram", "absmax", "hist"]
Edit = Callable[[jax.Array], jax.Array]

BINS = 64  # of a histogram


@dataclass(frozen=True)
class Watch:
    """Which arrays a call hands out, and in which form; static, so a program is compiled per watch.

    `taps`: shell patterns over names (``stream``, the residual stream after a layer; ``attn/blocks``, ``ffn/experts``,
    ``attn/q/input``, …). An array ``[B, T, …]`` comes as it is, cut to the `last` tokens (0 = all), or reduced over
    tokens: ``gram``, the sums of products ``[…, n, n]`` of its last axis; ``absmax``, the largest size of every channel
    ``[…]``; ``hist``, counts of log10 of sizes in `BINS` bins from 1e-8 to 1e4. `edits`: (pattern, function) pairs; the
    function's result takes the array's place in the model. `logits`: whether the head is computed. `on_layer` is called
    on the host after every layer (progress bars).
    """

    taps: tuple[str, ...] = ()
    last: int = 0
    reduce: Reduce | None = None
    edits: tuple[tuple[str, Edit], ...] = ()
    logits: bool = True
    on_layer: Callable[[], None] | None = None

    @property
    def looks(self) -> bool:
        return bool(self.taps)

    def wants(self, name: str) -> bool:
        """Whether an array of that name is handed out."""
        return any(fnmatchcase(name, pattern) for pattern in self.taps)

    def reduced(self, x: jax.Array) -> jax.Array:
        """The form in which ``x[B, T, …]`` is handed out."""
        x = x[:, -self.last :] if self.last else x
        if self.reduce is None:
            return x
        flat = x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
        if self.reduce == "gram":
            return jnp.einsum("n...i,n...j->...ij", flat, flat, precision=jax.lax.Precision.HIGHEST)
        if self.reduce == "absmax":
            return jnp.abs(flat).max(0)
        sizes = jnp.log10(jnp.maximum(jnp.abs(flat), 1e-30))
        return jnp.histogram(sizes, bins=BINS, range=(-8.0, 4.0))[0]


def tap(module: nn.Module, watch: Watch, name: str, x: jax.Array) -> jax.Array:
    """``x[B, T, …]``, handed out under the module's path and `name` where the watch wants it, or edited.

    Without a watch this is `x`, and nothing is added to the program.
    """
    if not (watch.taps or watch.edits):
        return x
    full = "/".join((*module.path, name))
    if watch.wants(full) and module.is_mutable_collection("taps"):
        module.put_variable("taps", name, watch.reduced(x))  # `sow` refuses the name of a submodule, as ``experts``
    for pattern, edit in watch.edits:
        if fnmatchcase(full, pattern):
            x = edit(x)
    return x
