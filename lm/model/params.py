"""Parameter names, logical axes, counts. Parameters are a plain nested dict; what is known of each was said where it is
declared (`lm.weights.param`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm import weights
from lm.config import ModelConfig
from lm.model.decoder import Decoder
from lm.model.inputs import Inputs

STACKING = ("layers", "experts")  # axes that number tensors rather than belong to one

HEADS = ("heads", "kv_heads")  # followed by the channels of a head

Path = Sequence[Any]  # of a leaf in a tree


def init(cfg: ModelConfig, rng: jax.Array) -> dict[str, Any]:
    """Random parameters as a plain nested dict."""
    return dict(_init(cfg)(rng))["params"]


@functools.lru_cache(maxsize=32)
def _init(cfg: ModelConfig) -> Any:
    """Compiled once per model."""
    return jax.jit(lambda rng: Decoder(cfg).init(rng, Inputs(jnp.zeros((1, 1), jnp.int32))))


def abstract(cfg: ModelConfig) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`; allocates nothing."""
    return jax.tree.map(lambda leaf: leaf, _traced(cfg)[0])  # a copy, which the caller may change


@functools.lru_cache(maxsize=64)
def _traced(cfg: ModelConfig) -> tuple[dict[str, Any], dict[str, weights.Declared]]:
    """The parameter tree, and what was said of each of its leaves."""

    def shapes(
        rng: jax.Array, tokens_BT: jax.Array
    ) -> Any:  # a new function: declarations are not made by a cached trace
        return Decoder(cfg).init(rng, Inputs(tokens_BT))

    with weights.noting() as notes:
        found = jax.eval_shape(shapes, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    tree = dict(found)["params"]
    undeclared = [name for name in names(tree) if name not in notes]
    if undeclared:
        raise KeyError(
            f"no logical axes for parameter {undeclared[0]}; give them to lm.weights.param where it is declared"
        )
    return tree, {name: notes[name] for name in names(tree)}


class Axes(Mapping[str, tuple[str, ...]]):
    """The logical axes of a model's parameters by name.

    Names that were not declared but follow from one that was are known too: a layer's own tensor (``blocks_3/…``) of a
    stack (``blocks/…``), and the parts of a surgery beside a parameter (`lm.weights.BELOW`). Another name has no axes.
    """

    def __init__(self, declared: Mapping[str, tuple[str, ...]]) -> None:
        self._declared = dict(declared)

    def __getitem__(self, name: str) -> tuple[str, ...]:
        if name in self._declared:
            return self._declared[name]
        parts = name.split("/")
        if parts[-1] in weights.BELOW:
            stacked = (a for a in self["/".join(parts[:-1])] if a in STACKING)
            return (*stacked, *weights.BELOW[parts[-1]])
        stack = self._declared.get("/".join(("blocks", *parts[1:]))) if parts[0].startswith("blocks_") else None
        return () if stack is None else stack[1:]

    def __iter__(self) -> Iterator[str]:
        return iter(self._declared)

    def __len__(self) -> int:
        return len(self._declared)

    def at(self, path: Path) -> tuple[str, ...]:
        """Of the leaf at a tree path."""
        return self["/".join(_parts(path))]

    def tree(self, params: Any) -> Any:
        """Of every leaf of a tree, as a tree of tuples."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self.at(path), params)

    def stacks(self, params: Any) -> Any:
        """How many leading axes of each leaf stack tensors (layers, experts) rather than belong to one; 0 for foreign
        names, so that any tree is accepted."""
        return jax.tree_util.tree_map_with_path(lambda path, _: sum(a in STACKING for a in self.at(path)), params)

    def sides(self, name: str) -> int:
        """2 for a matrix, 1 for a vector, 0 for a foreign name. Axes that stack tensors count for nothing, heads and
        the channels of a head for one side: a bias ``[heads, head_dim]`` is a vector."""
        own = [axis for axis in self[name] if axis not in STACKING]
        return sum(not (axis == "head_dim" and before in HEADS) for before, axis in zip(["", *own], own, strict=False))

    def matrices(self, params: Any) -> Any:
        """Whether each leaf is a matrix (or has more sides yet); one with a foreign name by its number of axes."""

        def one(path: Path, leaf: Any) -> bool:
            return (self.sides("/".join(_parts(path))) or leaf.ndim) >= 2

        return jax.tree_util.tree_map_with_path(one, params)

    def used(self) -> list[str]:
        """Every logical axis that a parameter has, sorted."""
        return sorted({axis for axes in self._declared.values() for axis in axes})


@functools.lru_cache(maxsize=64)
def axes(cfg: ModelConfig) -> Axes:
    """The logical axes of a model's parameters; stacked blocks lead with ``layers``."""
    return Axes({name: declared.axes for name, declared in _traced(cfg)[1].items()})


def inputs(cfg: ModelConfig) -> dict[str, int]:
    """``{"blocks/attn/o/kernel": 2, …}``: how many axes of a linear layer's weight are summed over. Weights that other
    code reads (tables, a head's own matrix, experts) are not listed."""
    return {name: declared.n_in for name, declared in _traced(cfg)[1].items() if declared.n_in}


def tables(cfg: ModelConfig) -> list[str]:
    """Parameters that are read by rows: one per token, or per position."""
    return [name for name, declared in _traced(cfg)[1].items() if declared.axes[0] in ("vocab", "positions")]


def names(params: Any) -> dict[str, Any]:
    """``{"blocks/attn/q/kernel": leaf, …}``."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=weights.special)[0]
    return {"/".join(_parts(path)): leaf for path, leaf in flat}


def _parts(path: Path) -> list[str]:
    return [str(k.key) if isinstance(k, jax.tree_util.DictKey) else _text(k) for k in path]


def _text(key: object) -> str:
    """A key of an optimizer's state (a field of a tuple or of a dataclass), as names have it."""
    return key.name if isinstance(key, jax.tree_util.GetAttrKey) else str(key)


def owner(path: Path, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The parameter of `shapes` whose name is part of a tree path and whose shape is `shape`: the parameter itself, or
    what an optimizer keeps for it, below a name of its own (``mu/blocks/…/kernel``) or above one (``…/kernel/moment``).
    """
    parts = _parts(path)
    spans = ("/".join(parts[i:j]) for j in range(len(parts), 0, -1) for i in range(j))
    return next((name for name in spans if shapes.get(name) == tuple(shape)), None)


def described(axes: Axes, params: Any) -> dict[str, str]:
    """``{"blocks/attn/q/kernel": "layers, embed, heads, head_dim", …}``."""
    return {name: ", ".join(axes[name]) for name in names(params)}


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
