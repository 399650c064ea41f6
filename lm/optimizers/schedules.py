"""SOCKET schedule: the learning rate over a run, as a factor in [0, 1] of the optimizer's rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from lm.errors import UserError
from lm.plug import Plug, Table, bounded


def _steps(amount: float, total: int) -> int:
    """`amount` below 1 is a fraction of the run, else a number of steps."""
    return math.ceil(amount * total) if amount < 1 else int(amount)


class Schedule(Plug):
    """The learning rate over a run: a frozen dataclass of settings."""

    KEY: ClassVar[str] = "train.schedule"

    def factor(self, total: int) -> optax.Schedule:
        """The factor at step 0, 1, … of `total`: the first step already moves."""
        raise NotImplementedError


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"train.schedule.{name}: must lie in [0, 1], found {value}")


@dataclass(frozen=True)
class Constant(Schedule):
    """1 after a linear warm-up. `warmup`: steps, or a fraction of the run below 1."""

    warmup: float = bounded(0.0, at_least=0)

    def factor(self, total: int) -> optax.Schedule:
        """The peak is reached at step `warmup`."""
        return _warm(_steps(self.warmup, total), optax.constant_schedule(1.0))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `final`."""

    warmup: float = bounded(0.1, at_least=0)
    final: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _share("final", self.final)

    def factor(self, total: int) -> optax.Schedule:
        warm = _steps(self.warmup, total)
        return _warm(warm, optax.cosine_decay_schedule(1.0, max(total - warm, 1), self.final))


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay (arXiv 2404.06395): constant until the last `decay` of the run, then down to `final`.

    `shape`: ``linear``, or ``sqrt``, ``1 - sqrt(t)`` (arXiv 2405.18392).
    """

    warmup: float = bounded(0.05, at_least=0)
    decay: float = bounded(0.2, at_least=0)
    final: float = 0.0
    shape: Literal["linear", "sqrt"] = "sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        _share("final", self.final)

    def factor(self, total: int) -> optax.Schedule:
        warm, down = _steps(self.warmup, total), max(_steps(self.decay, total), 1)
        if warm + down > max(total, 1):
            raise UserError(
                f"train.schedule: {warm} steps of warmup and {down} of decay overlap in a run of {total}; valid: "
                "shorter ones, or more train.steps"
            )
        power = 1.0 if self.shape == "linear" else 0.5

        def fall(step: jax.Array) -> jax.Array:
            done = jnp.clip((step - (total - warm - down)) / down, 0.0, 1.0) ** power
            return self.final + (1.0 - self.final) * (1.0 - done)

        return _warm(warm, fall)


def _warm(steps: int, rest: optax.Schedule) -> optax.Schedule:
    if steps < 1:
        return rest
    return optax.join_schedules([optax.linear_schedule(1.0 / (steps + 1), 1.0, steps), rest], [steps])


TABLE = Table({"constant": Constant, "cosine": Cosine, "wsd": WSD})
