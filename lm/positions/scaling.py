"""Rotary frequency scalings, as `transformers` defines them (``modeling_rope_utils``), plus static NTK.

Each plug maps ``(theta, width, length, trained)`` to inverse frequencies ``float32[width // 2]`` and an attention
factor m that multiplies cos and sin, and so the rotary part of every logit by m**2. `trained` is the model's
`max_positions`; `original` in a plug is the length before scaling (Hugging Face's
``original_max_position_embeddings``), `trained` when None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lm.errors import UserError
from lm.plug import Plug, Table

Frequencies = tuple[jax.Array, float]


def inverse_frequencies(theta: float | jax.Array, width: int) -> Any:
    """``theta ** (-2 i / width)`` for i in 0 … width/2 - 1 (arXiv 2104.09864 eq. 15); float64 unless traced."""
    xp: Any = jnp if isinstance(theta, jax.Array) else np
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    return 1.0 / xp.power(theta, exponents)


def _f32(x: ArrayLike | tuple[float, ...]) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _positive(name: str, factor: float) -> None:
    if not factor >= 1.0:
        raise UserError(f"model.positions.scaling.factor: {name} needs a factor of at least 1, found {factor}")


def _length(original: int | None, least: int = 1) -> None:
    if original is not None and original < least:
        raise UserError(f"model.positions.scaling.original: must be at least {least} or None, found {original}")


def _base_change(name: str, width: int) -> None:
    if width < 4:
        raise UserError(f"model.positions.scaling: {name} needs a rotary width of at least 4, found {width}")


class Scaling(Plug):
    """A rule for the frequencies of rotary embedding: a frozen dataclass of settings."""

    KEY: ClassVar[str] = "model.positions.scaling"
    length_dependent: ClassVar[bool] = False  # whether frequencies change with the number of positions in use

    def frequencies(self, theta: float, width: int, length: jax.Array | float, trained: int) -> Frequencies:
        """Inverse frequencies float32 ``[width // 2]`` and the attention factor."""
        raise NotImplementedError

    def check_width(self, width: int) -> None:
        """Raises `UserError` for a rotary width that the rule cannot scale."""

    @property
    def stretch(self) -> float:
        """By how much it stretches the length that the model was trained at."""
        return 1.0


@dataclass(frozen=True)
class Default(Scaling):
    """Unscaled rotary embedding."""

    def frequencies(self, theta: float, width: int, length: jax.Array | float, trained: int) -> Frequencies:
        return _f32(inverse_frequencies(theta, width)), 1.0


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation (arXiv 2306.15595): all frequencies divided by `factor`."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        _positive("linear", self.factor)

    @property
    def stretch(self) -> float:
        return self.factor

    def frequencies(self, theta: float, width: int, length: jax.Array | float, trained: int) -> Frequencies:
        return _f32(inverse_frequencies(theta, width) / self.factor), 1.0


@dataclass(frozen=True)
class Ntk(Scaling):
    """NTK-aware base change: ``theta * factor ** (width / (width - 2))``, whatever the length."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        _positive("ntk", self.factor)

    @property
    def stretch(self) -> float:
        return self.factor

    def check_width(self, width: int) -> None:
        _base_change("ntk", width)

    def frequencies(self, theta: float, width: int, length: jax.Array | float, trained: int) -> Frequencies:
        base = theta * self.factor ** (width / (width - 2))
        return _f32(inverse_frequencies(base, width)), 1.0


@dataclass(frozen=True)
class Dynamic(Scaling):
    """Dynamic NTK: the base grows with the length in use; equal to `Default` up to the trained length.

    The frequencies of *all* positions depend on the length, so a longer input changes earlier outputs.
    """

    factor: float = 1.0
    length_dependent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("dynamic", self.factor)

    def check_width(self, width: int) -> None:
        _base_change("dynamic", width)

    def frequencies(self, theta: float, width: int, length: jax.Array | float, trained: int) -> Frequencies:
        ratio = jnp.maximum(_f32(length), trained) / trained
        base = theta * (self.factor * ratio - (self.factor - 1.0)) ** (width / (width - 2))
        return _f32(inverse_frequencies(base, width)), 1.0


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN (arXiv 2309.00071 sections 3.2-3.4): interpolate slow frequencies, keep fast ones, raise the temperature.

    The ramp is linear in the frequency's index, as in the authors' code and `transformers`.
    `attention_factor=1.0` is NTK-by-parts.
    """

    factor: float | None = 1.0
    original: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor is not None:
            _positive("yarn", self.factor)
        _length(self.original)
        if not self.beta_fast > self.beta_slow > 0:
            raise UserError(
                "model.positions.scaling.beta_fast: must exceed beta_slow > 0, "
                f"found beta_fast={self.beta_fast}, beta_slow={self.beta_slow}"
            )

    @property
    def stretch(self) -> float:
        return (self.factor or 1.0) if self.original is None else 1.0

    def frequencies(self, theta: float, width: int, length: jax.Array | float, trained: int) -> Frequencies:
        original = self.original or trained
        factor = self.factor if self.factor is not None else trained / original

        def index_of(rotations: float) -> float:
            return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
        f = inverse_frequencies(theta, width)
        if self.attention_factor is not None:
            m = self.attention_factor
        elif self.mscale and self.mscale_all_dim:
            m = _mscale(factor, self.mscale) / _mscale(factor, self.mscale_all_dim)
        else:
            m = _mscale(factor)
        return _f32(f * (1.0 - ramp) + f / factor * ramp), m


@dataclass(frozen=True)
class LongRope(Scaling):
    """LongRoPE (arXiv 2402.13753): per-frequency divisors, one list within the original length and one beyond."""

    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    factor: float | None = None
    original: int | None = None
    attention_factor: float | None = None
    length_dependent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _length(self.original, 2)
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if not all(x > 0 for x in factors):
                raise UserError(f"model.positions.scaling.{name}: all numbers must be positive")

    def check_width(self, width: int) -> None:
        for name, n in (("short_factor", len(self.short_factor)), ("long_factor", len(self.long_factor))):
            if n != width // 2:
                raise UserError(
                    f"model.positions.scaling.{name}: {n} numbers found, "
                    f"{width // 2} needed (half the rotary width {width})"
                )

    def frequencies(self, theta: float, width: int, length: jax.Array | float, trained: int) -> Frequencies:
        original = self.original or trained
        factor = self.factor if self.factor is not None else trained / original
        divisors = jnp.where(_f32(length) > original, _f32(self.long_factor), _f32(self.short_factor))
        m = self.attention_factor
        if m is None:
            m = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
        return _f32(inverse_frequencies(theta, width)) / divisors, m


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's rule: keep short wavelengths, divide long ones by `factor`, blend between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original: int | None = None

    def __post_init__(self) -> None:
        _positive("llama3", self.factor)
        _length(self.original)
        if not self.high_freq_factor > self.low_freq_factor:
            raise UserError(
                "model.positions.scaling.high_freq_factor: must exceed low_freq_factor = "
                f"{self.low_freq_factor}, found {self.high_freq_factor}"
            )

    def frequencies(self, theta: float, width: int, length: jax.Array | float, trained: int) -> Frequencies:
        f = inverse_frequencies(theta, width)
        turns = (self.original or trained) * f / (2 * math.pi)
        u = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        u = np.clip(u, 0.0, 1.0)
        return _f32((1.0 - u) * f / self.factor + u * f), 1.0


TABLE = Table(
    {
        "default": Default,
        "linear": Linear,
        "ntk": Ntk,
        "dynamic": Dynamic,
        "yarn": Yarn,
        "longrope": LongRope,
        "llama3": Llama3,
    }
)
