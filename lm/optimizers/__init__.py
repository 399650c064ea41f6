"""SOCKET optimizer: from gradients to parameter updates, as optax transformations.

A plug is a frozen dataclass with ``learning_rate``, ``weight_decay``, ``decay`` and ``direction() -> optax
transformation`` (updates before decay and learning rate). `make` adds what all share: clipping by global norm in
front; decoupled weight decay, the schedule and the sign behind.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import optax

from lm.errors import UserError
from lm.model.params import stacks
from lm.plug import Table

TABLE = Table(
    {
        "adamw": "lm.optimizers.plain:AdamW",
        "adafactor": "lm.optimizers.plain:Adafactor",
        "lion": "lm.optimizers.plain:Lion",
        "muon": "lm.optimizers.plain:Muon",
        "sgd": "lm.optimizers.plain:SGD",
        "sgd_sai": "lm.optimizers.sgd_sai:SGDSaI",
    }
)


class Optimizer(Protocol):
    learning_rate: float
    weight_decay: float
    decay: str

    def direction(self) -> optax.GradientTransformation: ...


def make(plug: Optimizer, factor: optax.Schedule, clip: float | None = None) -> optax.GradientTransformation:
    """``p <- p - lr factor(t) (direction(clip(g)) + weight_decay p)``; `factor` is a schedule in [0, 1].

    `clip`: the largest global norm a gradient may have, None = any. Weight decay is decoupled (arXiv 1711.05101) and
    acts on ``matrices`` (everything with two or more axes beside stacking) or on ``all`` parameters.
    """
    if plug.decay not in ("matrices", "all"):
        raise UserError(f"train.optimizer.decay: found {plug.decay!r}; valid: matrices, all")
    first = [] if clip is None else [optax.clip_by_global_norm(clip)]
    decay = [optax.add_decayed_weights(plug.weight_decay, _mask(plug.decay))] if plug.weight_decay else []
    rate = optax.scale_by_learning_rate(lambda step: plug.learning_rate * factor(step))
    return optax.chain(*first, plug.direction(), *decay, rate)


def n_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the optimizer's state for `params` (arrays or `jax.ShapeDtypeStruct`); allocates nothing."""
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _mask(decay: str) -> Any:
    if decay == "all":
        return None
    return lambda tree: jax.tree.map(lambda p, n: p.ndim - n >= 2, tree, stacks(tree))
