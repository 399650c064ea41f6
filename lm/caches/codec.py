"""How a cache keeps its keys and values: as they are, or as int8 with a scale per token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.errors import unknown

Stored = Any  # a tree of arrays
Quantize = Literal["int8"]


class Codec:
    """From arrays ``[…, d]`` to what is stored, and back."""

    def encode(self, x: jax.Array) -> Stored:
        raise NotImplementedError

    def decode(self, stored: Stored, dtype: DTypeLike) -> jax.Array:
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Codec):
    """As they are."""

    def encode(self, x: jax.Array) -> Stored:
        return x

    def decode(self, stored: Stored, dtype: DTypeLike) -> jax.Array:
        plain: jax.Array = stored.astype(dtype)
        return plain


@dataclass(frozen=True)
class Int8(Codec):
    """``x ~ scale * q``, q int8 in -127 … 127, scale float32 = max |x| / 127 over the head's channels: the error of a
    channel is at most half a scale. ``[…, d]`` takes d + 4 bytes instead of 4 d (float32) or 2 d (bfloat16)."""

    def encode(self, x: jax.Array) -> Stored:
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127.0
        q = jnp.round(x / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8)
        return {"q": q, "scale": scale}

    def decode(self, stored: Stored, dtype: DTypeLike) -> jax.Array:
        x: jax.Array = (stored["q"].astype(jnp.float32) * stored["scale"]).astype(dtype)
        return x


CODECS: dict[str, Codec] = {"none": Plain(), "int8": Int8()}


def codec(name: str | None) -> Codec:
    """The codec of that name (None: ``none``); raises `UserError` for another."""
    if (name or "none") not in CODECS:
        raise unknown("cache.quantize", name, CODECS)
    return CODECS[name or "none"]
