"""Parameter names, logical axes, counts. Parameters are a plain nested dict; axes live in a parallel tree."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.decoder import Decoder
from lm.ffn import glu, moe
from lm.heads import linear
from lm.mixers import attention

# Longest matching suffix wins; plugs with new parameters add their own table here.
AXES: dict[str, tuple[str, ...]] = {
    "embed": ("vocab", "embed"),
    "pos_embed": ("positions", "embed"),
    "scale": ("embed",),
    "bias": ("embed",),
    **attention.AXES,
    **glu.AXES,
    **moe.AXES,
    **linear.AXES,
}


def init(cfg: ModelConfig, rng: jax.Array) -> dict[str, Any]:
    """Random parameters as a plain nested dict."""
    return dict(_init(cfg)(rng))["params"]


@functools.lru_cache(maxsize=32)
def _init(cfg: ModelConfig) -> Any:
    """Compiled once per model."""
    return jax.jit(lambda rng: Decoder(cfg).init(rng, jnp.zeros((1, 1), jnp.int32)))


def abstract(cfg: ModelConfig) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`; allocates nothing."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return dict(jax.eval_shape(Decoder(cfg).init, jax.random.key(0), tokens))["params"]


def names(params: Any) -> dict[str, Any]:
    """``{"blocks/attn/q/kernel": leaf, …}``."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in flat}


def axes(params: Any) -> Any:
    """The tree of logical axis names, one tuple per leaf; stacked blocks lead with ``layers``."""

    def one(path: Any, leaf: Any) -> tuple[str, ...]:
        found = logical(path)
        if not found:
            parts = [str(getattr(k, "key", k)) for k in path]
            raise KeyError(f"no logical axes for parameter {'/'.join(parts)}; add them to lm.params.AXES")
        return found

    return jax.tree_util.tree_map_with_path(one, params)


def logical(path: Any) -> tuple[str, ...]:
    """The logical axis names of the leaf at a tree path; empty for a name that no table knows."""
    parts = [str(getattr(k, "key", k)) for k in path]
    suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
    found = next((AXES[s] for s in suffixes if s in AXES), ())
    return ("layers", *found) if found and parts[0] == "blocks" else found


def names_of_axes(params: Any) -> dict[str, str]:
    """``{"blocks/attn/q/kernel": "layers, embed, heads, head_dim", …}``."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(str(k.key) for k in path): ", ".join(logical(path)) for path, _ in flat}


def stacks(params: Any) -> Any:
    """How many leading axes of each leaf stack tensors (layers, experts) rather than belong to one; 0 for foreign
    names, so that any tree is accepted."""

    def one(path: Any, leaf: Any) -> int:
        return sum(name in ("layers", "experts") for name in logical(path))

    return jax.tree_util.tree_map_with_path(one, params)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters with one tree per layer (``blocks_0 … L-1``) in place of stacked ``blocks``.

    For decoding: a one-token step reads every weight once, and slicing a stack would copy it first. Training and
    long forward passes want the stack, which compiles one layer instead of L.
    """
    if "blocks" not in params:
        return params
    rest = {k: v for k, v in params.items() if k != "blocks"}
    n = jax.tree.leaves(params["blocks"])[0].shape[0]
    return rest | {f"blocks_{i}": jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(n)}


def count(params: Any) -> int:
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
