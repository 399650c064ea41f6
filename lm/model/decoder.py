"""The decoder every method runs on: embed -> blocks -> norm -> head.

Read this file first. It names no method: what a layer sees, how positions enter, how channels mix and what the head
computes are plugs of the configuration (`lm.config.ModelConfig`). Everything that is not a parameter is an argument
and a result. Letters: B batch, T tokens, D model width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import weights
from lm.attention.branches import Tokens
from lm.config import ModelConfig
from lm.ffn.context import Call
from lm.model import reports
from lm.sharding import constrain, gather_after, run_stack, shard_stream
from lm.weights.lookup import lookup

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """`logits_BTV` float32 (None when not asked for), `hidden_BTD` after the final norm, the new `cache`,
    `taps_LBTD`, the residual stream after every layer (None when not asked for), `records`, for every layer what its
    plugs recorded of the last tokens (None when not asked for), and `reports`, what each layer says beside its output
    (`lm.model.reports`)."""

    logits_BTV: jax.Array | None
    hidden_BTD: jax.Array
    cache: Any = None
    taps_LBTD: jax.Array | None = None
    records: tuple[dict[str, Any], ...] | None = None
    reports: tuple[dict[str, Any], ...] = ()


class Block(nn.Module):
    """Pre-norm residual block, sequential or parallel (GPT-NeoX)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens: Tokens, length: jax.Array, cache: Any, call: Call) -> Any:
        """The new stream, the layer's cache, and its report."""
        cfg = self.cfg
        normed = shard_stream(cfg.norm.module(cfg.param_dtype, name="attn_norm")(x_BTD), inside=True)
        mixed, cache = cfg.mixer.module(cfg, name="attn")(normed, tokens, length, cache)
        mixed = shard_stream(mixed)
        after = x_BTD if cfg.parallel_residual else x_BTD + mixed
        normed = shard_stream(cfg.norm.module(cfg.param_dtype, name="ffn_norm")(after), inside=True)
        ffn, report = cfg.ffn.module(cfg, name="ffn"), {}
        if getattr(cfg.ffn, "reports", False):
            out, report = ffn(normed, call)
        else:
            out = ffn(normed)
        y_BTD = after + out
        y_BTD = y_BTD + mixed if cfg.parallel_residual else y_BTD
        return constrain(y_BTD, "batch", "stream", None), cache, report


