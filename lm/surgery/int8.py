"""Weights in int8 with a float32 scale per output; products in the activations' type (weight-only quantisation)."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import jax

from lm import weights
from lm.config import ModelConfig
from lm.model import params as params_lib
from lm.surgery.base import Params, Surgery
from lm.surgery.calibration import Calibration


@dataclass(frozen=True)
class Int8(Surgery):
    """Every linear layer's weight and the embedding table, but for names that fit a shell pattern of `keep`; stacked
    experts and their router stay as they are.

    Rounding to nearest, absolute maximum per output, no calibration (LLM.int8(), arXiv 2208.07339, section 2.1, without
    its outlier columns and with activations as they are). Four times less to read than float32, twice than bfloat16.
    """

    keep: tuple[str, ...] = ()

    def apply(self, cfg: ModelConfig, params: Params, data: Calibration | None = None) -> tuple[ModelConfig, Params]:
        """The same model with `lm.weights.Int8` in the place of matrices; `params` stacked or one tree per layer."""
        axes = params_lib.axes(cfg)
        inputs = {_place(name): n_in for name, n_in in params_lib.inputs(cfg).items()}

        def one(path: tuple[jax.tree_util.DictKey, ...], leaf: weights.AnyWeight, stacked: int) -> weights.AnyWeight:
            name = "/".join(str(k.key) for k in path)
            if isinstance(leaf, weights.Weight) or any(fnmatchcase(name, pattern) for pattern in self.keep):
                return leaf
            if name == "embed":
                return weights.Int8.of(leaf, 0, 1, table=True)
            n_in = inputs.get(_place(name), 1 if name == "head/kernel" else 0)
            return weights.Int8.of(leaf, stacked, n_in) if n_in else leaf

        made = jax.jit(
            lambda tree: jax.tree_util.tree_map_with_path(one, tree, axes.stacks(tree), is_leaf=weights.special)
        )
        return cfg, made(params)


def _place(name: str) -> str:
    """``blocks_3/attn/q/kernel`` and ``blocks/attn/q/kernel`` are read alike."""
    head, _, rest = name.partition("/")
    return f"blocks/{rest}" if head.startswith("blocks") else name
