"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import weights
from lm.caches.base import State
from lm.errors import UserError
from lm.layer import LayerInputs, LayerOut
from lm.mixers.attended import attended
from lm.mixers.base import Mixer
from lm.plug import Model, bounded
from lm.positions.base import Positions
from lm.weights.project import Project
from lm.weights.weight import param

LATENT, UP, OUT = ("embed", "latent"), ("latent", "heads", "head_dim"), ("heads", "head_dim", "embed")


@dataclass(frozen=True)
class MLA(Mixer):
    """Keys and values of all heads are read out of one vector per token of `kv_rank` channels, which is normalised; a
    head's query and key have `nope_dim` channels that do not turn behind ``model.head_dim`` that do, the key's the same
    for every head. Values have `v_dim`.

    `q_rank`: queries are read out of a vector of so many, None = off the stream; `bias`: of the layers that make these
    vectors, and of the last one; `scale`: of the logits, None = ``(nope_dim + head_dim) ** -0.5``; `latent_eps`: of the
    vectors' norms, None = the model's. `backend`, `block_q`, `block_k`: as of `lm.mixers.softmax`.

    A cache keeps ``kv_rank + head_dim`` channels per token, which are key and value of every head at once: what reads
    keys and values out of them is moved to the other side of the products (section 2.1.2). Without a cache they are
    read out, which is cheaper where all queries come at once. Both give the same to rounding.
    """

    kv_rank: int = bounded(512, at_least=1)
    q_rank: int | None = bounded(None, at_least=1)
    nope_dim: int = bounded(128, at_least=1)
    v_dim: int = bounded(128, at_least=1)
    bias: bool = False
    scale: float | None = None
    latent_eps: float | None = None
    backend: Literal["auto", "dense", "blocked", "pallas"] = "auto"  # type: ignore[assignment]
    block_q: int | None = bounded(None, at_least=1)
    block_k: int | None = bounded(None, at_least=1)

    def check(self, cfg: Model) -> None:
        if cfg.kv_heads != cfg.n_heads:
            raise UserError(
                f"model.n_kv_heads: found {cfg.kv_heads}; mixer mla reads keys of every head out of one vector; valid: "
                f"{cfg.n_heads}, or None"
            )

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        return _Latent(cfg, name=name)

    def cache(self, cfg: Model, batch: int, capacity: int) -> State:
        turns = Leading(cfg.positions, cfg.head_width)
        kv_heads, width = self.key(cfg)
        kept = dataclasses.replace(cfg, n_kv_heads=kv_heads, head_dim=width, positions=turns, mixer=Mixer())
        state: State = cfg.cache.init(kept, batch, capacity)
        return state

    def key(self, cfg: Model) -> tuple[int, int]:
        return 1, self.kv_rank + cfg.head_width

    def between(self, cfg: Model, heads: int, kv_heads: int) -> float:
        # Queries (raw and turned), keys, all filled up to one width with values and what attention gives; the vectors
        # before and after their norms.
        wide = max(cfg.head_width + self.nope_dim, self.v_dim)
        return 5 * cfg.n_heads * wide / heads + cfg.head_width + 2 * self.kv_rank + 2 * (self.q_rank or 0)

    def flops(self, cfg: Model, start: int, tokens: int) -> float:
        read_out = cfg.head_width + self.nope_dim + self.v_dim
        width = cfg.head_width + 2 * self.kv_rank if start else read_out
        return 2 * cfg.n_heads * width * cfg.pattern.seen(start, tokens)

    def flops_per_token(self, cfg: Model, seq_len: int) -> float:
        return 2 * cfg.n_heads * (cfg.head_width + self.nope_dim + self.v_dim) * seq_len / 2


@dataclass(frozen=True)
class Leading(Positions):
    """Positions that enter the first `width` channels of queries and keys alone."""

    inner: Positions
    width: int

    def bind(self, cfg: Model) -> Self:
        return dataclasses.replace(self, inner=self.inner.bind(cfg))

    def rotate(self, x: jax.Array, positions: jax.Array, length: jax.Array | float) -> jax.Array:
        turned = self.inner.rotate(x[..., : self.width], positions, length)
        return jnp.concatenate([turned, x[..., self.width :]], axis=-1)

    def move(self, x: jax.Array, at: jax.Array, to: jax.Array, length: jax.Array | float) -> jax.Array:
        turned = self.inner.move(x[..., : self.width], at, to, length)
        return jnp.concatenate([turned, x[..., self.width :]], axis=-1)

    def bias(self, q_positions: jax.Array, k_positions: jax.Array, n_heads: int) -> jax.Array | None:
        return self.inner.bias(q_positions, k_positions, n_heads)

    def head_slopes(self, n_heads: int) -> tuple[float, ...] | None:
        return self.inner.head_slopes(n_heads)

    def frequencies(self, head_dim: int, length: jax.Array | float) -> jax.Array:
        return self.inner.frequencies(self.width, length)

    @property
    def rotary(self) -> bool:
        return self.inner.rotary

    @property
    def length_dependent(self) -> bool:
        return self.inner.length_dependent

    @property
    def scaling_name(self) -> str:
        return self.inner.scaling_name

    def known(self, cfg: Model) -> int:
        return self.inner.known(cfg)

    def fixed(self, key: str, who: str, does: str) -> None:
        self.inner.fixed(key, who, does)


