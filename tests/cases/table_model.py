"""A language model that is a table: logits of the next token by the last one. All its texts can be counted.

With eight tokens and texts of four there are 4,096 of them: what a way of drawing does is compared with what it should
do text by text, and no transformer is compiled.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.model.inputs import Inputs
from lm.model.language_model import LanguageModel
from lm.model.output import Output
from lm.watch import Watch

V = 8
LENGTH = 4


@dataclass(frozen=True, eq=False)
class TableModel:
    """`logits_VV`: row = last token, column = next token."""

    logits_VV: np.ndarray

    @staticmethod
    def random(seed: int, sharp: float = 1.0) -> TableModel:
        return TableModel(sharp * np.random.default_rng(seed).normal(size=(V, V)))

    @property
    def p_VV(self) -> np.ndarray:
        """Probabilities of the next token by the last one."""
        e = np.exp(self.logits_VV - self.logits_VV.max(-1, keepdims=True))
        return np.asarray(e / e.sum(-1, keepdims=True))

    @property
    def params(self) -> dict[str, jax.Array]:
        """As `TableLM` takes them."""
        return {"logits_VV": jnp.asarray(self.logits_VV, jnp.float32)}

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits ``[B, T, V]`` of the token after each."""
        return np.asarray(self.logits_VV[tokens_BT])

    def texts(self, last: int, n: int = LENGTH) -> np.ndarray:
        """The probability of every text of `n` tokens after `last`, as an array of n axes of length V."""
        out = np.zeros((V,) * n)
        for text in itertools.product(range(V), repeat=n):
            out[text] = np.prod([self.p_VV[a, b] for a, b in itertools.pairwise((last, *text))])
        return out

    def likeliest(self, last: int, n: int = LENGTH) -> list[int]:
        """The greedy text."""
        out: list[int] = []
        for _ in range(n):
            out.append(int(self.logits_VV[out[-1] if out else last].argmax()))
        return out


def expected_accepted(target: TableModel, drafter: TableModel, last: int, n: int) -> float:
    """How many of `n` drafted tokens exact acceptance takes on average: each with the overlap of the two
    distributions, until one is not taken (arXiv 2211.17192, section 3)."""
    total, alive = 0.0, np.zeros(V)
    alive[last] = 1.0
    overlap_VV = np.minimum(target.p_VV, drafter.p_VV)
    for _ in range(n):
        alive = alive @ overlap_VV
        total += float(alive.sum())
    return total


@dataclass(frozen=True)
class TableLM(LanguageModel):
    """A `TableModel` as `lm.model.language_model.LanguageModel`: its parameters are ``{"logits_VV": ...}``, a hidden
    state is the row of logits itself, and a cache counts the tokens of every row."""

    vocab_size: int = V

    def apply(
        self,
        params: Any,
        inputs: Inputs,
        cache: Any = None,
        watch: Watch = Watch(),  # noqa: B008  (frozen)
        commit: bool = True,
    ) -> Output:
        assert inputs.tokens_BT is not None
        logits_BTV = params["logits_VV"][inputs.tokens_BT]
        if cache is not None and commit:
            assert inputs.index_BT is not None
            cache = cache + (inputs.index_BT >= 0).sum(1)
        return Output(logits_BTV if watch.logits else None, logits_BTV, cache)

    def cache(self, batch: int, capacity: int) -> jax.Array:
        return jnp.zeros(batch, jnp.int32)

    def commit(self, cache: jax.Array, fresh: Any, path_BP: jax.Array, count_B: jax.Array) -> jax.Array:
        return cache + count_B

    def readout(self, params: Any, hidden: jax.Array) -> jax.Array:
        return hidden

    @property
    def trained_length(self) -> int:
        return LENGTH
