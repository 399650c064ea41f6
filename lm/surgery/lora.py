"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from lm import weights
from lm.config import ModelConfig
from lm.errors import UserError, nearest
from lm.model import params as params_lib
from lm.nested import nested
from lm.plug import bounded
from lm.surgery.base import Params, Surgery


@dataclass(frozen=True)
class LoRA(Surgery):
    """``W x + (alpha / rank) B A x`` (eq. 3): `W` stays, `A` and `B` are trained; B is zero before the first step.

    `targets` and `whole` are shell patterns over parameter names (``blocks/attn/q/kernel``, ``*/ffn/*``, ``embed``;
    every training prints them to parameters.txt). `whole` parameters, norms and biases for example, are trained as they
    are, on copies. `dropout` acts on the input of A. `rank_stabilized`: ``alpha / sqrt(rank)`` (arXiv 2312.03732).
    """

    targets: tuple[str, ...] = ("*/attn/q/kernel", "*/attn/v/kernel")
    rank: int = bounded(8, at_least=1)
    alpha: float = 16.0
    dropout: float = 0.0
    whole: tuple[str, ...] = ()
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "train.surgery"
        if not 0 < self.alpha < math.inf:
            raise UserError(f"{key}.alpha: must be positive and finite, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{key}.dropout: must lie in [0, 1), found {self.dropout}")
        if not self.targets and not self.whole:
            raise UserError(
                f"{key}.targets: is empty; valid: patterns of parameter names, for example '*/attn/q/kernel'"
            )

    @property
    def trains(self) -> bool:
        return True

    @property
    def adds(self) -> bool:
        return True

    @property
    def stochastic(self) -> bool:
        return self.dropout > 0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def check(self, cfg: ModelConfig) -> None:
        """Raises `UserError` for a pattern that fits no parameter, for a vector or a rank that is no restriction among
        `targets`, and for dropout where the input of a weight is not at hand."""
        self._plan(cfg)

    def _plan(self, cfg: ModelConfig) -> dict[str, int | None]:
        """Trained parameter -> its number of input axes behind stacking ones; None = trained whole."""
        tree = params_lib.abstract(cfg)
        shapes, stacked = params_lib.names(tree), params_lib.names(params_lib.axes(cfg).stacks(tree))
        inputs, axes = params_lib.inputs(cfg), params_lib.axes(cfg)
        out: dict[str, int | None] = {}
        for name in _matching(self.targets, shapes, "targets"):
            shape = shapes[name].shape[stacked[name] :]
            if axes.sides(name) < 2:
                raise UserError(
                    f"train.surgery.targets: {name} is a vector, which has no low-rank term; valid: matrices, and "
                    "vectors in train.surgery.whole"
                )
            n_in = inputs.get(name, 1)
            least = min(math.prod(shape[:n_in]), math.prod(shape[n_in:]))
            if self.rank > least:
                raise UserError(f"train.surgery.rank: found {self.rank}; valid for {name}: 1 to {least}")
            if self.dropout and name not in inputs:
                raise UserError(
                    f"train.surgery.dropout: {name} is not read by a linear layer, whose input could be dropped; "
                    "valid: 0, or other targets"
                )
            out[name] = n_in
        for name in _matching(self.whole, shapes, "whole"):
            out[name] = None
        return out

    def init(self, cfg: ModelConfig, params: Params, rng: jax.Array) -> Params:
        """``{…: {"lora_a": [stack, in, r], "lora_b": [stack, r, out]}}``, nested like `params`; `whole` ones copied.

        A is uniform with variance ``1 / (3 in)`` (the initialisation of the authors' code), B zero.
        """
        plan, leaves, tables = self._plan(cfg), params_lib.names(params), params_lib.tables(cfg)
        stacked = params_lib.names(params_lib.axes(cfg).stacks(params))
        flat: dict[str, Any] = {}
        for i, (name, n_in) in enumerate(sorted(plan.items())):
            leaf = leaves[name]
            if n_in is None:
                flat[name] = jnp.array(leaf)
                continue
            n = stacked[name]
            stack, shape = leaf.shape[:n], leaf.shape[n:]
            fan_in, fan_out = math.prod(shape[:n_in]), math.prod(shape[n_in:])
            bound = fan_in**-0.5 if name not in tables else fan_out**-0.5
            a = jax.random.uniform(jax.random.fold_in(rng, i), (*stack, fan_in, self.rank), jnp.float32, -bound, bound)
            flat[f"{name}/lora_a"] = a
            flat[f"{name}/lora_b"] = jnp.zeros((*stack, self.rank, fan_out), jnp.float32)
        return nested(flat)

    def attach(self, cfg: ModelConfig, params: Params, trained: Params, rng: jax.Array | None = None) -> Params:
        """`params` with `lm.weights.LowRank` in the place of targets that linear layers and tables read, and with
        formed sums where other code reads them. `rng`: training, with dropout."""
        read = {*params_lib.inputs(cfg), *params_lib.tables(cfg)}

        def one(name: str, leaf: weights.AnyWeight, a: jax.Array, b: jax.Array) -> Params:
            key = None
            if rng is not None and self.dropout:
                mine = jax.random.fold_in(rng, zlib.crc32(name.encode()))
                key = jax.random.split(mine, a.shape[:-2]) if a.ndim > 2 else mine
            low = weights.LowRank(leaf, a, b, key, self.scale, self.dropout)
            return low if name in read else low.dense()

        return _replaced(params, trained, one)

    def merge(self, cfg: ModelConfig, params: Params, trained: Params) -> Params:
        """Plain parameters, each target with its low-rank term added."""
        return _replaced(
            params, trained, lambda name, leaf, a, b: weights.LowRank(leaf, a, b, scale=self.scale).dense()
        )


def _matching(patterns: tuple[str, ...], names: Collection[str], key: str) -> list[str]:
    out: dict[str, None] = {}
    for pattern in patterns:
        found = [n for n in names if fnmatchcase(n, pattern)]
        if not found:
            raise UserError(
                f"train.surgery.{key}: {pattern!r} fits no parameter{nearest(pattern, names)}; valid: "
                f"{', '.join(names)}"
            )
        out |= dict.fromkeys(found)
    return list(out)


def _replaced(params: Params, trained: Params, low_rank: Callable[..., Any], at: str = "") -> Params:
    """`params` with what `trained` names in its place."""
    out = dict(params)
    for part, below in trained.items():
        name = f"{at}/{part}" if at else part
        if not isinstance(below, dict):
            out[part] = below
        elif "lora_a" in below:
            out[part] = low_rank(name, params[part], below["lora_a"], below["lora_b"])
        else:
            out[part] = _replaced(params[part], below, low_rank, name)
    return out