class Decoder(nn.Module):
    """A decoder-only language model; ``Decoder(cfg).apply({"params": p}, tokens)``.

    Layers of equal parameter shapes are stored stacked (``blocks``, leading axis L) whatever plugs run on them, so
    configurations that differ only in training-free plugs share one parameter tree; otherwise ``blocks_0 … L-1``.
    The second layout is taken for the first where it is given (`lm.model.params.unstack`): decoding copies no slices.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array | None = None,
        *,
        embeddings_BTD: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        index_BT: jax.Array | None = None,
        cache: Any = None,
        logits: bool = True,
        taps: bool = False,
        records: int = 0,
        on_layer: Callable[[], None] | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """Runs the model on int32 `tokens_BT` or on `embeddings_BTD`.

        `index_BT` int32 counts tokens within their document (default 0, 1, …; negative = padding); `positions_BT`
        float32 are the rotary positions (default: the index); `segments_BT` int32 keeps packed documents apart.
        `cache` (from `lm.caches.init`) extends earlier calls; give `index_BT` then. `records` asks for what
        plugs record (collection ``records``, arrays ``[B, T, …]``) of the last so many tokens. `on_layer` is called on
        the host after every layer (progress bars). `key` is given in training: layers that are random, or follow
        another rule there, go by it.
        """
        if (tokens_BT is None) == (embeddings_BTD is None):
            raise ValueError("give either tokens_BT or embeddings_BTD")
        if cache is not None and (index_BT is None or segments_BT is not None):
            raise ValueError("with a cache, index_BT is needed and segments_BT is not supported")
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        table = weights.param(self, "embed", _embed_init(cfg), (cfg.vocab_size, cfg.d_model), cfg.param_dtype)
        if embeddings_BTD is None:
            assert tokens_BT is not None
            embeddings_BTD = lookup(table, tokens_BT, dtype)
        x = constrain(embeddings_BTD.astype(dtype), "batch", "length", None)
        x = x if cfg.embed_scale == 1.0 else x * jnp.asarray(cfg.embed_scale, dtype)
        seq = _tokens(x.shape[:2], index_BT, positions_BT, segments_BT)
        length = jnp.max(jnp.where(seq.index_BT >= 0, seq.positions_BT, 0.0)) + 1.0
        if cfg.positions.table_size:
            shape = (cfg.positions.table_size, cfg.d_model)
            learned = weights.param(self, "pos_embed", _embed_init(cfg), shape, cfg.param_dtype)
            rows = jnp.clip(jnp.floor(seq.positions_BT), 0, shape[0] - 1).astype(jnp.int32)
            x = x + weights.rows(learned, rows).astype(dtype)
        call = Call(seq.index_BT, tokens_BT, key, taps)
        x = shard_stream(x)
        x, cache, streams, seen, reports = self._blocks(x, seq, length, cache, call, records, on_layer)
        x = shard_stream(cfg.norm.module(cfg.param_dtype, name="final_norm")(x), inside=True)
        head = cfg.head.module(cfg, name="head")
        out = head(x, table) if logits or self.is_initializing() else None
        return Output(out if logits else None, x, cache, streams, seen if records else None, reports)

    def _blocks(self, x: Any, seq: Tokens, length: Any, cache: Any, call: Call, records: int, on_layer: Any) -> Any:
        """(x, cache, streams, records, reports)."""
        layers, taps = self.cfg.layers(), call.taps
        streams: list[Any] = []
        seen: list[Any] = []
        caches: list[Any] = []
        told: list[dict[str, Any]] = []
        keys = None if call.key is None else jax.random.split(call.key, len(layers))
        params, stacked = self._block_params(x.shape, layers)
        rows = (seq, dataclasses.replace(call, key=None))
        start, before = 0, x
        for n in _runs(layers, self.cfg.scan_layers and stacked and cache is None):
            cfg = layers[start]

            def layer(x: Any, rows: Any, p: Params, key: Any, c: Any = None, cfg: ModelConfig = cfg) -> Any:
                seq, call = rows
                (x, c, report), made = Block(cfg).apply(
                    {"params": p},
                    *(x, seq, length, c, dataclasses.replace(call, key=key)),
                    mutable=["records"] if records else [],
                )
                if on_layer is not None:
                    jax.debug.callback(lambda _: on_layer(), x[0, -1, 0])
                return x, c, jax.tree.map(lambda leaf: leaf[:, -records:], made.get("records", {})), report

            step = jax.checkpoint(layer, prevent_cse=n == 1) if cfg.remat else layer
            if n > 1:
                run = jax.tree.map(lambda p, a=start, b=start + n: p[a:b], params)

                def body(x: Any, rows: Any, of_layer: Any, step: Any = step) -> Any:
                    y, _, *said = step(x, rows, *of_layer)
                    return y, (y if taps else None, *said)

                stack = (run, None if keys is None else keys[start : start + n])
                x, (ys, *many) = run_stack(body, x, rows, stack, reports.merge_microbatches)
                streams.append(ys)
                for said, all_of in zip((seen, told), many, strict=True):
                    said += [jax.tree.map(lambda a, i=i: a[i], all_of) for i in range(n)]
            else:
                p = jax.tree.map(lambda p, i=start: p[i], params) if stacked else params[start]
                key = None if keys is None else keys[start]
                p, before = p if stacked else gather_after(p, before), x
                x, c, made, report = step(x, rows, p, key, None if cache is None else cache[start])
                streams.append(x[None])
                caches.append(c)
                seen.append(made)
                told.append(report)
            start += n
        streams_LBTD = jnp.concatenate(streams) if taps else None
        return x, tuple(caches) if cache is not None else None, streams_LBTD, tuple(seen), tuple(told)

    def _block_params(self, shape: tuple[int, ...], layers: tuple[ModelConfig, ...]) -> tuple[Any, bool]:
        """All layers' parameters, declared here: one stacked tree, or one tree per layer where shapes differ."""
        x = jnp.zeros((1, 1, shape[-1]), self.cfg.dtype)
        seq = _tokens((1, 1), None, None, None)
        call = Call(seq.index_BT, seq.index_BT)

        def init(cfg: ModelConfig, rng: jax.Array) -> Params:
            return dict(Block(cfg).init(rng, x, seq, jnp.ones(()), None, call))["params"]

        probe = jax.random.key(0)
        shapes = [jax.eval_shape(lambda r, c=c: init(c, r), probe) for c in dict.fromkeys(layers)]
        if all(s == shapes[0] for s in shapes) and not self.has_variable("params", "blocks_0"):
            first = layers[0]
            many = lambda rng: jax.vmap(lambda r: init(first, r))(jax.random.split(rng, len(layers)))  # noqa: E731
            return weights.param(self, "blocks", many), True
        return [weights.param(self, f"blocks_{i}", lambda r, c=c: init(c, r)) for i, c in enumerate(layers)], False


def readout(cfg: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits float32 ``[..., V]`` of final hidden states ``[..., D]``: the head alone, for callers going by pieces."""
    return cfg.head.module(cfg).apply({"params": params.get("head", {})}, hidden, params["embed"])


def _embed_init(cfg: ModelConfig) -> Any:
    return nn.initializers.normal(cfg.init_std)


def _tokens(shape: tuple[int, ...], index: Any, positions: Any, segments: Any) -> Tokens:
    contiguous = index is None and segments is None
    if index is None:
        index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        if segments is not None:  # count from the start of each document
            new = jnp.concatenate([jnp.ones_like(segments[:, :1]), jnp.diff(segments)], 1) != 0
            index = index - jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    positions = index.astype(jnp.float32) if positions is None else positions.astype(jnp.float32)
    return Tokens(index, positions, segments, contiguous)


def _runs(layers: tuple[ModelConfig, ...], scan: bool) -> list[int]:
    """Lengths of the runs of equal consecutive layers (all 1 when not scanning)."""
    runs: list[int] = []
    for i, cfg in enumerate(layers):
        if scan and i and cfg == layers[i - 1]:
            runs[-1] += 1
        else:
            runs.append(1)
    return runs
