"""The Fourier head (arXiv 2410.22269): a density on [-1, 1] as a Fourier series that cannot be negative, read off at
the centres of ordered bins.

A linear layer gives complex coefficients ``a_0 … a_N``. The paper autocorrelates them (algorithm 1),
``c_k = sum_l a_{l+k} conj(a_l)``, so that ``p(x) = 1/2 + Re sum_{k>0} c_k / c_0 e^{i pi k x}`` is a density. The same
density is ``|sum_l a_l e^{i pi l x}|^2 / (2 c_0)``, which needs neither the autocorrelation nor complex numbers and
cannot be negative in floating point either; only the regulariser needs the ``c_k``. Letters: D width, N frequencies,
V bins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.heads.bins import Bins
from lm.plug import Model
from lm.weights.project import uniform
from lm.weights.weight import param

_EXACT = jax.lax.Precision.HIGHEST  # accelerators would otherwise multiply float32 in bfloat16 or TF32


@dataclass(frozen=True)
class Fourier(Bins):
    """Logits are ``log(y + epsilon)``, y the density at the bins' centres divided by its sum over them.

    `frequencies` is N; 0 is the uniform distribution. `gamma` weighs the regulariser ``2 sum_k 2 pi^2 k^2 |c_k|^2``
    (section 2.3; the mean over tokens joins the training loss). `reg_on` is ``raw`` for the authors' ``c_k``, which
    shrinks with the scale of a although p does not, or ``normalized`` for ``c_k / (2 c_0)``, which makes it the
    integral of ``p'(x)^2``. The layer starts uniform in ``+-1/sqrt(D)`` times `kernel_scale` (weights) and `bias_scale`
    (biases); the authors take 1e-2 for both, and 1e-3 and 1e-1 for time series. `order`, `centres`, `shuffle` and
    `epsilon`: see `lm.heads.bins.Bins`. Everything is computed in float32 whatever the model computes in.
    """

    frequencies: int = 12
    gamma: float = 0.0
    reg_on: Literal["raw", "normalized"] = "raw"
    kernel_scale: float = 1e-2
    bias_scale: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frequencies < 0:
            raise UserError(f"model.head.frequencies: must be 0 or more, found {self.frequencies}")
        if not 0.0 <= self.gamma < math.inf:
            raise UserError(f"model.head.gamma: must be finite and not negative, found {self.gamma}")
        for name, scale in (("kernel_scale", self.kernel_scale), ("bias_scale", self.bias_scale)):
            if not 0.0 < scale < math.inf:
                raise UserError(f"model.head.{name}: must be finite and positive, found {scale}")

    @property
    def resolution(self) -> int:
        return self.frequencies

    def at_resolution(self, n: int) -> Self:
        return dataclasses.replace(self, frequencies=n)

    def module(self, cfg: Model, name: str | None = None) -> nn.Module:
        return _Fourier(cfg, name=name)

    def aux(self, cfg: Model, params: Mapping[str, Any], hidden: jax.Array) -> dict[str, jax.Array]:
        """``{"fourier": gamma * regulariser}`` of every token, float32 ``[...]``; empty where gamma is 0."""
        if self.gamma == 0.0:
            return {}
        re, im = self.module(cfg).apply({"params": params["head"]}, hidden, method="coefficients")
        return {"fourier": self.gamma * roughness(re, im, normalized=self.reg_on == "normalized")}


class _Fourier(nn.Module):
    cfg: Model

    def setup(self) -> None:
        cfg, head = self.cfg, self.cfg.head
        n, bound = 2 * (head.frequencies + 1), cfg.d_model**-0.5
        kernel, bias, of = uniform(bound * head.kernel_scale), uniform(bound * head.bias_scale), cfg.param_dtype
        self.kernel = param(self, "coefficients", kernel, (cfg.d_model, n), of, axes=("embed", "freq"))
        self.bias = param(self, "coefficients_bias", bias, (n,), of, axes=("freq",))

    def coefficients(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Real and imaginary part of a, float32 ``[..., N + 1]``."""
        kernel, bias = self.kernel.astype(jnp.float32), self.bias.astype(jnp.float32)
        flat = jnp.dot(h.astype(jnp.float32), kernel, precision=_EXACT) + bias
        re, im = jnp.split(flat, 2, axis=-1)
        return re, im

    def __call__(self, h: jax.Array, table_VD: jax.Array) -> jax.Array:
        head = self.cfg.head
        y = probabilities(*self.coefficients(h), head.bins(self.cfg.vocab_size))
        return jnp.log(y + head.epsilon)


def probabilities(re: jax.Array, im: jax.Array, centres: np.ndarray) -> jax.Array:
    """y ``[..., V]`` from `re`, `im` ``[..., N + 1]`` and `centres` ``[V]``: not negative, sums to 1 (0 where a is 0).

    a counts up to a factor, so its largest part is brought to 1 first: no size of a over- or underflows.
    """
    largest = jnp.maximum(jnp.abs(re).max(-1, keepdims=True), jnp.abs(im).max(-1, keepdims=True))
    scale = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1.0))
    a = jnp.concatenate([re, im], -1) / scale
    angle = np.pi * np.outer(np.arange(re.shape[-1]), np.asarray(centres, np.float64))  # [N + 1, V]
    cos, sin = np.cos(angle), np.sin(angle)
    wave = jnp.asarray(np.block([[cos, sin], [-sin, cos]]), a.dtype)  # to real and imaginary part of A(x)
    real, imaginary = jnp.split(jnp.dot(a, wave, precision=_EXACT), 2, axis=-1)
    power = real**2 + imaginary**2
    total = power.sum(-1, keepdims=True)
    return power / jnp.where(total > 0, total, 1.0)


def autocorrelation(re: jax.Array, im: jax.Array) -> jax.Array:
    """``c_k = sum_l a_{l+k} conj(a_l)``, complex ``[..., N + 1]``, by a transform long enough not to wrap around."""
    n = re.shape[-1]
    power = jnp.abs(jnp.fft.fft(re + 1j * im, 2 * n, axis=-1)) ** 2
    return jnp.fft.ifft(power, axis=-1)[..., :n]


def roughness(re: jax.Array, im: jax.Array, normalized: bool = False) -> jax.Array:
    """``2 sum_k 2 pi^2 k^2 |c_k|^2`` ``[...]``, the integral over [-1, 1] of the squared derivative of ``|A(x)|^2``;
    with `normalized` of ``p(x) = |A(x)|^2 / (2 c_0)``."""
    if normalized:  # the same at every scale; computed at the scale of one
        size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(re).max(-1), jnp.abs(im).max(-1)))[..., None]
        size = jnp.where(size > 0, size, 1.0)
        re, im = re / size, im / size
    c = autocorrelation(re, im)
    k = np.arange(re.shape[-1], dtype=np.float64)
    weights = jnp.asarray(4.0 * np.pi**2 * k**2, re.dtype)
    total = (weights * (c.real**2 + c.imag**2)).sum(-1)
    return total / jnp.maximum(4.0 * c[..., 0].real ** 2, 1e-30) if normalized else total
