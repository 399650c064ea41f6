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

from lm import caches, compat, weights
from lm.attention.branches import Keys, Tokens
from lm.config import ModelConfig, merge, model_config
from lm.layer import LayerInputs
from lm.model import params as params_lib
from lm.model.inputs import Inputs
from lm.model.language_model import DecoderModel
from lm.objectives.forward import Forward

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
    return cfg.positions.length_dependent


@functools.cache
def parameters(cfg: ModelConfig) -> Params:
    """Random parameters, wide enough that attention is far from uniform."""
    with uncovered():
        tree = params_lib.init(cfg, jax.random.key(0))
        return jax.tree.map(lambda x: 8 * x if x.ndim >= 3 else x, tree)


def shapes(cfg: ModelConfig) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every parameter; compiles nothing."""
    return [(name, x.shape, str(x.dtype)) for name, x in params_lib.names(abstract(cfg)).items()]


def abstract(cfg: ModelConfig) -> Params:
    """Shapes and types of the parameters."""
    with uncovered():
        return params_lib.abstract(cfg)


def cast(params: Params, dtype: str) -> Params:
    """`params` rounded to `dtype`, in float32; compiles nothing."""
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float32), params)


def apply(cfg: ModelConfig, params: Params, cache: Any = None, **inputs: Any) -> Any:
    """The model's `Output`, in whatever program is being traced; `inputs`: fields of `lm.model.inputs.Inputs`."""
    return DecoderModel(cfg).apply(params, Inputs(**inputs), cache)


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
def both_backends(cfg: ModelConfig) -> Callable[[Params, np.ndarray], list[jax.Array]]:
    """Jitted ``(params, tokens_BT) -> [logits by dense, logits by blocked]``: one program."""
    configs = [backend(cfg, name) for name in ("dense", "blocked")]
    return jax.jit(lambda params, tokens_BT: [apply(c, params, tokens_BT=tokens_BT).logits_BTV for c in configs])


@functools.cache
def decoded(cfg: ModelConfig, pieces: tuple[int, ...]) -> Callable[..., jax.Array]:
    """Jitted ``(params, tokens_BT) -> logits_BTV`` through the cache: one program.

    `pieces`: how many tokens are read at a time; ``-n`` reads n of them one by one, in one loop.
    """

    def run(params: Params, tokens_BT: jax.Array) -> jax.Array:
        B, total = tokens_BT.shape[0], sum(abs(n) for n in pieces)
        index_BT = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (B, total))
        cache, at, got = caches.init(cfg, B, total), 0, []

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


@functools.cache
def splits(cfg: ModelConfig, T: int, piece: int) -> Callable[..., tuple[np.ndarray, ...]]:
    """Jitted ``(params, tokens_T, starts_N) -> (want_TV, first_NV, piece_NV, single_NTV)``: one program.

    ``want[t]`` are the logits of token t of the text that ends there. For every start n, a cache
    reads the first n tokens, left-padded to T; then `piece` tokens, or where fewer are left as much padding; then the
    others one by one, and padding: the last logits of each.
    """

    def run(params: Params, tokens_T: jax.Array, starts_N: jax.Array) -> tuple[jax.Array, ...]:
        at = jnp.arange(T)

        def read(index_T: jax.Array, cache: Any = None) -> tuple[jax.Array, Any]:
            rows = {"tokens_BT": tokens_T[jnp.clip(index_T, 0)][None], "index_BT": index_T[None]}
            out = apply(cfg, params, **rows, cache=cache)
            return out.logits_BTV[0, -1], out.cache

        def from_start(n: jax.Array) -> tuple[jax.Array, ...]:
            first, cache = read(jnp.maximum(at - (T - n), -1), caches.init(cfg, 1, 4 * T))
            fits = n + piece <= T
            of_piece, cache = read(jnp.where(fits, n + jnp.arange(piece), -1), cache)
            index_T = jnp.where(fits, n + piece, n) + at

            def one(cache: Any, i: jax.Array) -> tuple[Any, jax.Array]:
                of_token, cache = read(i[None], cache)
                return cache, of_token

            return first, of_piece, jax.lax.scan(one, cache, jnp.where(index_T < T, index_T, -1))[1]

        want = jax.lax.map(lambda n: read(jnp.maximum(at - (T - n), -1))[0], at + 1)
        return (want, *jax.lax.map(from_start, starts_N))

    program = jax.jit(run)
    return lambda *args: tuple(np.asarray(x) for x in program(*args))


def on_mesh(cfg: ModelConfig, params: Params, tokens_BT: np.ndarray) -> tuple[np.ndarray, int]:
    """Logits of rows cut over ``data 4 x tensor 2``, and on how many devices they came out."""
    mesh = compat.auto_mesh((4, 2), ("data", "tensor"))
    spec = jax.sharding.PartitionSpec
    with uncovered():  # a trace, which begins with a key
        axes = params_lib.axes(cfg).tree(params)

    def place(leaf: Any, names: tuple[str | None, ...]) -> Any:
        rules = (None if n is None else RULES.get(n) for n in names)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec(*rules)))

    with uncovered():
        sharded = jax.tree.map(place, params, axes)
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
    return fresh.lower(abstract(cfg), tokens).as_text()


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


