"""The one place where the generic suites touch the model: a baseline, random parameters, and every program they run.

A function that gives a program is memoised by configuration: classes whose configurations are equal share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from programs import uncovered

from lm import caches, compat
from lm.config import ModelConfig, merge, model_config
from lm.model import params as params_lib
from lm.model.decoder import Decoder

Params = dict[str, Any]
T = 44  # not a multiple of the blocks
BASE = model_config(
    {
        "vocab_size": 61,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 48,
        "max_positions": 32,
        "mixer": {"name": "softmax", "backend": "dense", "block_q": 16, "block_k": 12},
    }
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, T))
RULES = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}  # logical axis -> mesh axis


def changed(cfg: ModelConfig, change: Mapping[str, object]) -> ModelConfig:
    """`cfg` with a nested mapping of changes."""
    return merge(cfg, change, "model")


def backend(cfg: ModelConfig, name: str) -> ModelConfig:
    return changed(cfg, {"mixer": {"backend": name}})


def length_dependent(cfg: ModelConfig) -> bool:
    """Whether a text's end changes how its beginning is rotated."""
    return caches.needs_raw_keys(cfg)


@functools.cache
def parameters(cfg: ModelConfig) -> Params:
    """Random parameters, wide enough that attention is far from uniform."""
    with uncovered():
        tree = params_lib.init(cfg, jax.random.key(0))
        return jax.tree.map(lambda x: 8 * x if x.ndim >= 3 else x, tree)


def shapes(cfg: ModelConfig) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every parameter; compiles nothing."""
    return [(name, x.shape, str(x.dtype)) for name, x in params_lib.names(params_lib.abstract(cfg)).items()]


def cast(params: Params, dtype: str) -> Params:
    """`params` rounded to `dtype`, in float32; compiles nothing."""
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float32), params)


def apply(cfg: ModelConfig, params: Params, **inputs: Any) -> Any:
    """The model's `Output`, in whatever program is being traced."""
    return Decoder(cfg).apply({"params": params}, **inputs)


@functools.cache
def forward(cfg: ModelConfig) -> Callable[..., Any]:
    """Jitted ``(params, **inputs) -> Output``."""
    return jax.jit(lambda params, **inputs: apply(cfg, params, **inputs))


def logits(cfg: ModelConfig, params: Params | None = None, **inputs: Any) -> np.ndarray:
    """Float64 ``[B, T, V]`` by `forward`; one program per set and shape of inputs."""
    params = parameters(cfg) if params is None else params
    out = forward(cfg)(params, **{k: np.asarray(v) for k, v in inputs.items()})
    return np.asarray(out.logits_BTV, np.float64)


def read(cfg: ModelConfig, params: Params, tokens_BT: np.ndarray, index_BT: np.ndarray, segments_BT: Any) -> np.ndarray:
    """Float64 logits of packed or padded rows; always the same program where the shape is the same."""
    rows = {"tokens_BT": tokens_BT, "index_BT": index_BT, "segments_BT": segments_BT}
    return logits(cfg, params, **{k: np.asarray(v, np.int32) for k, v in rows.items()})


@functools.cache
def gradient(cfg: ModelConfig) -> Callable[[Params], Any]:
    """Jitted ``params -> ((loss, logits), gradients)`` of a loss that weighs every logit differently."""

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        out = apply(cfg, params, tokens_BT=jnp.asarray(TOKENS)).logits_BTV
        return jnp.sin(5 * out).mean(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def both_backends(cfg: ModelConfig) -> Callable[[Params], list[jax.Array]]:
    """Jitted ``params -> [logits by dense, logits by blocked]``: one program."""
    configs = [backend(cfg, name) for name in ("dense", "blocked")]
    return jax.jit(lambda params: [apply(c, params, tokens_BT=jnp.asarray(TOKENS)).logits_BTV for c in configs])


@functools.cache
def decoded(cfg: ModelConfig, pieces: tuple[int, ...], plug: Any = None) -> Callable[..., jax.Array]:
    """Jitted ``(params, tokens_BT) -> logits_BTV`` through the cache: one program.

    `pieces`: how many tokens are read at a time; ``-n`` reads n of them one by one, in one loop. `plug`: the cache.
    """

    def run(params: Params, tokens_BT: jax.Array) -> jax.Array:
        B, total = tokens_BT.shape[0], sum(abs(n) for n in pieces)
        index_BT = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (B, total))
        cache, at, got = caches.init(cfg, B, total, plug), 0, []

        def step(cache: Any, rows: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            out = apply(cfg, params, tokens_BT=rows[0], index_BT=rows[1], cache=cache)
            return out.cache, out.logits_BTV

        for n in pieces:
            part = slice(at, at + abs(n))
            rows = (tokens_BT[:, part], index_BT[:, part])
            if n > 0:
                cache, logits_BTV = step(cache, rows)
            else:
                cache, many = jax.lax.scan(step, cache, tuple(x.T[:, :, None] for x in rows))
                logits_BTV = many[:, :, 0].swapaxes(0, 1)
            got.append(logits_BTV)
            at += abs(n)
        return jnp.concatenate(got, axis=1)

    return jax.jit(run)


def on_mesh(cfg: ModelConfig, params: Params, tokens_BT: np.ndarray) -> tuple[np.ndarray, int]:
    """Logits of rows cut over ``data 4 x tensor 2``, and on how many devices they came out."""
    mesh = compat.auto_mesh((4, 2), ("data", "tensor"))
    spec = jax.sharding.PartitionSpec
    path_axes = params_lib.axes(params)

    def place(path: Any, leaf: Any) -> Any:
        names = path_axes
        for key in path:
            names = names[key.key]
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec(*(RULES.get(n) for n in names))))

    with uncovered():
        sharded = jax.tree_util.tree_map_with_path(place, params)
        batch = jax.device_put(np.asarray(tokens_BT, np.int32), jax.sharding.NamedSharding(mesh, spec("data")))
    out = forward(cfg)(sharded, tokens_BT=batch).logits_BTV
    return np.asarray(out, np.float64), len(out.sharding.device_set)


def influence(cfg: ModelConfig, params: Params, t: int) -> np.ndarray:
    """Float ``[T]``: how much the embedding of each token can change the logits of token `t`."""

    def f(x_BTD: jax.Array) -> jax.Array:
        return jnp.abs(apply(cfg, params, embeddings_BTD=x_BTD).logits_BTV[0, t]).sum()

    x = np.random.default_rng(1).normal(size=(1, T, BASE.d_model)).astype(np.float32)
    return np.abs(np.asarray(jax.jit(jax.grad(f))(x)))[0].sum(-1)


def program(cfg: ModelConfig) -> str:
    """The text of the model's program, traced anew; compiles nothing."""
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    fresh = jax.jit(lambda p, t: apply(cfg, p, tokens_BT=t).logits_BTV)
    return fresh.lower(params_lib.abstract(cfg), tokens).as_text()


def without_jit(cfg: ModelConfig, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits operation by operation, which takes seconds."""
    with jax.disable_jit(), uncovered():
        return np.asarray(apply(cfg, params, tokens_BT=jnp.asarray(tokens_BT)).logits_BTV)


def rms_ratio(got: Any, want: Any) -> float:
    """Root mean square of the error over that of the reference; a reference of zeros asks for zeros."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    if not want.any():
        return float("inf") if got.any() else 0.0
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def gradients_by_name(tree: Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in params_lib.names(tree).items()}
