"""Three tasks whose conditional densities are known (arXiv 2410.22269, section 3): triples (x, y, z) in [-1, 1], to be
learned as the distribution of z given x and y."""

from __future__ import annotations

from typing import Any

import numpy as np

TASKS = ("gaussian", "gmm2", "beta")
_STD = 0.1  # all Gaussians have variance 0.01


def sample(task: str, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``(x, y)`` float64 ``[n, 2]`` and z ``[n]``.

    ``gaussian``: x uniform on (-0.8, 0.8), y ~ N(x, 0.01), z ~ N(y, 0.01). ``gmm2``: x and y uniform, z from N(x, 0.01)
    or N(y, 0.01), evenly. ``beta``: x and y as in the first, z = ±Beta(100 |x|, 100 |y|), either sign evenly.
    """
    x = rng.uniform(-0.8, 0.8, n)
    y = rng.uniform(-0.8, 0.8, n) if task == "gmm2" else rng.normal(x, _STD)
    even = rng.integers(0, 2, n)
    if task == "gaussian":
        z = rng.normal(y, _STD)
    elif task == "gmm2":
        z = rng.normal(np.where(even == 1, x, y), _STD)
    else:
        z = np.where(even == 1, 1.0, -1.0) * rng.beta(100 * np.abs(x), 100 * np.abs(y))
    return np.stack([x, y], 1), z


def density(task: str, xy_N2: np.ndarray, at_M: np.ndarray) -> np.ndarray:
    """The density of z given each row of `xy_N2`, at the points `at_M`: float64 ``[N, M]``."""
    from scipy import stats

    x, y = xy_N2[:, :1], xy_N2[:, 1:]
    normal: Any = stats.norm.pdf
    if task == "gaussian":
        return normal(at_M, y, _STD)
    if task == "gmm2":
        return 0.5 * (normal(at_M, x, _STD) + normal(at_M, y, _STD))
    return 0.5 * stats.beta.pdf(np.abs(at_M), 100 * np.abs(x), 100 * np.abs(y))


def centres(bins: int) -> np.ndarray:
    return -1.0 + (2.0 * np.arange(bins) + 1.0) / bins


def pmf(task: str, xy_N2: np.ndarray, bins: int) -> np.ndarray:
    """The density at the bins' centres divided by its sum, ``[N, bins]``: what a perfect head would give."""
    p = density(task, xy_N2, centres(bins))
    return p / p.sum(-1, keepdims=True)


def truncated(task: str, xy_N2: np.ndarray, bins: int, frequencies: int, grid: int = 2000) -> np.ndarray:
    """`pmf` of the density's Fourier series on [-1, 1] cut after `frequencies` terms. May dip below 0: the theorem on
    smoothness (3.3) is about these."""
    x = centres(grid)
    f = density(task, xy_N2, x)
    f = f / (f.mean(-1, keepdims=True) * 2)
    wave = np.exp(-1j * np.pi * np.outer(x, np.arange(1, frequencies + 1)))
    c = f @ wave * (2.0 / grid)  # integral of f e^{-i pi k x}: p = 1/2 + Re sum c_k e^{i pi k x}
    at = np.exp(1j * np.pi * np.outer(np.arange(1, frequencies + 1), centres(bins)))
    p = 0.5 + (c @ at).real
    return p / p.sum(-1, keepdims=True)


def quantise(values: np.ndarray, bins: int) -> np.ndarray:
    """Which of `bins` equal bins of [-1, 1]; what lies outside goes to the nearest."""
    return np.clip(np.floor((values + 1.0) * bins / 2.0), 0, bins - 1).astype(np.int32)
