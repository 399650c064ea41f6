"""Where the time of our training step goes: each piece alone, forward and gradient, at the sizes of the benchmark.

Run by ``python -m benchmarks.train_step --pieces``. Pieces are compiled apart, so their sum differs from the step's
time by what the compiler fuses across them; the shares are what to read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.attention.attend import attend
from lm.attention.branches import Context, Keys, Tokens
from lm.config import ModelConfig
from lm.heads.base import Targets
from lm.layer import LayerInputs
from lm.model.language_model import DecoderModel
from lm.objectives.likelihood import head_loss


def measure(cfg: ModelConfig, params: Any, update: Callable[[], Any], batch: int, length: int, rounds: int = 9) -> Any:
    """``{piece: milliseconds per step}``, medians over turns that all pieces take; `update` is the optimizer alone."""
    rng = np.random.default_rng(0)
    B, T, D, L = batch, length, cfg.d_model, cfg.n_layers
    K, d = cfg.kv_heads, cfg.head_width

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.dtype(cfg.dtype))

    x, ids = draw(B, T, D), jnp.asarray(rng.integers(0, cfg.vocab_size, (B, T)), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    tokens, end = Tokens(index, index.astype(jnp.float32), contiguous=True), jnp.asarray(float(T))
    block = jax.tree.map(lambda p: p[0], params["blocks"])
    positions = cfg.positions.bind(cfg)

    def softmax(q: Any, k: Any, v: Any) -> Any:
        ctx = Context(q, tokens, (Keys(k, v, tokens),), positions, end, d**-0.5)
        return attend(ctx, cfg.pattern.branches(ctx))[0]

    def attention(p: Any, x: Any) -> Any:
        return cfg.mixer.module(cfg).apply({"params": p}, x, LayerInputs(tokens, end)).x

    def ffn(p: Any, x: Any) -> Any:
        return cfg.ffn.module(cfg).apply({"params": p}, x, LayerInputs(tokens, end)).x

    def norm(p: Any, x: Any) -> Any:
        return cfg.norm.module(cfg.param_dtype).apply({"params": p}, x)

    def head(p: Any, x: Any) -> Any:
        return head_loss(DecoderModel(cfg), p, Targets(x, ids, jnp.ones((B, T))))[0]

    top = {name: params[name] for name in ("embed", "head") if name in params}
    pieces: dict[str, tuple[int, Any, tuple[Any, ...]]] = {
        "softmax attention with rotation": (
            L,
            softmax,
            (draw(B, T, cfg.n_heads, d), draw(B, T, K, d), draw(B, T, K, d)),
        ),
        "attention layer": (L, attention, (block["attn"], x)),
        "feed-forward layer": (L, ffn, (block["ffn"], x)),
        "norm": (2 * L + 1, norm, (block["ffn_norm"], x)),
        "head and cross-entropy": (1, head, (top, x)),
        "embedding": (1, lambda table: table[ids], (params["embed"],)),
    }
    runs: dict[str, tuple[int, Callable[[], Any]]] = {}
    for name, (count, f, args) in pieces.items():
        runs[name] = (count, _forward_and_gradient(f, args))
    runs["optimizer"] = (1, update)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):  # two to compile and warm up
        for name, (count, run) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn > 1:
                times[name].append(count * 1e3 * (time.perf_counter() - start))
    out = {name: statistics.median(t) for name, t in times.items()}
    inner = out.pop("softmax attention with rotation")
    layer = out.pop("attention layer")
    return {"softmax attention with rotation": inner, "projections around it": max(layer - inner, 0.0), **out}


def _forward_and_gradient(f: Any, args: tuple[Any, ...]) -> Callable[[], Any]:
    shape = jax.eval_shape(f, *args)
    ones = jnp.ones(shape.shape, shape.dtype)

    @jax.jit
    def run(args: Any, ones: Any) -> Any:
        out, pull = jax.vjp(f, *args)
        return out, pull(ones)

    return lambda: run(args, ones)
