"""Mixture of experts: a router sends each token to a few of E feed-forward layers (arXiv 1701.06538, 2407.06204).

Letters: B batch, T tokens of a row, N = B T tokens, E experts, k experts per token, M = N k assignments, C places per
expert, D model width, F expert width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import numpy as np

from lm.errors import UserError, unknown
from lm.ffn.base import FFN, WIDE, Activated
from lm.ffn.moe.layer import MoELayer
from lm.ffn.moe.routing import Router
from lm.plug import Model, Settings, bounded, socket, table

# Alive at once: arrays [rows of experts, d_model], and arrays [rows, d_ff] of an expert that is alone on its chip.
ROUTED, ALONE = 2, 4


@dataclass(frozen=True)
class MoE(FFN):
    """E experts of kind `expert` and width `d_expert` (None = ``model.d_ff``). An expert is a feed-forward layer
    without biases, its other settings at their defaults; `expert_settings` are those that are otherwise.

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

    experts: int = bounded(8, at_least=1)
    router: Router = socket("lm.ffn.moe.routers", "topk")
    expert: str = "swiglu"
    d_expert: int | None = bounded(None, at_least=1)
    shared: int = bounded(0, at_least=0)
    shared_gate: bool = False
    every: int = bounded(1, at_least=1)
    first_dense: int = bounded(0, at_least=0)
    dense: FFN = socket("lm.ffn", "swiglu")
    capacity: float | None = None
    eval_capacity: float | None = None
    capacity_counts_k: bool = True
    min_capacity: int = bounded(1, at_least=0)
    priority: Literal["choice", "token", "gate"] = "choice"
    group: Literal["batch", "sequence"] = "batch"
    load_balance_loss: float = 0.01
    router_z_loss: float = 0.0
    balance_over: Literal["batch", "sequence"] = "batch"
    dispatch: Literal["sorted", "buffers"] | None = None
    implementation: Literal["auto", "ragged", "blocks"] = "auto"
    expert_settings: Mapping[str, Any] = field(default_factory=Settings, metadata={"later": True})
    reports: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "expert_settings", Settings(self.expert_settings))

    def check(self, cfg: Model) -> None:
        for name, factor in (("capacity", self.capacity), ("eval_capacity", self.eval_capacity)):
            if factor is not None and not 0 < factor < math.inf:
                raise UserError(f"model.ffn.{name}: must be positive, or None for no limit, found {factor}")
            if factor is not None and not self.router.capacity:
                raise UserError(f"model.ffn.{name}: found {factor}; router {self.name_of_router!r} takes None only")
        for name, weight in (("load_balance_loss", self.load_balance_loss), ("router_z_loss", self.router_z_loss)):
            if not 0 <= weight < math.inf:
                raise UserError(f"model.ffn.{name}: must be finite and 0 or more, found {weight}")
        kinds = [name for name, cls in table("lm.ffn").items() if issubclass(cls, Activated)]
        if self.expert not in kinds:
            raise unknown("model.ffn.expert", self.expert, kinds)
        valid = [f.name for f in dataclasses.fields(table("lm.ffn")[self.expert])]
        for name in self.expert_settings:
            if name not in valid:
                raise unknown("model.ffn.expert_settings", name, valid)
        if self.dispatch == "buffers" and self.capacity is None:
            raise UserError("model.ffn.dispatch: buffers hold a number of tokens per expert; set model.ffn.capacity")
        if self.shared_gate and not self.shared:
            raise UserError("model.ffn.shared_gate: there is no shared expert; valid: model.ffn.shared above 0")
        if isinstance(self.dense, MoE):
            raise UserError("model.ffn.dense: found moe; valid: a layer that is not a mixture")
        self.router.check(self.experts, cfg)

    @property
    def kind(self) -> Activated:
        """The layer that an expert is."""
        plug: Activated = table("lm.ffn")[self.expert](**{"bias": False, **self.expert_settings})
        return plug

    @property
    def name_of_router(self) -> str:
        return table("lm.ffn.moe.routers").name_of(type(self.router)) or ""

    def for_layer(self, i: int) -> FFN:
        """The plug of layer i: this one, or `dense`."""
        return self if i >= self.first_dense and (i + 1) % self.every == 0 else self.dense

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        return MoELayer(cfg, name=name)

    @property
    def n_experts(self) -> int:
        return self.experts

    @property
    def choices(self) -> int:
        return self.router.k

    @property
    def active(self) -> float:
        return self.router.share(self.experts)

    def width(self, cfg: Model) -> int:
        return self.d_expert or cfg.d_ff

    def rows(self, cfg: Model, tokens: float, parts: int, exchange: float | None) -> float:
        even = tokens * self.router.k
        most = even * parts if exchange is None else min(exchange * even, even * parts)
        if self.capacity is not None:
            most = min(most, even * self.capacity * (1 if self.capacity_counts_k else 1 / self.router.k))
        return most + (tokens * self.shared / self.width(cfg) if self.shared else 0.0)

    def alive(self, cfg: Model, rows: float, parts: int, inner: int) -> float:
        wide = ALONE if self.experts == parts else WIDE
        return rows * (wide * self.width(cfg) / inner + ROUTED * cfg.d_model)

    def leaks(self, training: bool) -> bool:
        """Whether a token's output may depend on later tokens: by the router, or because they take its place."""
        capacity = self.capacity if training else self.eval_capacity
        in_order = self.priority == "token" or (self.priority == "choice" and self.router.k == 1)
        return self.router.acausal(training) or (capacity is not None and not in_order)

    @property
    def uncached(self) -> str:
        if self.router.acausal(False):
            return (
                f"router {self.name_of_router!r} chooses by comparing a token with later ones, which do not exist yet "
                f"when a text is continued{self.router.way_out}"
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

    def update(self, params: Mapping[str, Any], sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The router's rule (`Router.update`)."""
        return {f"router/{name}": value for name, value in self.router.update(params["router"], sums).items()}

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
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
