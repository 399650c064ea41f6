"""Parameter names, logical axes, counts. Parameters are a plain nested dict; axes live in a parallel tree."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import weights
from lm.config import ModelConfig
from lm.ffn import glu
from lm.ffn.moe import plug as moe
from lm.heads import fourier, linear, mixture
from lm.mixers import softmax as attention
from lm.model.decoder import Decoder
from lm.weights.project import Project

STACKING = ("layers", "experts")  # axes that number tensors rather than belong to one

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
    **fourier.AXES,
    **mixture.AXES,
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
    return jax.tree.map(lambda leaf: leaf, _abstract(cfg))  # a copy, which the caller may change


@functools.lru_cache(maxsize=64)
def _abstract(cfg: ModelConfig) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return dict(jax.eval_shape(Decoder(cfg).init, jax.random.key(0), tokens))["params"]


def names(params: Any) -> dict[str, Any]:
    """``{"blocks/attn/q/kernel": leaf, …}``."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=weights.special)[0]
    return {"/".join(_parts(path)): leaf for path, leaf in flat}


def _parts(path: Any) -> list[str]:
    return [str(getattr(k, "key", k)) for k in path]


def axes(params: Any) -> Any:
    """The tree of logical axis names, one tuple per leaf; stacked blocks lead with ``layers``."""

    def one(path: Any, leaf: Any) -> tuple[str, ...]:
        found = logical(path)
        if not found:
            raise KeyError(f"no logical axes for parameter {'/'.join(_parts(path))}; add them to lm.model.params.AXES")
        return found

    return jax.tree_util.tree_map_with_path(one, params)


def logical(path: Any) -> tuple[str, ...]:
    """The logical axis names of the leaf at a tree path; empty for a name that no table knows."""
    parts = _parts(path)
    if parts and parts[-1] in weights.BELOW:
        return (*(n for n in logical(path[:-1]) if n in STACKING), *weights.BELOW[parts[-1]])
    suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
    found = next((AXES[s] for s in suffixes if s in AXES), ())
    return ("layers", *found) if found and parts[0] == "blocks" else found


def logical_of(name: str) -> tuple[str, ...]:
    """`logical` for a name as `names` gives it; ``KeyError`` for one that no table knows and that is not in a surgery's
    tree."""
    return logical(tuple(jax.tree_util.DictKey(part) for part in name.split("/")))


def owner(path: Any, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The parameter of `shapes` whose name is part of a tree path and whose shape is `shape`: the parameter itself, or
    what an optimizer keeps for it, below a name of its own (``mu/blocks/…/kernel``) or above one (``…/kernel/moment``).
    """
    parts = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    spans = ("/".join(parts[i:j]) for j in range(len(parts), 0, -1) for i in range(j))
    return next((name for name in spans if shapes.get(name) == tuple(shape)), None)


def names_of_axes(params: Any) -> dict[str, str]:
    """``{"blocks/attn/q/kernel": "layers, embed, heads, head_dim", …}``."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(_parts(path)): ", ".join(logical(path)) for path, _ in flat}


def stacks(params: Any) -> Any:
    """How many leading axes of each leaf stack tensors (layers, experts) rather than belong to one; 0 for foreign
    names, so that any tree is accepted."""

    def one(path: Any, leaf: Any) -> int:
        return sum(name in STACKING for name in logical(path))

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


def inputs(cfg: ModelConfig) -> dict[str, int]:
    """``{"blocks/attn/o/kernel": 2, …}``: how many axes of a linear layer's weight are summed over. Weights that other
    code reads (tables, a head's own matrix, experts) are not listed. Allocates nothing."""
    found: dict[str, int] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Project) and context.method_name == "__call__":
            found["/".join((*context.module.path, "kernel"))] = context.module.n_in
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        tree = _abstract.__wrapped__(cfg)
    inner = {name: re.sub(r"^blocks(_\d+)?/", "", name) for name in names(tree)}
    return {name: found[short] for name, short in inner.items() if short in found}


def count(params: Any) -> int:
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
