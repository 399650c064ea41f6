"""SOCKET schedule: the learning rate over a run, as a factor in [0, 1] of the optimizer's rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import optax

from lm.errors import UserError
from lm.plug import Table


def _steps(amount: float, total: int) -> int:
    """`amount` below 1 is a fraction of the run, else a number of steps."""
    return math.ceil(amount * total) if amount < 1 else int(amount)


def _check(plug: Any, *names: str) -> None:
    for name in names:
        if getattr(plug, name) < 0:
            raise UserError(f"train.schedule.{name}: must be 0 or more, found {getattr(plug, name)}")
    if not 0 <= getattr(plug, "final", 0.0) <= 1:
        raise UserError(f"train.schedule.final: must lie in [0, 1], found {plug.final}")


@dataclass(frozen=True)
class Constant:
    """1 after a linear warm-up. `warmup`: steps, or a fraction of the run below 1."""

    warmup: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "warmup")

    def factor(self, total: int) -> optax.Schedule:
        """The factor at step 0, 1, …: the first step already moves, the peak is reached at step `warmup`."""
        return _warm(_steps(self.warmup, total), optax.constant_schedule(1.0))


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `final`."""

    warmup: float = 0.1
    final: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "warmup")

    def factor(self, total: int) -> optax.Schedule:
        warm = _steps(self.warmup, total)
        return _warm(warm, optax.cosine_decay_schedule(1.0, max(total - warm, 1), self.final))


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395): constant until the last `decay` of the run, then down to `final`.

    `shape`: ``linear``, or ``sqrt``, ``1 - sqrt(t)`` (arXiv 2405.18392).
    """

    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.0
    shape: str = "sqrt"

    def __post_init__(self) -> None:
        _check(self, "warmup", "decay")
        if self.shape not in ("linear", "sqrt"):
            raise UserError(f"train.schedule.shape: found {self.shape!r}; valid: linear, sqrt")

    def factor(self, total: int) -> optax.Schedule:
        warm, down = _steps(self.warmup, total), max(_steps(self.decay, total), 1)
        power = 1.0 if self.shape == "linear" else 0.5

        def fall(step: Any) -> Any:
            import jax.numpy as jnp

            done = jnp.clip((step - (total - warm - down)) / down, 0.0, 1.0) ** power
            return self.final + (1.0 - self.final) * (1.0 - done)

        return _warm(warm, fall)


def _warm(steps: int, rest: optax.Schedule) -> optax.Schedule:
    if steps < 1:
        return rest
    return optax.join_schedules([optax.linear_schedule(1.0 / (steps + 1), 1.0, steps), rest], [steps])


TABLE = Table({"constant": Constant, "cosine": Cosine, "wsd": WSD})
