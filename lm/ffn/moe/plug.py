"""Mixture of experts: a router sends each token to a few of E feed-forward layers (arXiv 1701.06538, 2407.06204).

Letters: B batch, T tokens of a row, N = B T tokens, E experts, k experts per token, M = N k assignments, C places per
expert, D model width, F expert width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.errors import UserError, unknown
from lm.ffn.context import Call
from lm.ffn.moe.grouped import IMPLEMENTATIONS
from lm.ffn.moe.layer import KINDS, MoELayer
from lm.plug import socket, table

AXES = {
    "router/kernel": ("embed", "routes"),
    "router/bias": ("routes",),
    "router/scale": ("one",),
    "experts/gate/kernel": ("experts", "embed", "mlp"),
    "experts/up/kernel": ("experts", "embed", "mlp"),
    "experts/down/kernel": ("experts", "mlp", "embed"),
    "shared_gate/kernel": ("embed", "one"),
}


@dataclass(frozen=True)
class MoE:
    """E experts of kind `expert` (a feed-forward layer without biases) and width `d_expert` (None = ``model.d_ff``).

    `shared`: width of one more expert that every token passes (0 = none; m shared experts of width F are one of m F),
    with `shared_gate` scaled by ``sigmoid(x w)``. Layer i is a mixture iff ``i >= first_dense`` and ``(i + 1) % every
    == 0``; the others are `dense`.

    `capacity`: in training an expert takes at most ``ceil(capacity T / E)`` tokens of a routing group of T, times k
    with `capacity_counts_k`, and at least `min_capacity`; what does not fit is dropped (its output is 0, the residual
    stream passes by). None = dropless. `eval_capacity`: the same outside training. `priority`: who is served first,
    ``choice | token | gate`` (`lm.ffn.moe.routing.limit`). `group`: tokens that compete, ``batch`` or ``sequence`` (one
    row).

    Losses, both averaged over the layers that have them: `load_balance_loss` times ``E / j sum_e F_e P_e`` (1 when
    balanced; F_e the share of tokens that chose e among their j first, before drops, P_e the mean probability:
    arXiv 2101.03961 equation 4), taken over `balance_over` = ``batch`` or each ``sequence``; `router_z_loss` times the
    mean of ``logsumexp(z)^2`` (arXiv 2202.08906 equation 5).

    `dispatch`: ``sorted`` (rows sorted by expert, grouped products), ``buffers`` (``[E, C, D]``, needs a capacity),
    None: sorted. `implementation` of grouped products: ``auto | ragged | blocks`` (`lm.ffn.moe.grouped`).
    """

    experts: int = 8
    router: Any = socket("lm.ffn.moe.routers", "topk")
    expert: str = "swiglu"
    d_expert: int | None = None
    shared: int = 0
    shared_gate: bool = False
    every: int = 1
    first_dense: int = 0
    dense: Any = socket("lm.ffn", "swiglu")
    capacity: float | None = None
    eval_capacity: float | None = None
    capacity_counts_k: bool = True
    min_capacity: int = 1
    priority: str = "choice"
    group: str = "batch"
    load_balance_loss: float = 0.01
    router_z_loss: float = 0.0
    balance_over: str = "batch"
    dispatch: str | None = None
    implementation: str = "auto"
    reports: ClassVar[bool] = True

    def check(self, cfg: ModelConfig) -> None:
        for name in ("experts", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"model.ffn.{name}: must be at least 1, found {getattr(self, name)}")
        for name in ("shared", "first_dense", "min_capacity"):
            if getattr(self, name) < 0:
                raise UserError(f"model.ffn.{name}: must be 0 or more, found {getattr(self, name)}")
        if self.d_expert is not None and self.d_expert < 1:
            raise UserError(f"model.ffn.d_expert: must be at least 1 or None, found {self.d_expert}")
        for name in ("capacity", "eval_capacity"):
            factor = getattr(self, name)
            if factor is not None and not 0 < factor < math.inf:
                raise UserError(f"model.ffn.{name}: must be positive, or None for no limit, found {factor}")
            if factor is not None and not self.router.capacity:
                raise UserError(f"model.ffn.{name}: found {factor}; router {self.name_of_router!r} takes None only")
        for name in ("load_balance_loss", "router_z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"model.ffn.{name}: must be finite and 0 or more, found {getattr(self, name)}")
        choices: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("expert", tuple(KINDS)),
            ("priority", ("choice", "token", "gate")),
            ("group", ("batch", "sequence")),
            ("balance_over", ("batch", "sequence")),
            ("implementation", IMPLEMENTATIONS),
        )
        for name, valid in choices:
            if getattr(self, name) not in valid:
                raise unknown(f"model.ffn.{name}", getattr(self, name), valid)
        if self.dispatch not in (None, "sorted", "buffers"):
            raise unknown("model.ffn.dispatch", self.dispatch, ("sorted", "buffers"))
        if self.dispatch == "buffers" and self.capacity is None:
            raise UserError("model.ffn.dispatch: buffers hold a number of tokens per expert; set model.ffn.capacity")
        if self.shared_gate and not self.shared:
            raise UserError("model.ffn.shared_gate: there is no shared expert; valid: model.ffn.shared above 0")
        if isinstance(self.dense, MoE):
            raise UserError("model.ffn.dense: found moe; valid: a layer that is not a mixture")
        self.router.check(self.experts, cfg)

    @property
    def name_of_router(self) -> str:
        return next(n for n, c in table("lm.ffn.moe.routers").items() if c is type(self.router))

    def for_layer(self, i: int) -> Any:
        """The plug of layer i: this one, or `dense`."""
        return self if i >= self.first_dense and (i + 1) % self.every == 0 else self.dense

    def module(self, cfg: ModelConfig, name: str | None = None) -> nn.Module:
        return MoELayer(cfg, name=name)

    @property
    def active(self) -> float:
        """The share of the experts' weights that a token passes through."""
        return self.router.share(self.experts)

    def leaks(self, training: bool) -> bool:
        """Whether a token's output may depend on later tokens: by the router, or because they take its place."""
        capacity = self.capacity if training else self.eval_capacity
        in_order = self.priority == "token" or (self.priority == "choice" and self.router.k == 1)
        return self.router.acausal(training) or (capacity is not None and not in_order)

    @property
    def uncached(self) -> str:
        """Why a text cannot be continued token by token; empty when it can."""
        if self.router.acausal(False):
            way_out = "; valid: model.ffn.router.evaluation = argmax" if hasattr(self.router, "evaluation") else ""
            return (
                f"router {self.name_of_router!r} chooses by comparing a token with later ones, which do not exist yet "
                f"when a text is continued{way_out}"
            )
        if self.eval_capacity is not None:
            return (
                f"eval_capacity = {self.eval_capacity} drops tokens by what else is in the group, which is another "
                "group when a text is continued token by token; valid: eval_capacity = None"
            )
        return ""

    def places(self, tokens: int, training: bool) -> int | None:
        """C for a group of so many tokens; None = no limit."""
        factor = self.capacity if training else self.eval_capacity
        if factor is None:
            return None
        per_token = self.router.k if self.capacity_counts_k else 1
        return max(math.ceil(factor * per_token * tokens / self.experts), self.min_capacity, 1)

    def update(self, params: Any, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The balancing bias after a step: towards experts that got fewer tokens than the mean (arXiv 2408.15664)."""
        rate = getattr(self.router, "bias_rate", 0.0)
        if not rate:
            return {}
        counts = sums["counts_E"]
        bias = params["router"]["bias"] + rate * jnp.sign(counts.mean() - counts)
        return {"router/bias": bias - bias.mean() if self.router.centre else bias}

    def report(self, sums: dict[str, np.ndarray]) -> dict[str, Any]:
        """For the log: ``max_vio`` = largest load over the mean load - 1, the share of ``dropped`` assignments, the
        router's ``entropy`` (nats, mean over tokens), both losses before their weights, and by expert ``load``
        (shares)."""
        tokens = max(float(sums["tokens"]), 1.0)
        load = sums["counts_E"] / max(float(sums["counts_E"].sum()), 1.0)
        out: dict[str, Any] = {
            "moe/max_vio": float(load.max() * len(load) - 1.0),
            "moe/dropped": 1.0 - float(sums["kept"]) / max(float(sums["chosen"]), 1.0),
            "moe/entropy": float(sums["entropy"]) / tokens,
            "moe/load_balance": float(sums["balance"]) / tokens,
            "moe/router_z": float(sums["z"]) / tokens,
            "moe/load": [round(float(x), 5) for x in load],
        }
        if "bias_E" in sums:
            bias = sums["bias_E"] / tokens
            out |= {"moe/bias_range": float(np.ptp(bias)), "moe/bias": [round(float(x), 5) for x in bias]}
        return out


__all__ = ["AXES", "Call", "MoE"]
