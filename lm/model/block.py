"""One block: the mixer and the feed-forward layer, each behind a norm, around the residual stream."""

from __future__ import annotations

import flax.linen as nn
import jax

from lm.caches.base import State
from lm.config import ModelConfig
from lm.layer import LayerInputs, LayerOut
from lm.sharding.layout import constrain, shard_stream


class Block(nn.Module):
    """A pre-norm residual block."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer: LayerInputs, cache: State | None = None) -> LayerOut:
        cfg = self.cfg
        mix, feed = cfg.mixer.module(cfg, name="attn"), cfg.ffn.module(cfg, name="ffn")
        mixed: LayerOut = mix(self._normed("attn_norm", x_BTD), layer, cache)
        y_BTD, fed = (parallel if cfg.parallel_residual else sequential)(
            self, x_BTD, shard_stream(mixed.x), layer, feed
        )
        return LayerOut(constrain(y_BTD, "batch", "stream", None), mixed.cache, fed.report, mixed.fresh)

    def _normed(self, name: str, x_BTD: jax.Array) -> jax.Array:
        norm = self.cfg.norm.module(self.cfg.param_dtype, name=name)
        normed: jax.Array = shard_stream(norm(x_BTD), inside=True)
        return normed


def sequential(
    block: Block, x_BTD: jax.Array, mixed_BTD: jax.Array, layer: LayerInputs, feed: nn.Module
) -> tuple[jax.Array, LayerOut]:
    """The feed-forward layer reads the stream with the mixer's output added."""
    after = x_BTD + mixed_BTD
    fed: LayerOut = feed(block._normed("ffn_norm", after), layer)
    return after + fed.x, fed


def parallel(
    block: Block, x_BTD: jax.Array, mixed_BTD: jax.Array, layer: LayerInputs, feed: nn.Module
) -> tuple[jax.Array, LayerOut]:
    """Both layers read the same stream (GPT-NeoX, arXiv 2204.06745, section 2.1)."""
    fed: LayerOut = feed(block._normed("ffn_norm", x_BTD), layer)
    return x_BTD + fed.x + mixed_BTD, fed