# Mixers: one layer by itself, on a stream of its own.


def mixer(cfg: ModelConfig, params: Params, x_BTD: jax.Array, index_BT: jax.Array, **where: Any) -> tuple[Any, Any]:
    """``(y_BTD, state)`` of the layer; `where`: ``segments_BT`` of packed rows, or the ``cache`` it goes on from."""
    tokens = Tokens(index_BT, index_BT.astype(jnp.float32), where.get("segments_BT"))
    layer = LayerInputs(tokens, jnp.max(tokens.positions_BT) + 1.0)
    out = cfg.mixer.module(cfg).apply({"params": params}, x_BTD, layer, where.get("cache"))
    return out.x, out.cache


def mixer_shapes(cfg: ModelConfig) -> Params:
    """Shapes of the layer's parameters."""
    x = jax.ShapeDtypeStruct((1, 1, cfg.d_model), jnp.float32)

    def init(x: jax.Array) -> Any:
        index = jnp.zeros((1, 1), jnp.int32)
        layer = LayerInputs(Tokens(index, index.astype(jnp.float32)), jnp.ones(()))
        return cfg.mixer.module(cfg).init(jax.random.key(0), x, layer, None)

    with uncovered():
        return dict(jax.eval_shape(init, x))["params"]


def mixer_state(cfg: ModelConfig, batch: int, capacity: int) -> Any:
    """The layer's empty state."""
    return caches.init(changed(cfg, {"n_layers": 1}), batch, capacity)[0]


# Caches: a layer's keys and values, by themselves.


def stored(
    plug: Any, pieces: tuple[int, ...], heads: int, width: int, drafted: bool = False
) -> Callable[..., tuple[list[Any], Any]]:
    """Jitted ``(k_BTKd, v_BTKd, index_BT) -> (seen, kept)``: one program.

    `plug`: of `lm.caches`. `seen`: after every piece the (keys, values, index) that its queries may see; of ``-n``
    tokens one by one, in one loop, those of each, along a leading axis. `kept`: what the last token finds.
    `drafted`: pieces behind the first are read with a wrong token before each of theirs, and theirs are committed.
    """

    def run(k_BTKd: jax.Array, v_BTKd: jax.Array, index_BT: jax.Array) -> tuple[list[Any], Any]:
        cfg = changed(BASE, {"n_heads": heads, "n_kv_heads": heads, "head_dim": width, "positions": "nope"})
        state, at, seen = plug.init(cfg, *index_BT.shape), 0, []

        def step(state: Any, new: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
            k, v, index = new
            state, (found,) = state.extend(Keys(k, v, Tokens(index, index.astype(jnp.float32)), rotated=True))
            return state, (found.k_BSKd, found.v_BSKd, found.tokens.index_BT)

        def draft(state: Any, new: tuple[jax.Array, ...]) -> tuple[Any, None]:
            k, v, index = (jnp.stack([-x if x.dtype == jnp.float32 else x, x], 2).reshape(x.shape[0], -1, *x.shape[2:])
                           for x in new)  # fmt: skip
            keys = Keys(k, v, Tokens(index, index.astype(jnp.float32)), rotated=True)
            state.read(keys)
            live_BT = new[2] >= 0
            path_BP = 1 + 2 * jnp.argsort(~live_BT, axis=1, stable=True)
            (state,) = caches.commit((state,), (keys,), path_BP, live_BT.sum(1))
            return state, None

        for n in pieces:
            new = tuple(x[:, at : at + abs(n)] for x in (k_BTKd, v_BTKd, index_BT))
            if n > 1 and at and drafted:
                state, got = draft(state, new)
            elif n > 0:
                state, got = step(state, new)
            else:
                state, got = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1)[:, :, None] for x in new))
            seen.append(got)
            at += abs(n)
        return seen, jax.tree.map(lambda x: x[-1] if pieces[-1] < 0 else x, seen[-1])

    program = jax.jit(run)
    return lambda *args: jax.tree.map(np.asarray, program(*args))


# Objectives and surgery.


def loss_and_gradient(cfg: ModelConfig, objective: Any) -> Callable[[Params, dict[str, Any]], Any]:
    """Jitted ``(params, batch) -> ((loss, sums), gradients)``: one program per set of inputs."""

    def loss(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        out = objective.loss(Forward(DecoderModel(cfg), params), batch)
        return out.loss, out.sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def many_logits(cfg: ModelConfig, tokens_BT: np.ndarray, *trees: Params) -> list[np.ndarray]:
    """Logits by each of several trees of parameters: one program."""
    run = jax.jit(lambda trees: [apply(cfg, p, tokens_BT=jnp.asarray(tokens_BT)).logits_BTV for p in trees])
    return [np.asarray(x, np.float64) for x in run(trees)]


def named(params: Params) -> dict[str, Any]:
    """Parameters by name; weights that are no plain arrays stay whole."""
    return params_lib.names(params)


def dense(leaf: Any) -> np.ndarray:
    """What a weight of any kind stands for."""
    return np.asarray(weights.dense(leaf), np.float64)


def densified(params: Params) -> Params:
    """`params` with plain arrays."""
    return jax.tree.map(weights.dense, params, is_leaf=weights.special)
