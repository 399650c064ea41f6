"""The socket ``train.optimizer``, and what all optimizers share: clipping, decoupled weight decay, the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import optax

from lm.errors import UserError
from lm.model.params import Axes
from lm.plug import Plug


@dataclass(frozen=True)
class Optimizer(Plug):
    """A direction for every parameter: a frozen dataclass of settings. `decay`: which parameters decay, ``matrices``
    (what `lm.model.params.Axes` calls so) or ``all``."""

    KEY: ClassVar[str] = "train.optimizer"

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "matrices"

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        """Updates before decay and learning rate; `axes` says of every parameter which axes stack tensors."""
        raise NotImplementedError

    def _fractions(self, **fractions: float) -> None:
        """Raises `UserError` unless rates are positive and `fractions` lie in [0, 1)."""
        if not self.learning_rate > 0:
            raise UserError(f"train.optimizer.learning_rate: must be positive, found {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise UserError(f"train.optimizer.weight_decay: must be 0 or more, found {self.weight_decay}")
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise UserError(f"train.optimizer.{name}: must lie in [0, 1), found {value}")


def make(
    plug: Optimizer, factor: optax.Schedule, axes: Axes, clip: float | None = None
) -> optax.GradientTransformation:
    """``p <- p - lr factor(t) (direction(clip(g)) + weight_decay p)``; `factor` is a schedule in [0, 1].

    `clip`: the largest global norm a gradient may have, None = any. Weight decay is decoupled (arXiv 1711.05101).
    """
    first = [] if clip is None else [optax.clip_by_global_norm(clip)]
    decay = [optax.add_decayed_weights(plug.weight_decay, _mask(plug.decay, axes))] if plug.weight_decay else []
    rate = optax.scale_by_learning_rate(lambda step: plug.learning_rate * factor(step))
    return optax.chain(*first, plug.direction(axes), *decay, rate)


def n_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the optimizer's state for `params` (arrays or `jax.ShapeDtypeStruct`); allocates nothing."""
    state = jax.eval_shape(tx.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _mask(decay: str, axes: Axes) -> Any:
    if decay == "all":
        return None
    return axes.matrices
