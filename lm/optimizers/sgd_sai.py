"""SGD-SaI (arXiv 2412.11768): SGD with momentum, and one learning-rate scale per tensor fixed at the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.errors import UserError
from lm.model.params import Axes
from lm.optimizers.base import Optimizer
from lm.optimizers.per_tensor import per_tensor

EPS = 1e-8


@dataclass(frozen=True)
class SGDSaI(Optimizer):
    """``m <- mu m + (1 - mu) g`` (m = g at the first step); ``p <- (1 - lr wd) p - lr G m``.

    G is the gradient's signal-to-noise ratio ``||g|| / (std(g) + 1e-8)`` of each named tensor (algorithm 1 of the
    paper; std with n - 1, as the authors' code has it), taken once from the first gradient after accumulation and
    clipping. `scale`: ``g_snr``; ``sqrt_numel``, the value that a gradient of mean 0 gives for any text, as a control;
    ``one`` is plain momentum. `refresh`: ``first_step`` as published, or ``first_nonzero``, which waits for a tensor's
    first gradient that is not 0: the published rule gives G = 0, hence no training ever, to a tensor whose first
    gradient vanishes (LoRA's A beside B = 0). Tensors of one number get G = 1 (undefined in the paper).
    State: one moment per parameter, one number and one flag per tensor: half of Adam's.
    """

    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    decay: Literal["matrices", "all"] = "all"
    momentum: float = 0.9
    scale: Literal["g_snr", "sqrt_numel", "one"] = "g_snr"
    refresh: Literal["first_step", "first_nonzero"] = "first_step"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("learning_rate", self.learning_rate), ("weight_decay", self.weight_decay)):
            if not value >= 0:
                raise UserError(f"train.optimizer.{name}: must be 0 or more, found {value}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"train.optimizer.momentum: must lie in [0, 1), found {self.momentum}")

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        return per_tensor(scale_by_sai(self.momentum, self.scale, self.refresh), axes)


class SaIState(NamedTuple):
    """Per tensor: `moment` of its shape and type, `scale` G float32, `started` bool: whether G is set."""

    moment: Any
    scale: Any
    started: Any


def g_snr(g: jax.Array) -> jax.Array:
    """``||g||_2 / (std(g) + 1e-8)`` over all entries, std unbiased, float32; 1 for a single number, 0 for NaN.

    It does not depend on the gradient's magnitude: ``G^2 = (n - 1) (1 + mean^2 / var)``, so sqrt(n - 1) at mean 0.
    """
    if g.size < 2:
        return jnp.ones((), jnp.float32)
    g = g.astype(jnp.float32)
    return jnp.nan_to_num(jnp.linalg.norm(g.ravel()) / (jnp.std(g, ddof=1) + EPS), nan=0.0)


def scale_by_sai(
    momentum: float, scale: str = "g_snr", refresh: str = "first_step"
) -> optax.GradientTransformationExtraArgs | optax.GradientTransformation:
    """The direction ``G m`` of one tensor as an optax transformation."""

    def init(p: jax.Array) -> SaIState:
        return SaIState(jnp.zeros_like(p), jnp.ones((), jnp.float32), jnp.zeros((), bool))

    def update(g: jax.Array, state: SaIState, params: Any = None) -> tuple[jax.Array, SaIState]:
        fresh = {"g_snr": g_snr, "sqrt_numel": _sqrt_numel, "one": lambda g: jnp.ones((), jnp.float32)}[scale](g)
        usable = jnp.any(g != 0) if refresh == "first_nonzero" else jnp.ones((), bool)
        factor = jnp.where(state.started, state.scale, fresh)
        moment = jnp.where(state.started, momentum * state.moment + (1 - momentum) * g, g)
        moment = moment.astype(state.moment.dtype)
        new = SaIState(moment, factor, state.started | usable)
        return (factor * moment.astype(jnp.float32)).astype(g.dtype), new

    return optax.GradientTransformation(init, update)


def _sqrt_numel(g: jax.Array) -> jax.Array:
    return jnp.asarray(g.size**0.5, jnp.float32)
