"""How smooth predicted distributions over ordered bins are (arXiv 2410.22269, definition 3.1)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lm.config import ModelConfig
from lm.data import texts
from lm.errors import UserError
from lm.heads.base import Head
from lm.measures.base import Measure, Measured, Progress, Subject, beginning
from lm.model.inputs import Inputs
from lm.model.language_model import LanguageModel
from lm.watch import Watch

SIGMAS = 100


def smoothness(y_NV: ArrayLike) -> np.ndarray:
    """``s(y) = sum_sigma 6 / (pi sigma)^2 |y - G_sigma * y|_2``, sigma = 1 … 100 bins, float64 ``[N]``; 0 is a flat y.

    G is a Gaussian filter on the circle of bins that reaches V - 1 bins to either side, its weights summing to 1. The
    weights of the sum add up to 0.994 (to 1 over all sigma). Smaller is smoother. Computed through Parseval's identity:
    a convolution on the circle is a product of Fourier coefficients.
    """
    y = np.asarray(y_NV, np.float64)
    if y.ndim != 2 or y.shape[1] < 2:
        raise ValueError(f"expected distributions [N, V] over two bins or more, found shape {y.shape}")
    power = np.abs(np.fft.fft(y, axis=-1)) ** 2 / y.shape[1]
    distance = np.sqrt(power @ _lost(y.shape[1]))
    sigma = np.arange(1, SIGMAS + 1)
    return distance @ (6.0 / (np.pi * sigma) ** 2)


@functools.lru_cache(maxsize=8)
def _lost(V: int) -> np.ndarray:
    """``(1 - G)^2`` by frequency and sigma, ``[V, SIGMAS]``."""
    reach = np.arange(-(V - 1), V)
    out = np.empty((V, SIGMAS))
    for i in range(SIGMAS):
        weights = np.exp(-0.5 * (reach / (i + 1.0)) ** 2)
        circle = np.bincount(reach % V, weights / weights.sum(), V)
        out[:, i] = (1.0 - np.fft.fft(circle).real) ** 2
    return out


def in_order(y_NV: np.ndarray, head: Head) -> np.ndarray:
    """The columns of `y_NV`, one per id, in the order of the bins that `head` gives the ids."""
    bins = head.bins(y_NV.shape[1])
    return y_NV if bins is None else y_NV[:, np.argsort(bins, kind="stable")]


@dataclass(frozen=True)
class Smoothness(Measure):
    """Reads the first `tokens` tokens of each document of `texts` and takes s(y) of the model's distribution of the
    next token at every position from `skip` on; ids are bins in the order that the head gives them, or in their own.

    Samples, one per document: ``smoothness``, the mean over positions. Curve: s(y) by position, means of `bin`.
    """

    texts: tuple[str, ...] = ("kjv:Genesis",)
    tokens: int = 256
    skip: int = 0
    documents: int | None = None
    bin: int = 16
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.bin < 1:
            raise UserError(f"measures.smoothness: tokens, bin: at least 1, found {self.tokens}, {self.bin}")
        if not 0 <= self.skip < self.tokens:
            raise UserError(f"measures.smoothness.skip: must lie in 0 … {self.tokens - 1}, found {self.skip}")

    def _documents(self) -> list[Any]:
        return [d for spec in self.texts for d in texts.documents(spec)][: self.documents]

    def identity(self) -> str:
        return texts.identity(self._documents())

    @property
    def longest(self) -> int:
        return self.tokens

    def cost(self, cfg: ModelConfig) -> float:
        return float(len(self.texts) * self.tokens)

    def check(self, subject: Subject, trains: bool) -> None:
        for doc in self._documents():
            beginning(subject, doc, self.tokens, "measures.smoothness")

    def run(self, subject: Subject, progress: Progress) -> Measured:
        docs, rows = self._documents(), []
        for i, doc in enumerate(docs):
            ids = beginning(subject, doc, self.tokens, "measures.smoothness")
            y = np.asarray(_distributions(subject.model)(subject.params, jnp.asarray(ids, jnp.int32)[None]))[0]
            rows.append(smoothness(in_order(y, subject.config.head))[self.skip :])
            progress((i + 1) / len(docs), doc.name)
        s = np.stack(rows)
        edges = range(0, s.shape[1], self.bin)
        curve = {
            "x": [float(self.skip + a + min(self.bin, s.shape[1] - a) / 2) for a in edges],
            "y": [float(s[:, a : a + self.bin].mean()) for a in edges],
            "xlabel": "position, tokens",
            "ylabel": "s(y), smaller is smoother",
        }
        notes = {"documents": [{"name": d.name, "source": d.source, "licence": d.licence} for d in docs]}
        return Measured({"smoothness": s.mean(1).tolist()}, {"smoothness": curve}, notes)


@functools.lru_cache(maxsize=8)
def _distributions(model: LanguageModel) -> Any:
    def run(params: Any, tokens_BT: jax.Array) -> jax.Array:
        hidden = model.apply(params, Inputs(tokens_BT), watch=Watch(logits=False)).hidden_BTD
        return jax.nn.softmax(model.readout(params, hidden), axis=-1)

    return jax.jit(run)
