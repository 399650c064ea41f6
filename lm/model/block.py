"""One block: the mixer and the feed-forward layer, with norms, around the residual stream."""

from __future__ import annotations

import flax.linen as nn
import jax

from lm.caches.base import State
from lm.config import ModelConfig
from lm.layer import LayerInputs, LayerOut
from lm.sharding.layout import constrain, shard_stream


class Block(nn.Module):
    """A residual block. Its norms stand on what the layers read, ``attn_norm`` and ``ffn_norm`` (pre-norm), on what
    they give, ``attn_out_norm`` and ``ffn_out_norm`` (OLMo 2, arXiv 2501.00656), or on both (Gemma 2, 2408.00118)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer: LayerInputs, cache: State | None = None) -> LayerOut:
        cfg = self.cfg
        mix, feed = cfg.mixer.module(cfg, name="attn"), cfg.ffn.module(cfg, name="ffn")
        mixed: LayerOut = mix(self._read("attn", x_BTD), layer, cache)
        y_BTD, fed = (parallel if cfg.parallel_residual else sequential)(
            self, x_BTD, self._given("attn", shard_stream(mixed.x)), layer, feed
        )
        return LayerOut(constrain(y_BTD, "batch", "stream", None), mixed.cache, fed.report, mixed.fresh)

    def _read(self, part: str, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.cfg.norm_place == "output" else self._normed(f"{part}_norm", x_BTD)

    def _given(self, part: str, y_BTD: jax.Array) -> jax.Array:
        return y_BTD if self.cfg.norm_place == "input" else self._normed(f"{part}_out_norm", y_BTD)

    def _normed(self, name: str, x_BTD: jax.Array) -> jax.Array:
        norm = self.cfg.norm.module(self.cfg.param_dtype, name=name)
        normed: jax.Array = shard_stream(norm(x_BTD), inside=True)
        return normed


def sequential(
    block: Block, x_BTD: jax.Array, mixed_BTD: jax.Array, layer: LayerInputs, feed: nn.Module
) -> tuple[jax.Array, LayerOut]:
    """The feed-forward layer reads the stream with the mixer's output added."""
    after = x_BTD + mixed_BTD
    fed: LayerOut = feed(block._read("ffn", after), layer)
    return after + block._given("ffn", fed.x), fed


def parallel(
    block: Block, x_BTD: jax.Array, mixed_BTD: jax.Array, layer: LayerInputs, feed: nn.Module
) -> tuple[jax.Array, LayerOut]:
    """Both layers read the same stream (GPT-NeoX, arXiv 2204.06745, section 2.1)."""
    fed: LayerOut = feed(block._read("ffn", x_BTD), layer)
    return x_BTD + block._given("ffn", fed.x) + mixed_BTD, fed
