"""SOCKET cache: keys and values of earlier tokens, as explicit pytrees (`lm.caches.base`).

A model's cache is one state per layer, which the layer's mixer makes. Keys are stored after their rotation: each is
rotated once, and a pattern that wants a key elsewhere turns it by the difference. Raw keys are needed only where
frequencies depend on the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.attention.branches import Keys, Tokens
from lm.caches.base import Axes, State
from lm.errors import UserError
from lm.plug import Model, Table

__all__ = ["TABLE", "Caches", "State", "Tokens", "axes", "begun", "check", "commit", "init", "n_bytes", "seal"]

TABLE = Table(
    {
        "auto": "lm.caches.auto:Auto",
        "full": "lm.caches.full:Full",
        "sink_window": "lm.caches.sink_window:SinkWindow",
        "block_memory": "lm.caches.blocks:BlockMemory",
    }
)

Caches = tuple[State | None, ...]  # one per layer


def check(cfg: Model) -> None:
    """Raises `UserError` with the reason when a layer of the model cannot continue a text token by token."""
    for i, layer in enumerate(cfg.layers()):
        for key, why in (("ffn", layer.ffn.uncached), ("mixer", layer.mixer.uncached(layer))):
            if why:
                raise UserError(f"model.{key}: layer {i} cannot generate or decode with a cache: {why}")


def init(cfg: Model, batch: int, capacity: int) -> Caches:
    """Empty caches for `batch` rows of at most `capacity` tokens, one state per layer. Raises `UserError` for models
    that cannot be decoded (`check`)."""
    check(cfg)
    return tuple(layer.mixer.cache(layer, batch, capacity) for layer in cfg.layers())


def axes(cache: Caches, place: Callable[[Axes], object]) -> tuple[object, ...]:
    """The caches of all layers with ``place(logical axes)`` in the place of every array."""

    def layer(state: State | None) -> object:
        known = {} if state is None else state.AXES
        return jax.tree_util.tree_map_with_path(lambda path, _: place(known.get(str(path[0].name), ())), state)

    return tuple(layer(state) for state in cache)


def seal(cache: Caches) -> Caches:
    """The caches after a prompt has been read."""
    return tuple(None if state is None else state.seal() for state in cache)


def begun(cache: Caches) -> Caches:
    """The caches as they are after their first tokens."""
    return tuple(None if state is None else state.begun() for state in cache)


def commit(cache: Caches, fresh: tuple[Keys | None, ...], path_BP: jax.Array, count_B: jax.Array) -> Caches:
    """The caches with a path of tokens kept that a call without ``commit`` has read.

    `fresh`: what that call gave for every layer (`lm.model.output.Output.fresh`). `path_BP` int32: which of its tokens,
    in order; `count_B` int32: how many of a row's path count. A row that keeps none stays as it was.
    """
    live = jnp.arange(path_BP.shape[1]) < count_B[:, None]
    rows = jnp.arange(path_BP.shape[0])[:, None]

    def one(state: State | None, keys: Keys | None) -> State | None:
        if state is None or keys is None:
            return state
        tokens = keys.tokens
        chosen = Tokens(jnp.where(live, tokens.index_BT[rows, path_BP], -1), tokens.positions_BT[rows, path_BP])
        return state.write(Keys(keys.k_BSKd[rows, path_BP], keys.v_BSKd[rows, path_BP], chosen, keys.rotated))

    return tuple(one(state, keys) for state, keys in zip(cache, fresh, strict=True))


def n_bytes(cache: Caches) -> int:
    """Bytes of all arrays of a cache."""
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(cache))