class _Up(nn.Module):
    """A matrix ``[latent, heads, head_dim]`` that reads heads out of a vector, and what it is seen from a head."""

    width: int
    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array, how: Literal["out", "to latent", "from latent"] = "out") -> jax.Array:
        """``[B, T, latent] -> [B, T, H, width]``; or every head by itself, ``[B, T, H, width] -> [B, T, H, latent]``
        or the other way."""
        cfg = self.cfg
        shape = (cfg.mixer.kv_rank, cfg.n_heads, self.width)
        kernel = param(self, "kernel", nn.initializers.normal(cfg.init_std), shape, cfg.param_dtype, axes=UP, n_in=1)
        if how == "out":
            return weights.product(x, kernel, 1).reshape(*x.shape[:-1], *shape[1:])
        matrix = weights.dense(kernel).astype(x.dtype).reshape(shape)
        return jnp.einsum("bthd,rhd->bthr" if how == "to latent" else "bthr,rhd->bthd", x, matrix)


class _Latent(nn.Module):
    cfg: Model

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layer: LayerInputs, cache: State | None = None) -> LayerOut:
        cfg, a, watch = self.cfg, self.cfg.mixer, layer.watch
        D, H, turns = cfg.d_model, cfg.n_heads, cfg.head_width
        width = turns + a.nope_dim
        if a.q_rank is None:
            q = Project((D, H, width), 1, False, cfg, ("embed", *UP[1:]), name="q")(x_BTD, watch)
        else:
            narrow = Project((D, a.q_rank), 1, a.bias, cfg, LATENT, name="q_down")(x_BTD, watch)
            q = Project((a.q_rank, H, width), 1, False, cfg, UP, name="q_up")(self._normed("q_norm", narrow), watch)
        both = Project((D, turns + a.kv_rank), 1, a.bias, cfg, LATENT, name="kv_down")(x_BTD, watch)
        latent = self._normed("kv_norm", both[..., turns:])
        k_up, v_up = _Up(a.nope_dim, cfg, name="k_up"), _Up(a.v_dim, cfg, name="v_up")
        turned = both[:, :, None, :turns]
        if cache is None:
            k = jnp.concatenate([jnp.broadcast_to(turned, (*q.shape[:3], turns)), k_up(latent)], axis=-1)
            q, k, v = (_wide(x, max(width, a.v_dim)) for x in (q, k, v_up(latent)))
        else:
            q = jnp.concatenate([q[..., :turns], k_up(q[..., turns:], "to latent")], axis=-1)
            k = jnp.concatenate([turned, latent[:, :, None]], axis=-1)
            v = _wide(latent[:, :, None], k.shape[-1])
        scale = a.scale if a.scale is not None else width**-0.5
        positions = Leading(cfg.positions, turns).bind(cfg)
        out, state, new = attended(self, cfg, (q, k, v), positions, scale, layer, cache)
        out = out.astype(x_BTD.dtype)
        out = out[..., : a.v_dim] if cache is None else v_up(out[..., : a.kv_rank], "from latent")
        y = Project((H, a.v_dim, D), 2, a.bias, cfg, OUT, name="o")(out, watch)
        return LayerOut(y, state, fresh=None if layer.commit else new)

    def _normed(self, name: str, x_BTr: jax.Array) -> jax.Array:
        norm, eps = self.cfg.norm, self.cfg.mixer.latent_eps
        norm = norm if eps is None else dataclasses.replace(norm, eps=eps)
        normed: jax.Array = norm.module(self.cfg.param_dtype, name=name, axis="latent")(x_BTr)
        return normed


def _wide(x: jax.Array, width: int) -> jax.Array:
    """`x` with zeros behind its last axis."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))
