"""Blocks by the generic suite; their summaries are in tests/patterns/test_longheads.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import model
from cases.cache_case import CacheCase

from lm import caches
from lm.caches.blocks import BlockMemory, BlocksState
from lm.plug import Model, table
from lm.positions.rope import Rope


class _OfChunks(BlockMemory):
    """For layers whose pattern asks for summaries of chunks of 4 tokens."""

    def init(self, cfg: Model, batch: int, capacity: int) -> BlocksState:
        pattern = table("lm.patterns")["longheads"](4, 12)
        changed = dataclasses.replace(cfg, pattern=pattern, positions=Rope(fraction=0.7))  # an even number of channels
        return super().init(changed, batch, capacity)


class TestBlocks(CacheCase):
    plug = _OfChunks()


def test_a_block_has_a_summary_once_it_is_complete() -> None:
    """Of ten tokens in blocks of four, read in two pieces, two have one."""
    cfg = model.changed(model.BASE, {"pattern": {"name": "longheads", "chunk": 4, "attention_length": 12}})

    @jax.jit
    def read(params: model.Params, tokens_BT: jax.Array) -> Any:
        cache = caches.init(cfg, 1, 16)
        for piece in (slice(0, 7), slice(7, 10)):
            index_BT = jnp.arange(piece.start, piece.stop, dtype=jnp.int32)[None]
            cache = model.apply(cfg, params, cache, tokens_BT=tokens_BT[:, piece], index_BT=index_BT).cache
        return [state.summaries for state in cache]

    for summaries in read(model.parameters(model.BASE), model.TOKENS[:1, :10]):
        assert np.abs(summaries).max(axis=(0, 2, 3)).astype(bool).tolist() == [True, True, False, False]
