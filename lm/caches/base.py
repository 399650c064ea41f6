"""The socket ``model.cache``: what a cache is asked to do, and what it keeps for every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax

from lm.attention.branches import Context, Keys, Tokens
from lm.errors import UserError
from lm.plug import Model, Plug

Axes = tuple[str | None, ...]


class State:
    """What one layer keeps of earlier tokens: a frozen dataclass that is a pytree.

    A call of a layer reads, then writes: `read` gives everything that T new queries may see, the new tokens included;
    `write` keeps them. `extend` does both, and a state whose memory is updated in place reads what it has just written.
    A token whose index is negative is padding: it is written nowhere. `observe` is called after attention, `seal` once
    after a prompt.
    """

    AXES: ClassVar[Mapping[str, Axes]] = {}  # logical axes of its arrays by field; without them every device holds all
    rotated: bool = True  # whether keys are kept at their rotations

    def places(self, tokens: Tokens) -> jax.Array:
        """Positions, float32 ``[B, T]``, that keys are rotated to before they are kept."""
        return tokens.positions_BT

    def read(self, new: Keys) -> tuple[Keys, ...]:
        """The sources of keys for queries of the tokens in `new`; changes nothing."""
        raise NotImplementedError

    def write(self, new: Keys) -> Self:
        """The state with the tokens of `new` kept."""
        raise NotImplementedError

    def extend(self, new: Keys) -> tuple[Self, tuple[Keys, ...]]:
        """`write` and `read` at once."""
        return self.write(new), self.read(new)

    def prepare(self, ctx: Context) -> tuple[Self, Context]:
        """Called after `extend`, with the queries in sight: for states that keep more than keys and values."""
        return self, ctx

    def observe(self, ctx: Context, out_BTHd: jax.Array, lse_BTH: jax.Array) -> Self:
        """Called after attention, with its result and its log-sum-exp float32."""
        return self

    def seal(self) -> Self:
        """Called once when a prompt has been read."""
        return self

    def begun(self) -> Self:
        """The state as it is after its first tokens, whatever they were: another program may run from then on."""
        return self

    def noised(self, key: jax.Array) -> Self:
        """What is kept beside keys and values, drawn at random: for measurements of time alone."""
        return self

    def replace(self, **changes: Any) -> Self:
        """The state with other values of some fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


class Cache(Plug):
    """How keys and values of earlier tokens are kept: a frozen dataclass of settings."""

    KEY: ClassVar[str] = "model.cache"

    def check(self, cfg: Model) -> None:
        """Raises `UserError` for a model whose layers need what the cache does not keep."""

    def init(self, cfg: Model, batch: int, capacity: int) -> State:
        """The empty state of a layer `cfg`, for `batch` rows of at most `capacity` tokens."""
        raise NotImplementedError

    @property
    def room(self) -> int | None:
        """Tokens that a row may have at most; None = as many as are asked for."""
        return None


def no_summary(cache: Cache, cfg: Model) -> None:
    """Raises `UserError` where the pattern asks for summaries of blocks, for a cache that keeps none."""
    if cfg.pattern.summary is not None:
        raise UserError(
            f"model.cache: {type(cache).__name__} keeps no {cfg.pattern.summary} for pattern "
            f"{type(cfg.pattern).__name__}; valid: auto, block_memory"
        )
