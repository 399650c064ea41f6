"""The field's optimizers from optax, told which axes of a leaf are stacked layers rather than part of a tensor."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax import contrib

from lm.model.params import Axes
from lm.optimizers.base import Optimizer
from lm.optimizers.per_tensor import per_tensor
from lm.optimizers.sgd_sai import scale_by_sai


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101). State: two moments per parameter."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions(b1=self.b1, b2=self.b2)

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor (arXiv 1804.04235) with its update clipping, relative steps off. State: row and column sums of squares
    of tensors whose two largest axes reach `min_dim`, else one moment."""

    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    min_dim: int = 128
    multiply_by_parameter_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions(decay_rate=self.decay_rate)

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        steps = [
            optax.scale_by_factored_rms(decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim),
            optax.clip_by_block_rms(self.clipping_threshold),
        ]
        if self.multiply_by_parameter_scale:
            steps.append(optax.scale_by_param_block_rms())
        return per_tensor(optax.chain(*steps), axes)


@dataclass(frozen=True)
class Lion(Optimizer):
    """Lion (arXiv 2302.06675): the sign of an interpolated momentum. State: one moment per parameter."""

    learning_rate: float = 1e-4
    weight_decay: float = 1.0
    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions(b1=self.b1, b2=self.b2)

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan 2024; arXiv 2502.16982 for `consistent_rms`).

    For the matrices inside blocks; embeddings, the head and vectors take Adam with rate ``adam_ratio`` times the
    learning rate. Kernels of several output or input axes count as one matrix; stacked layers stay apart.
    """

    learning_rate: float = 0.02
    weight_decay: float = 0.0
    beta: float = 0.95
    ns_steps: int = 5
    nesterov: bool = True
    consistent_rms: float | None = None
    adam_ratio: float = 0.15
    adam_b1: float = 0.9
    adam_b2: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions(beta=self.beta, adam_b1=self.adam_b1, adam_b2=self.adam_b2)

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        whole = contrib.muon(
            learning_rate=1.0,
            ns_steps=self.ns_steps,
            beta=self.beta,
            nesterov=self.nesterov,
            consistent_rms=self.consistent_rms,
            adam_learning_rate=self.adam_ratio,
            adam_b1=self.adam_b1,
            adam_b2=self.adam_b2,
            muon_weight_dimension_numbers=functools.partial(_matrices, axes),
        )
        return optax.chain(whole, optax.scale(-1.0))  # the sign and the rate come last, for all plugs alike


def _matrices(axes: Axes, tree: Any) -> Any:
    """Which axes of a block's kernel are its input and its output, the others being mapped over; None: not a matrix
    of a block."""

    def masked(leaf: object) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    def one(path: Any, leaf: Any) -> Any:
        found = () if masked(leaf) else axes.at(path)
        own = [i for i, a in enumerate(found) if a not in ("layers", "experts")]
        name = "/".join(str(k.key) for k in path)
        if masked(leaf) or axes.sides(name) < 2 or not name.startswith("blocks"):
            return None
        inputs = own[:-1] if found[-1] == "embed" else [i for i in own if found[i] == "embed"] or own[:1]
        outputs = [i for i in own if i not in inputs]
        return contrib.MuonDimensionNumbers(reduction_axis=tuple(inputs), output_axis=tuple(outputs))

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=masked)


@dataclass(frozen=True)
class SGD(Optimizer):
    """SGD with momentum as a moving average, ``m <- mu m + (1 - mu) g``: SGD-SaI with every scale 1."""

    learning_rate: float = 0.1
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "all"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions(momentum=self.momentum)

    def direction(self, axes: Axes) -> optax.GradientTransformation:
        return per_tensor(scale_by_sai(self.momentum, "one"), axes)
